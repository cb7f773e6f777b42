//go:build e2e

package faults_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"testing"

	"github.com/containerd/containerd/v2/core/snapshots"

	"github.com/selkies-project/packer-plugin-selkies/e2e/machine"
	"github.com/selkies-project/packer-plugin-selkies/e2e/nodestate"
	"github.com/selkies-project/packer-plugin-selkies/e2e/powerdisk"
)

// recording is what a store's disk was before some runs, and what they wrote.
type recording struct {
	before string
	log    *powerdisk.Log
	// from is where the runs begin in the log.
	from int
}

// powered is a machine whose runtime loses its power.
type powered struct {
	*machine.Machine
	runtime string
	dir     string // of the runtime's store, which is a disk of its own
	start   func()
	stop    func()
}

// boot starts the runtime with the disk image.
func (p powered) boot(t *testing.T, image string) (shutDown func()) {
	t.Helper()
	detach := p.MountDisk(t, image, p.dir, "rw")
	p.start()
	return func() {
		p.stop()
		p.Output(t, "umount", "-R", p.dir)
		detach()
	}
}

// record has inject and eject run on a store that lies on a disk whose writes are
// recorded, after learn.
func (p powered) record(t *testing.T, learn func()) recording {
	t.Helper()
	image, rec := newStore(t), recording{before: filepath.Join(t.TempDir(), "before")}
	shutDown := p.boot(t, image)
	learn()
	shutDown()
	copyDisk(t, image, rec.before)
	d, err := powerdisk.Attach(t.Context(), image)
	if err != nil {
		t.Fatal(err)
	}
	if err := p.AttachDisk(d.Path, "power"); err != nil {
		t.Fatal(err)
	}
	p.Output(t, "mount", d.Path, p.dir)
	p.start()
	rec.from = d.Log().Len()
	runInjector(t, p.Machine, p.runtime, inject)
	runInjector(t, p.Machine, p.runtime, eject)
	rec.log = d.Log()
	p.stop()
	p.Output(t, "umount", "-R", p.dir)
	if err := p.DetachDisk(d.Path, "power"); err != nil {
		t.Fatal(err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	t.Logf("recorded %d writes and %d flushes", rec.log.Len()-rec.log.Flushes(), rec.log.Flushes())
	return rec
}

// cut makes the disk that a power loss at a random moment leaves, and says which.
func (rec recording) cut(t *testing.T, r *rand.Rand) (image, what string) {
	t.Helper()
	image = filepath.Join(t.TempDir(), "cut")
	copyDisk(t, rec.before, image)
	after := rec.from + r.IntN(rec.log.Len()-rec.from+1)
	if r.IntN(2) == 0 {
		after = rec.log.BeforeFlush(after)
	}
	lost, err := rec.log.Cut(r, image, after)
	if err != nil {
		t.Fatal(err)
	}
	return image, fmt.Sprintf("power lost after %d of %d writes and flushes, %d writes not on the disk", after-rec.from, rec.log.Len()-rec.from, lost)
}

// TestContainerdPowerLoss cuts the power of a node with containerd at random moments of
// inject and eject.
func TestContainerdPowerLoss(t *testing.T) {
	t.Parallel()
	n := newCtrdNode(t, machine.Upstream)
	p := powered{n.Machine, "containerd", nodestate.ContainerdDir, func() { n.start(t) }, func() {
		n.disconnect()
		n.Output(t, "systemctl", "stop", "containerd.service")
	}}
	rec := p.record(t, func() { n.learn(t) })
	rounds(t, share(60), func(t *testing.T, r *rand.Rand) {
		image, what := rec.cut(t, r)
		t.Log(what)
		shutDown := p.boot(t, image)
		total.fault("power lost, containerd")
		// The first snapshot after a power loss may find a directory in its way, see twice:
		// half the time it is one of inject.
		if r.IntN(2) == 0 {
			// As an entry in fstab does at boot.
			mounted := n.mountAnchors(t)
			n.checkVisible(t)
			for _, dir := range mounted {
				n.Output(t, "umount", dir)
			}
		}
		n.recover(t, pick(r, []string{inject, eject}), what)
		shutDown()
	})
}

// mountAnchors mounts the cache disk where what is registered looks for it.
func (n *ctrdNode) mountAnchors(t *testing.T) (dirs []string) {
	t.Helper()
	err := n.ctrd.SnapshotService("overlayfs").Walk(n.context(t), func(_ context.Context, i snapshots.Info) error {
		if i.Labels["selkies.io/image-cache.anchor"] != "" && i.Kind == snapshots.KindCommitted {
			dirs = append(dirs, filepath.Join(nodestate.SnapshotsDir, i.Labels["selkies.io/image-cache.dir"], "fs"))
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, dir := range dirs {
		n.Output(t, "mount", "--bind", cacheDir, dir)
	}
	return dirs
}
