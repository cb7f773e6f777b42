//go:build e2e

package faults_test

import (
	"context"
	"math/rand/v2"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/selkies-project/packer-plugin-selkies/e2e/cachedisk"
	"github.com/selkies-project/packer-plugin-selkies/e2e/host"
	"github.com/selkies-project/packer-plugin-selkies/e2e/machine"
	"github.com/selkies-project/packer-plugin-selkies/e2e/nodestate"
)

// newerDir is where the disk of the newer generation is mounted.
const newerDir = "/mnt/newer"

// nextGeneration is a cache disk with the same images, recorded a month later.
func nextGeneration(t *testing.T) (image string) {
	t.Helper()
	image = filepath.Join(t.TempDir(), "newer")
	copyDisk(t, world.disk, image)
	loop, err := host.AttachLoop(image, false)
	if err != nil {
		t.Fatal(err)
	}
	defer loop.Close()
	dir := t.TempDir()
	if err := unix.Mount(loop.Path, dir, "ext4", 0, ""); err != nil {
		t.Fatal(err)
	}
	next := *world.cache
	next.Created = next.Created.AddDate(0, 1, 0)
	if err := cachedisk.WriteManifest(dir, &next); err != nil {
		t.Error(err)
	}
	if err := unix.Unmount(dir, 0); err != nil {
		t.Fatal(err)
	}
	return image
}

// TestGenerations lets faults strike as a node goes from one generation to the next:
// the newer one is registered, and the older ejected.
func TestGenerations(t *testing.T) {
	t.Parallel()
	n := newCtrdNode(t, machine.Upstream)
	n.MountDisk(t, newStore(t), nodestate.ContainerdDir, "rw")
	n.start(t)
	n.learn(t)
	n.MountDisk(t, nextGeneration(t), newerDir, "ro,noload")
	id, err := world.cache.ID()
	if err != nil {
		t.Fatal(err)
	}
	takeOver, ejectOlder := inject+" --cache "+newerDir, eject+" "+id.String()
	timed := func(command string) {
		start := time.Now()
		runInjector(t, n.Machine, "containerd", strings.Fields(command)...)
		n.took[command] = time.Since(start)
	}
	runInjector(t, n.Machine, "containerd", inject)
	timed(takeOver)
	timed(ejectOlder)
	newer := n.settled(t)
	n.checkVisible(t)
	n.recover(t, eject, "a clean change of generations")

	kinds := slices.DeleteFunc(slices.Clone(ctrdFaults), func(f ctrdFault) bool { return strings.HasPrefix(f.kind, "cache disk") })
	rounds(t, share(30), func(t *testing.T, r *rand.Rand) {
		n.recover(t, inject, "another round")
		f, command := pick(r, kinds), takeOver
		if r.IntN(2) == 0 {
			runInjector(t, n.Machine, "containerd", strings.Fields(takeOver)...)
			command = ejectOlder
		}
		what, _ := n.struck(t, r, f, command)
		if f.heal != nil {
			f.heal(t, n)
		}
		n.checkVisible(t)
		runInjector(t, n.Machine, "containerd", strings.Fields(takeOver)...)
		if n.registered(t, id) { // a fault that came too late has left nothing of it
			runInjector(t, n.Machine, "containerd", strings.Fields(ejectOlder)...)
		}
		n.compare(t, newer, what+", then a plain change")
		n.recover(t, eject, what+", then a plain change")
	})
}

// registered says whether anything is registered from the generation: its anchor comes
// first and goes last.
func (n *ctrdNode) registered(t *testing.T, id digest.Digest) (found bool) {
	t.Helper()
	err := n.ctrd.SnapshotService("overlayfs").Walk(n.context(t), func(_ context.Context, i snapshots.Info) error {
		found = found || i.Labels["selkies.io/image-cache.anchor"] != "" && i.Labels["selkies.io/image-cache.id"] == id.String()
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}
