//go:build e2e

package faults_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/selkies-project/packer-plugin-selkies/e2e/machine"
	"github.com/selkies-project/packer-plugin-selkies/e2e/nodestate"
	"github.com/selkies-project/packer-plugin-selkies/e2e/pods"
	"github.com/selkies-project/packer-plugin-selkies/e2e/treediff"
	"github.com/selkies-project/packer-plugin-selkies/injector/report"
	"github.com/selkies-project/packer-plugin-selkies/manifest"
)

// stepLimit is what nothing that is asked of the node while everything goes on at once
// may take.
const stepLimit = 3 * time.Minute

// crowd is everything that works on a node at once.
type crowd struct {
	m       *machine.Machine
	runtime string

	mu sync.Mutex
	// done counts what was done. What is there from the beginning has to happen in any run.
	done   map[string]int
	wrong  []string
	taken  []taking
	missed []miss
}

// taking is when images were taken away, by their numbers in the layer manifest.
type taking struct {
	begun, ended time.Time
	images       map[int]bool
}

// miss is an image that was not there for whoever asked for it.
type miss struct {
	verb, ref string
	// from is when nobody had said yet that it is there.
	from, to time.Time
	err      error
}

// lag is how much later than the store the CRI may know that an image is gone: it learns
// from events.
const lag = time.Second

func newCrowd(m *machine.Machine, runtime string, least ...string) *crowd {
	c := &crowd{m: m, runtime: runtime, done: map[string]int{}}
	for _, what := range append([]string{inject, eject}, least...) {
		c.done[what] = 0
	}
	return c
}

// ctrdCrowd works on a node with containerd.
type ctrdCrowd struct {
	*crowd
	n    *ctrdNode
	conn *grpc.ClientConn
	// agents is how many run.
	agents atomic.Int64
}

const (
	agents  = "agents ended"
	overlap = "agents that began beside another"
)

// count notes what was done, or said.
func (c *crowd) count(what string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.done[what]++
}

func (c *crowd) fail(format string, a ...any) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.wrong = append(c.wrong, fmt.Sprintf(format, a...))
}

// whole says if everything has happened.
func (c *crowd) whole() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	for _, n := range c.done {
		if n == 0 {
			return false
		}
	}
	return true
}

