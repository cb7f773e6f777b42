//go:build e2e

// Package faults_test lets things go wrong at random moments of the injector's and the
// provisioner's work: processes killed, power lost, disks full or gone, registries that
// lie. After each, a plain run must end in the state of one that was left alone, and
// what is visible in between must be complete. The injector is built with the race
// detector.
//
// The seed of a run is printed; with the same -seed and -faults the same faults come in
// the same order, though what they hit also depends on the machine's load.
package faults_test

import (
	"context"
	"flag"
	"fmt"
	"maps"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/selkies-project/packer-plugin-selkies/e2e/cachedisk"
	"github.com/selkies-project/packer-plugin-selkies/e2e/host"
	"github.com/selkies-project/packer-plugin-selkies/e2e/images"
	"github.com/selkies-project/packer-plugin-selkies/e2e/machine"
	"github.com/selkies-project/packer-plugin-selkies/e2e/registry"
	"github.com/selkies-project/packer-plugin-selkies/e2e/treediff"
	"github.com/selkies-project/packer-plugin-selkies/manifest"
)

var (
	seed   = flag.Uint64("seed", rand.Uint64(), "of all randomness")
	faults = flag.Int("faults", 10, "how many faults the node's containerd gets; the others in proportion")
)

// world is what all tests share.
var world struct {
	reg      *registry.Registry
	injector string
	// disk is the image of a cache disk with the images of refs and their blobs.
	disk  string
	refs  []string
	cache *manifest.Manifest
	// pause is the image of pods' sandboxes, which no disk has.
	pause       string
	pauseDigest digest.Digest
	// trees are what a container of each image sees after a pull, by the digest that
	// the image's names lead to.
	trees map[digest.Digest]treediff.Tree
}

func TestMain(m *testing.M) {
	flag.Parse()
	host.Main(func(ctx context.Context, dir string) (status int, err error) {
		fmt.Printf("faults: -seed=%d -faults=%d\n", *seed, *faults)
		world.injector = filepath.Join(dir, "selkies-image-injector")
		if err := host.Build(ctx, "./injector", world.injector, "-race"); err != nil {
			return 1, err
		}
		if world.reg, err = registry.Start(registry.Config{Dir: filepath.Join(dir, "blobs")}); err != nil {
			return 1, err
		}
		defer world.reg.Stop()
		all, err := catalogue(ctx)
		if err != nil {
			return 1, err
		}
		if world.refs, err = images.Push(ctx, world.reg.Addr, all); err != nil {
			return 1, err
		}
		if err := pushPause(ctx); err != nil {
			return 1, err
		}
		if err := buildDisk(ctx, dir); err != nil {
			return 1, fmt.Errorf("building a cache disk: %w", err)
		}
		status = m.Run()
		total.print(status)
		return status, nil
	})
}

// catalogue is images of shapes that differ in how they share layers and in their names.
func catalogue(ctx context.Context) ([]images.Image, error) {
	busybox, err := machine.Busybox(ctx)
	if err != nil {
		return nil, err
	}
	all, err := images.Catalogue(busybox)
	wanted := []string{"one-layer", "same-layer-twice", "empty-layer", "two-tags", "digest-only", "odd-files", "platforms"}
	return slices.DeleteFunc(all, func(i images.Image) bool { return !slices.Contains(wanted, i.Repository) }), err
}

func pushPause(ctx context.Context) error {
	busybox, err := machine.Busybox(ctx)
	if err != nil {
		return err
	}
	pause, err := images.Pause(busybox)
	if err != nil {
		return err
	}
	refs, err := images.Push(ctx, world.reg.Addr, []images.Image{pause})
	if err != nil {
		return err
	}
	hash, err := pause.Digest()
	world.pause, world.pauseDigest = refs[0], digest.Digest(hash.String())
	return err
}

func buildDisk(ctx context.Context, dir string) error {
	m, err := machine.Boot(ctx, machine.Config{Name: "builder"})
	if err != nil {
		return err
	}
	defer m.Close()
	world.disk = filepath.Join(dir, "disk")
	world.cache, err = cachedisk.Build(ctx, m, cachedisk.Config{
		Image: world.disk, References: world.refs, Created: time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC), Blobs: true,
	})
	if err != nil {
		return err
	}
	return pullTrees(ctx, m)
}

