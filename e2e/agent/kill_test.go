//go:build e2e

package agent_test

import (
	"flag"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/selkies-project/packer-plugin-selkies/e2e/machine"
)

var seed = flag.Uint64("seed", rand.Uint64(), "of the moments at which TestKill ends the agent")

// TestKill ends the agent at random moments, by SIGKILL and by SIGTERM, which leaves no
// lease: the next one ends where an undisturbed one would.
func TestKill(t *testing.T) {
	t.Parallel()
	t.Logf("-seed=%d", *seed)
	r := rand.New(rand.NewPCG(*seed, 0))
	n := newNode(t, machine.Upstream)
	n.attach(t)
	a := n.start(t)
	n.waitMetric(t, "gate_open", atLeast(0)) // it answers
	start := time.Now()
	n.waitReady(t)
	took := time.Since(start)
	a.kill(t)
	want := n.names(t)
	for i := range 10 {
		n.Output(t, program, "eject", "--runtime=containerd")
		a := n.start(t)
		n.waitMetric(t, "gate_open", atLeast(0))
		time.Sleep(time.Duration(r.Int64N(int64(took)))) // the moment, not a wait
		if i%2 == 0 {
			a.kill(t)
		} else {
			a.stop(t)
			n.noLeases(t)
		}
		a = n.start(t)
		n.waitReady(t)
		if diff := cmp.Diff(want, n.names(t)); diff != "" {
			t.Fatalf("ended and started again: %s", diff)
		}
		n.noLeases(t)
		n.runs(t, world.refs[r.IntN(chains)])
		a.stop(t)
	}
}

// TestKillEjecting kills the agent in the middle of ejecting what is registered.
func TestKillEjecting(t *testing.T) {
	t.Parallel()
	n := newNode(t, machine.Upstream)
	image := copyDisk(t)
	n.MountDisk(t, image, cacheDir, "ro,noload")
	a := n.start(t, "--gone-after=1s")
	n.waitReady(t)
	images := func() int { return strings.Count(n.ctr(t, "images", "ls", "-q"), "\n") }
	all := images()
	normal := a.slowContainerd(t)
	if err := os.Truncate(image, 0); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "the first image to be ejected", func() bool { return images() < all })
	a.kill(t)
	if images() == 0 {
		t.Error("everything was ejected when the agent was killed: this shows nothing")
	}
	normal()
	n.start(t, "--gone-after=1s")
	waitFor(t, "the other images to be ejected", func() bool { return images() == 0 })
	waitFor(t, "the disk's mount to go", func() bool { return n.mounts(t) == 0 })
	// After the mount the agent collects containerd's garbage, under one more lease.
	waitFor(t, "the leases to go", func() bool { return n.leases(t) == "" })
	n.pull(t, world.refs[0])
	n.runs(t, world.refs[0])
}

// TestKillMounting kills the agent while it puts a disk in the place of one that is dead.
func TestKillMounting(t *testing.T) {
	t.Parallel()
	n := newNode(t, machine.Upstream)
	image := copyDisk(t)
	n.MountDisk(t, image, cacheDir, "ro,noload")
	a := n.start(t)
	n.waitReady(t)
	for _, call := range []string{"umount2", "move_mount"} {
		detach := strace(t, a.id(), call, "signal=KILL")
		if err := os.Truncate(image, 0); err != nil {
			t.Fatal(err)
		}
		image = copyDisk(t)
		n.MountDisk(t, image, cacheDir, "ro,noload")
		a.waitKilled(t)
		detach()
		a = n.start(t)
		n.waitReady(t)
		if got := n.mounts(t); got != 1 {
			t.Errorf("killed at %s: %d mounts below containerd's directory, want 1", call, got)
		}
		n.runs(t, world.refs[1])
	}
}

// names are those of containerd's images, without the digests of configs, by which the CRI
// adds those that it has been told of, a moment later.
func (n *node) names(t testing.TB) []string {
	t.Helper()
	return slices.DeleteFunc(strings.Fields(n.ctr(t, "images", "ls", "-q")), func(name string) bool {
		return strings.HasPrefix(name, "sha256:")
	})
}

// noLeases fails the test if containerd has any.
func (n *node) noLeases(t testing.TB) {
	t.Helper()
	if leases := n.leases(t); leases != "" {
		t.Errorf("leases: %s", leases)
	}
}

func (n *node) leases(t testing.TB) string {
	t.Helper()
	return n.ctr(t, "leases", "ls", "-q")
}
