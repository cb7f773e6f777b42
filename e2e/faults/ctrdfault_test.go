//go:build e2e

package faults_test

import (
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"

	"github.com/selkies-project/packer-plugin-selkies/e2e/nodestate"
)

// ctrdFault is something that goes wrong while the injector works with containerd.
type ctrdFault struct {
	kind string
	// prepare, if any, comes before the run.
	prepare func(t *testing.T, n *ctrdNode)
	// strike says errNotRunning where there is nothing to strike at the moment, and has
	// done nothing then.
	strike func(t *testing.T, n *ctrdNode, r *rand.Rand, i *injection) error
	// heal makes the node well again; what the fault did to its state stays.
	heal func(t *testing.T, n *ctrdNode)
	// unreadable is true of a fault after which the disk of what is registered has to
	// be mounted anew.
	unreadable bool
	// passive is true of a fault that strikes only a run that fails by it.
	passive bool
	// says, if any, is what such a run has to say, in one line.
	says string
}

var ctrdFaults = []ctrdFault{
	{kind: "injector killed, containerd", strike: killInjector},
	{kind: "containerd killed", strike: killContainerd, heal: restartContainerd},
	{kind: "containerd and injector killed", strike: killBoth, heal: restartContainerd},
	{kind: "containerd stopped for a moment", strike: stopContainerd},
	{kind: leaseExpired, strike: expireLease},
	{kind: "disk full, containerd", passive: true, strike: onStore(fillDisk, 512<<10), heal: emptyStore},
	{kind: "inodes used up, containerd", passive: true, strike: onStore(fillInodes, 64), heal: emptyStore},
	{
		kind: "cache disk fails every read, containerd", unreadable: true, passive: true,
		prepare: func(t *testing.T, n *ctrdNode) { n.ownCache(t) },
		strike:  func(_ *testing.T, n *ctrdNode, _ *rand.Rand, _ *injection) error { return n.failCache() },
		heal:    func(t *testing.T, n *ctrdNode) { n.replaceCache(t) },
	},
	{
		kind: "cache disk's device gone for good, containerd", unreadable: true, passive: true, says: "cache disk not readable",
		prepare: func(t *testing.T, n *ctrdNode) { n.onMortalCache(t) },
		strike:  func(_ *testing.T, n *ctrdNode, _ *rand.Rand, _ *injection) error { return n.device.Kill() },
		heal:    func(t *testing.T, n *ctrdNode) { n.replaceCache(t) },
	},
	{
		kind: "cache disk unmounted, containerd", passive: true,
		strike: func(t *testing.T, n *ctrdNode, _ *rand.Rand, _ *injection) error { return n.unmountCache(t) },
		heal:   func(t *testing.T, n *ctrdNode) { n.replaceCache(t) },
	},
}

const leaseExpired = "lease expired, as when the clock jumps a day ahead"

// onMortalCache has what is registered, if anything, read from a device that can go.
func (n *ctrdNode) onMortalCache(t *testing.T) {
	t.Helper()
	id, err := world.cache.ID()
	if err != nil {
		t.Fatal(err)
	}
	registered := n.registered(t, id)
	if registered {
		runInjector(t, n.Machine, "containerd", eject)
	}
	n.mortalCache(t)
	if registered {
		runInjector(t, n.Machine, "containerd", inject)
	}
}

func killInjector(_ *testing.T, _ *ctrdNode, _ *rand.Rand, i *injection) error { return i.kill() }

func killContainerd(_ *testing.T, n *ctrdNode, _ *rand.Rand, _ *injection) error {
	return n.signal(syscall.SIGKILL)
}

func killBoth(_ *testing.T, n *ctrdNode, _ *rand.Rand, i *injection) error {
	if err := i.kill(); err != nil {
		return err
	}
	return n.signal(syscall.SIGKILL)
}

// stopContainerd has calls hang for a time that the injector waits.
func stopContainerd(_ *testing.T, n *ctrdNode, r *rand.Rand, _ *injection) error {
	if err := n.signal(syscall.SIGSTOP); err != nil {
		return err
	}
	time.Sleep(time.Duration(r.Int64N(int64(500 * time.Millisecond))))
	return n.signal(syscall.SIGCONT)
}

func (n *ctrdNode) signal(s syscall.Signal) error {
	reached, err := n.Signal(s, "containerd")
	if err == nil && reached == 0 {
		err = errors.New("no containerd runs")
	}
	return err
}

func restartContainerd(t *testing.T, n *ctrdNode) { n.start(t) }

// expireLease takes the injector's lease away, with what only it kept: what containerd
// does when the clock, which is the machine's own, jumps past the lease's end. Most of
// eject has none.
func expireLease(t *testing.T, n *ctrdNode, _ *rand.Rand, _ *injection) error {
	ctx := namespaces.WithNamespace(t.Context(), "k8s.io")
	list, err := n.ctrd.LeasesService().List(ctx)
	if err != nil {
		return err
	}
	struck := errNotRunning
	for _, l := range list {
		if l.Labels["selkies.io/image-cache.id"] == "" {
			continue
		}
		switch err := n.ctrd.LeasesService().Delete(ctx, l, leases.SynchronousDelete); {
		case err == nil:
			struck = nil
		case !errdefs.IsNotFound(err):
			return err
		}
	}
	return struck
}

// onStore is a fault of the file system that the runtime keeps its store on.
func onStore(fill filling, most int64) func(*testing.T, *ctrdNode, *rand.Rand, *injection) error {
	return func(_ *testing.T, n *ctrdNode, r *rand.Rand, _ *injection) error {
		return fill(r, n.Path(filepath.Join(nodestate.ContainerdDir, filler)), most)
	}
}

func emptyStore(t *testing.T, n *ctrdNode) {
	if err := os.RemoveAll(n.Path(filepath.Join(nodestate.ContainerdDir, filler))); err != nil {
		t.Fatal(err)
	}
}