// pullTrees has a containerd without the injector pull the images and reads them.
func pullTrees(ctx context.Context, m *machine.Machine) error {
	if err := m.StartContainerd(ctx, machine.Containerd{Release: machine.Debian}); err != nil {
		return err
	}
	world.trees = map[digest.Digest]treediff.Tree{}
	const mnt = "/mnt/pulled"
	pulled := map[string]digest.Digest{world.pause: world.pauseDigest}
	for _, img := range world.cache.Images {
		pulled[img.Names[0]] = img.Target().Digest
	}
	for ref, target := range pulled {
		_, err := m.Run(ctx, "sh", "-ec", "ctr images pull --plain-http "+ref+" >/dev/null; mkdir -p "+mnt+"; ctr images mount "+ref+" "+mnt)
		if err != nil {
			return err
		}
		tree, err := treediff.Dir(m.Path(mnt))
		if err != nil {
			return err
		}
		if _, err := m.Run(ctx, "ctr", "images", "unmount", "--rm", mnt); err != nil {
			return err
		}
		delete(tree, ".") // its time is that of its unpacking
		world.trees[target] = tree
	}
	return nil
}

// checkTree compares what a container of an image would see with what it sees after a
// pull.
func checkTree(t *testing.T, name string, target digest.Digest, root string) {
	t.Helper()
	tree, err := treediff.Dir(root)
	if err != nil {
		t.Errorf("image %s is visible and cannot be read: %v", name, err)
		return
	}
	delete(tree, ".")
	want, ok := world.trees[target]
	if !ok {
		t.Errorf("image %s is visible and leads to %s, which no registry has", name, target)
		return
	}
	total.tree()
	same(t, "image "+name+" is visible, but", want, tree)
}

func same(t *testing.T, what string, want, got treediff.Tree) {
	t.Helper()
	diffs := treediff.Compare(want, got)
	if len(diffs) > 10 {
		diffs = append(diffs[:10], fmt.Sprintf("and %d more", len(diffs)-10))
	}
	for _, d := range diffs {
		t.Errorf("%s: %s", what, d)
	}
}

// rounds calls f n times, with randomness that follows from the seed, the test's name
// and the round, until it fails.
func rounds(t *testing.T, n int, f func(t *testing.T, r *rand.Rand)) {
	t.Helper()
	round := 0
	defer func() {
		if t.Failed() {
			t.Logf("in round %d of %d; again with -seed=%d -faults=%d", round, n, *seed, *faults)
		}
	}()
	for ; round < n && !t.Failed(); round++ {
		name := digest.FromString(fmt.Sprint(t.Name(), round)).Encoded()
		var salt uint64
		if _, err := fmt.Sscanf(name[:16], "%x", &salt); err != nil {
			t.Fatal(err)
		}
		f(t, rand.New(rand.NewPCG(*seed, salt)))
	}
}

// share is a part of the faults that a whole run has, at least one.
func share(percent int) int { return max(1, *faults*percent/100) }

// tally counts what the suite has done.
type tally struct {
	mu            sync.Mutex
	faults        map[string]int
	states, trees int
	crowd         time.Duration
}

var total = tally{faults: map[string]int{}}

func (c *tally) fault(kind string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.faults[kind]++
}

// crowded adds time for which everything went on at once.
func (c *tally) crowded(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.crowd += d
}

func (c *tally) state() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.states++
}

func (c *tally) tree() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.trees++
}

// print prints it as a table of Markdown, for the README.
func (c *tally) print(status int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	sum, kinds := 0, map[string]int{}
	for kind, n := range c.faults {
		kind, _, _ = strings.Cut(kind, ",") // whatever it struck, or happened in
		kinds[kind] += n
		sum += n
	}
	var rows strings.Builder
	for _, kind := range slices.Sorted(maps.Keys(kinds)) {
		fmt.Fprintf(&rows, "| %s | %d |\n", kind, kinds[kind])
	}
	lost := "see above"
	if status == 0 {
		lost = "nothing"
	}
	fmt.Printf("| faults, -seed=%d | |\n|---|---|\n%s| in all | %d |\n| everything at once | %v |\n| end states compared | %d |\n| image trees compared | %d |\n| lost | %s |\n",
		*seed, rows.String(), sum, c.crowd, c.states, c.trees, lost)
}