// take runs what takes images away, which says which, by any of their names.
func (c *crowd) take(f func() (names []string)) {
	begun := time.Now()
	images := map[int]bool{}
	for _, name := range f() {
		images[imageOf(name)] = true
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	c.taken = append(c.taken, taking{begun, time.Now(), images})
}

// imageOf is the number of the image with a name, -1 if no image of the disk has it.
func imageOf(name string) int {
	return slices.IndexFunc(world.cache.Images, func(img manifest.Image) bool { return slices.Contains(img.Names, name) })
}

// judge fails for images that were missing though nobody was taking them away.
func (c *crowd) judge() {
	for _, m := range c.missed {
		image := imageOf(m.ref)
		if slices.ContainsFunc(c.taken, func(t taking) bool {
			return t.images[image] && t.begun.Before(m.to) && t.ended.Add(lag).After(m.from)
		}) {
			c.count(m.verb + " an image that was removed meanwhile")
		} else {
			c.fail("%s %s, which nobody takes away: %v", m.verb, m.ref, m.err)
		}
	}
}

// TestConcurrent lets injectors, garbage collection and what kubelet does work on the
// same images at once: no container sees anything but its whole tree, everything ends,
// and nothing is left over.
func TestConcurrent(t *testing.T) {
	t.Parallel()
	for _, release := range []machine.Release{machine.Upstream, machine.Debian} {
		t.Run(string(release), func(t *testing.T) {
			t.Parallel()
			concurrent(t, newCtrdNode(t, release), time.Duration(*faults)*time.Second/2)
		})
	}
}

func concurrent(t *testing.T, n *ctrdNode, duration time.Duration) {
	n.MountDisk(t, newStore(t), nodestate.ContainerdDir, "rw")
	n.start(t)
	least := []string{agents, overlap, "garbage collected", "images pulled", "images removed", "pods run"}
	c := &ctrdCrowd{crowd: newCrowd(n.Machine, "containerd", least...), n: n}
	var err error
	if c.conn, err = grpc.NewClient("unix://"+n.Path(machine.Socket), grpc.WithTransportCredentials(insecure.NewCredentials())); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.conn.Close() })
	// The sandbox's image is the node's own, before all.
	p, err := pods.Run(t.Context(), c.conn, "first", world.pause, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.Remove(t.Context()); err != nil {
		t.Fatal(err)
	}
	n.learn(t)

	took := c.work(n.context(t), t, duration,
		c.injects, c.injects, c.ejects, c.collects, c.kubelet, c.kubelet, c.kubelet, c.agent, c.agent)
	if t.Failed() {
		return
	}

	// All that kubelet would remove goes, by its ID, since a pulled image can have lost its
	// tag to an eject; and what was registered.
	list, err := cri.NewImageServiceClient(c.conn).ListImages(t.Context(), &cri.ListImagesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for _, image := range list.Images {
		if slices.Contains(image.RepoTags, world.pause) {
			continue
		}
		if err := c.removeImage(t.Context(), image.Id); err != nil {
			t.Error(err)
		}
	}
	n.recover(t, eject, "everything at once")
	n.recover(t, inject, "everything at once, and eject")
	n.checkVisible(t)
	n.recover(t, eject, "everything at once, eject and inject")
	total.crowded(took)
}

// work has all members work for that long, each again and again, and says how long it was.
func (c *crowd) work(ctx context.Context, t *testing.T, duration time.Duration, members ...func(ctx context.Context, r *rand.Rand, i int)) time.Duration {
	t.Helper()
	start := time.Now()
	shortest, cancel := context.WithTimeout(ctx, duration)
	defer cancel()
	longest, cancel := context.WithTimeout(ctx, duration+stepLimit)
	defer cancel()
	var wg sync.WaitGroup
	for i, member := range members {
		r := rand.New(rand.NewPCG(*seed, uint64(i)))
		wg.Go(func() {
			for shortest.Err() == nil || longest.Err() == nil && !c.whole() {
				member(ctx, r, i)
			}
		})
	}
	wg.Wait()
	c.judge()
	took := time.Since(start).Round(time.Second)
	t.Logf("in %v: %v", took, c.summary())
	if !c.whole() {
		t.Error("not all of that happened")
	}
	for _, w := range c.wrong {
		t.Error(w)
	}
	return took
}

func (c *crowd) summary() string {
	var s []string
	for _, what := range slices.Sorted(maps.Keys(c.done)) {
		s = append(s, fmt.Sprintf("\n%5d %s", c.done[what], what))
	}
	return strings.Join(s, "")
}

// run runs the injector, and gives what it did, nil if nothing; refusals with one of the
// words are none of its faults.
func (c *crowd) run(command string, refused ...string) (did []byte) {
	i, err := newInjection(c.m, c.runtime, command, "--output", "json")
	if err != nil {
		c.fail("%v", err)
		return nil
	}
	status, err := i.end()
	switch {
	case err != nil:
		c.fail("%v", err)
	case status == 0:
		c.count(command)
		did = []byte(i.stdout.String())
	default:
		for line := range strings.Lines(i.stderr.String()) {
			if !contains(line, refused...) {
				c.fail("%s: %s", command, line)
			}
		}
		c.count(command + " refused")
	}
	return did
}

func contains(s string, words ...string) bool {
	return slices.ContainsFunc(words, func(w string) bool { return strings.Contains(s, w) })
}

func (c *crowd) injects(context.Context, *rand.Rand, int) { c.run(inject) }

// eject runs it, and gives the names of the images that it took.
func (c *crowd) eject(refused ...string) []string {
	var did report.Eject
	if out := c.run(eject, refused...); out != nil {
		if err := json.Unmarshal(out, &did); err != nil {
			c.fail("eject says %q", out)
		}
	}
	return did.Images
}

func (c *ctrdCrowd) ejects(_ context.Context, r *rand.Rand, _ int) {
	time.Sleep(time.Duration(r.Int64N(int64(2 * time.Second))))
	c.take(func() []string { return c.eject("remove the container first") })
}

// agent runs the DaemonSet's agent for a while, as another one does: during a surge a node
// has two.
func (c *ctrdCrowd) agent(_ context.Context, r *rand.Rand, _ int) {
	i, err := newInjection(c.m, c.runtime, "run", "--kubernetes=false", "--metrics-address", "", "--check-interval", "1s")
	if err != nil {
		c.fail("%v", err)
		return
	}
	if c.agents.Add(1) > 1 {
		c.count(overlap)
	}
	defer c.agents.Add(-1)
	for end := time.Now().Add(stepLimit); !strings.Contains(i.stderr.String(), "the gate is open") && time.Now().Before(end); {
		if !i.runsFor(50 * time.Millisecond) {
			break
		}
	}
	i.runsFor(time.Duration(r.Int64N(int64(3 * time.Second))))
	if err := i.terminate(); err != nil {
		c.fail("ending an agent: %v", err)
	}
	switch status, err := i.end(); {
	case err != nil:
		c.fail("%v", err)
	case status != 0 || !strings.Contains(i.stderr.String(), "the gate is open"):
		c.fail("an agent ends with %d: %s", status, i.stderr.String())
	default:
		c.count(agents)
	}
}

func (c *ctrdCrowd) collects(ctx context.Context, r *rand.Rand, _ int) {
	time.Sleep(time.Duration(r.Int64N(int64(200 * time.Millisecond))))
	ctx, cancel := context.WithTimeout(ctx, stepLimit)
	defer cancel()
	if err := nodestate.Collect(ctx, c.n.ctrd); err != nil {
		c.fail("%v", err)
		return
	}
	c.count("garbage collected")
}

// kubelet pulls an image if it is not there, or always, runs it, compares what the
// container sees, and now and then removes the image.
func (c *ctrdCrowd) kubelet(ctx context.Context, r *rand.Rand, i int) {
	ctx, cancel := context.WithTimeout(ctx, stepLimit)
	defer cancel()
	ref, from := pick(r, world.refs), time.Now()
	service, spec := cri.NewImageServiceClient(c.conn), &cri.ImageSpec{Image: ref}
	there, err := service.ImageStatus(ctx, &cri.ImageStatusRequest{Image: spec})
	if err != nil {
		c.said(ctx, "asking for", ref, from, err)
		return
	}
	if there.Image == nil || r.IntN(2) == 0 {
		if _, err := service.PullImage(ctx, &cri.PullImageRequest{Image: spec}); err != nil {
			c.said(ctx, "pulling", ref, from, err)
			return
		}
		c.count("images pulled")
	}
	p, err := pods.Run(ctx, c.conn, fmt.Sprintf("pod-%d", i), ref, nil)
	if err != nil {
		c.said(ctx, "running", ref, from, err)
		return
	}
	tree, err := pods.Tree(ctx, c.n.Machine, c.n.ctrd, p.Container)
	if err != nil {
		c.fail("reading the tree of %s: %v", ref, err)
	}
	c.compare(ref, tree)
	if err := p.Remove(ctx); err != nil {
		c.fail("%v", err)
	}
	c.count("pods run")
	if r.IntN(3) == 0 {
		c.take(func() []string {
			err = c.removeImage(ctx, ref)
			return []string{ref}
		})
		if err != nil {
			c.fail("removing %s: %v", ref, err)
			return
		}
		c.count("images removed")
	}
}

func (c *ctrdCrowd) removeImage(ctx context.Context, ref string) error {
	_, err := cri.NewImageServiceClient(c.conn).RemoveImage(ctx, &cri.RemoveImageRequest{Image: &cri.ImageSpec{Image: ref}})
	return err
}

// said sorts the errors of pulls and runs: an image that another member has taken away
// meanwhile is not there any more, which a user answers by trying again. At any other time
// it would be half there, which judge looks at.
func (c *crowd) said(ctx context.Context, verb, ref string, from time.Time, err error) {
	switch {
	case ctx.Err() != nil:
		c.fail("%s %s hangs: %v", verb, ref, errors.Join(err, ctx.Err()))
	case !contains(err.Error(), "not found", "does not exist", "No such image"):
		c.fail("%s %s: %v", verb, ref, err)
	default:
		c.mu.Lock()
		defer c.mu.Unlock()
		c.missed = append(c.missed, miss{verb, ref, from, time.Now(), err})
	}
}

// compare compares what a container sees with what it sees after a pull.
func (c *crowd) compare(ref string, got treediff.Tree) {
	total.tree()
	for _, img := range world.cache.Images {
		if !slices.Contains(img.Names, ref) {
			continue
		}
		want := pods.WithoutRuntime(maps.Clone(world.trees[img.Target().Digest]))
		delete(want, ".")
		delete(got, ".") // that of the container
		for _, diff := range treediff.Compare(want, got) {
			c.fail("a container of %s: %s", ref, diff)
		}
		return
	}
	c.fail("no image is named %s", ref)
}
