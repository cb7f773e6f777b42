//go:build e2e

package faults_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/selkies-project/packer-plugin-selkies/e2e/machine"
	"github.com/selkies-project/packer-plugin-selkies/e2e/nodestate"
)

// ctrdNode is a machine whose containerd keeps everything on a small disk of its own.
type ctrdNode struct {
	*cacheNode
	release machine.Release
	ctrd    *client.Client

	// empty and full are the states before and after a clean inject.
	empty, full []string
	// took is how long a run of inject and eject takes.
	took map[string]time.Duration
}

const (
	inject = "inject"
	eject  = "eject"
)

// newCtrdNode makes a node without a store, whose containerd does not run yet.
func newCtrdNode(t *testing.T, release machine.Release) *ctrdNode {
	t.Helper()
	n := &ctrdNode{cacheNode: newCacheNode(t), release: release}
	t.Cleanup(n.disconnect)
	return n
}

// start starts containerd, again if it runs, and waits for its CRI, which changes
// records when it starts.
func (n *ctrdNode) start(t *testing.T) {
	t.Helper()
	n.disconnect()
	// systemd's own limit on starts is not the subject.
	_, _ = n.Run(t.Context(), "systemctl", "reset-failed", "containerd.service")
	if err := n.StartContainerd(t.Context(), machine.Containerd{Release: n.release, Sandbox: world.pause}); err != nil {
		t.Fatal(err)
	}
	var err error
	if n.ctrd, err = client.New(n.Path(machine.Socket), client.WithDefaultNamespace("k8s.io")); err != nil {
		t.Fatal(err)
	}
	n.Output(t, "timeout", "60", "sh", "-c", "until ctr plugins ls | grep -q 'cri .*ok'; do sleep 0.05; done")
}

func (n *ctrdNode) disconnect() {
	if n.ctrd != nil {
		n.ctrd.Close()
		n.ctrd = nil
	}
}

func (n *ctrdNode) context(t *testing.T) context.Context {
	return namespaces.WithNamespace(t.Context(), "k8s.io")
}

// settled is the state without garbage, once the CRI has stopped changing records.
func (n *ctrdNode) settled(t *testing.T) []string {
	t.Helper()
	if err := n.dirty(n.context(t)); err != nil {
		t.Fatal(err)
	}
	lines, err := nodestate.SettledContainerd(n.context(t), n.Machine, n.ctrd, false)
	if err != nil {
		t.Fatal(err)
	}
	return lines
}

// dirty removes a snapshot and a blob that it has made. Only then containerd looks for
// files that it does not know, whose removal a fault has cut off.
func (n *ctrdNode) dirty(ctx context.Context) error {
	service, key := n.ctrd.SnapshotService("overlayfs"), "dirty"
	if _, err := twice(func() ([]mount.Mount, error) { return service.Prepare(ctx, key, "") }); err != nil {
		return err
	}
	if err := service.Remove(ctx, key); err != nil && !errdefs.IsNotFound(err) {
		return err
	}
	data := []byte("dirty")
	desc := ocispec.Descriptor{Digest: digest.FromBytes(data), Size: int64(len(data))}
	if err := content.WriteBlob(ctx, n.ctrd.ContentStore(), key, bytes.NewReader(data), desc); err != nil {
		return err
	}
	// Garbage collection may be quicker, here and above.
	if err := n.ctrd.ContentStore().Delete(ctx, desc.Digest); !errdefs.IsNotFound(err) {
		return err
	}
	return nil
}

// learn runs inject and eject without a fault.
func (n *ctrdNode) learn(t *testing.T) {
	t.Helper()
	n.took = map[string]time.Duration{}
	n.empty = n.settled(t)
	n.took[inject] = runInjector(t, n.Machine, "containerd", inject)
	n.full = n.settled(t)
	if visible := n.checkVisible(t); t.Failed() || visible < len(world.refs) {
		t.Fatalf("after a clean run only %d images are visible", visible)
	}
	n.took[eject] = runInjector(t, n.Machine, "containerd", eject)
	if diff := cmp.Diff(n.empty, n.settled(t)); diff != "" {
		t.Fatalf("a clean eject left something: %s", diff)
	}
	t.Logf("inject takes %v, eject %v", n.took[inject], n.took[eject])
}

// recover makes a plain run of inject or eject and compares the end.
func (n *ctrdNode) recover(t *testing.T, command, after string) {
	t.Helper()
	runInjector(t, n.Machine, "containerd", command)
	want := n.empty
	if command == inject {
		want = n.full
	}
	n.compare(t, want, after+", then "+command)
}

// compare compares the state with that of a clean run.
func (n *ctrdNode) compare(t *testing.T, want []string, after string) {
	t.Helper()
	total.state()
	if diff := cmp.Diff(want, n.settled(t)); diff != "" {
		t.Errorf("%s (-clean +now):\n%s", after, diff)
	}
}

// checkVisible checks that every image record has all its content and layers, and that
// a container would see the tree that it sees after a pull. It gives their number.
func (n *ctrdNode) checkVisible(t *testing.T) int {
	t.Helper()
	ctx := n.context(t)
	list, err := n.ctrd.ListImages(ctx)
	if err != nil {
		t.Fatal(err)
	}
	const mnt = "/run/visible"
	// Garbage collection would take the views away.
	root := snapshots.WithLabels(map[string]string{"containerd.io/gc.root": time.Now().UTC().Format(time.RFC3339)})
	script := "mkdir -p " + mnt + "\n"
	var visible []client.Image
	for i, img := range list {
		diffIDs, err := img.RootFS(ctx)
		if err != nil {
			t.Errorf("image %s is visible without its content: %v", img.Name(), err)
			continue
		}
		key := fmt.Sprintf("visible-%d", i)
		mounts, err := twice(func() ([]mount.Mount, error) {
			return n.ctrd.SnapshotService("overlayfs").View(ctx, key, identity.ChainID(diffIDs).String(), root)
		})
		if err != nil {
			t.Errorf("image %s is visible without its layers: %v", img.Name(), err)
			continue
		}
		defer func() {
			if err := n.ctrd.SnapshotService("overlayfs").Remove(ctx, key); err != nil {
				t.Error(err)
			}
		}()
		if digest.Digest(img.Name()).Validate() == nil {
			continue // the same image under its ID
		}
		script += mountCommand(mounts, fmt.Sprintf("%s/%d", mnt, len(visible)))
		visible = append(visible, img)
	}
	if out, err := n.Run(t.Context(), "sh", "-ec", script); err != nil {
		t.Errorf("an image is visible and cannot be mounted: %v %s", err, out)
	}
	for i, img := range visible {
		checkTree(t, img.Name(), img.Target().Digest, n.Path(fmt.Sprintf("%s/%d", mnt, i)))
	}
	n.Output(t, "sh", "-ec", "for d in "+mnt+"/*; do ! mountpoint -q $d || umount $d; done; rm -rf "+mnt)
	return len(visible)
}

// twice makes a snapshot, as kubelet does again if it fails. A containerd that was cut off
// while it made one fails at the directory that it left, and removes it.
func twice(snapshot func() ([]mount.Mount, error)) ([]mount.Mount, error) {
	mounts, err := snapshot()
	if err != nil && strings.Contains(err.Error(), "file exists") {
		return snapshot()
	}
	return mounts, err
}

// mountCommand mounts a view of a snapshot.
func mountCommand(mounts []mount.Mount, dir string) string {
	s := "mkdir " + dir + "\n"
	for _, m := range mounts {
		if m.Type == "bind" {
			s += fmt.Sprintf("mount --rbind -o ro %s %s\n", m.Source, dir)
			continue
		}
		s += fmt.Sprintf("mount -t %s -o %s %s %s\n", m.Type, strings.Join(m.Options, ","), m.Source, dir)
	}
	return s
}

// TestContainerd lets one fault after another strike inject and eject.
func TestContainerd(t *testing.T) {
	t.Parallel()
	for _, tt := range []struct {
		release machine.Release
		faults  int
	}{{machine.Upstream, share(100)}, {machine.Debian, share(30)}} {
		t.Run(string(tt.release), func(t *testing.T) {
			n := newCtrdNode(t, tt.release)
			n.MountDisk(t, newStore(t), nodestate.ContainerdDir, "rw")
			n.start(t)
			n.learn(t)
			n.loseLease(t, share(20))
			state := eject
			rounds(t, tt.faults, func(t *testing.T, r *rand.Rand) {
				command := inject
				if state == inject {
					command = eject
				}
				f := draw(r, ctrdFaults)
				what := n.suffer(t, r, f, command)
				if f.heal != nil {
					f.heal(t, n)
				}
				if !f.unreadable {
					n.checkVisible(t)
				}
				state = pick(r, []string{inject, eject})
				n.recover(t, state, what)
				if f.unreadable && state == inject {
					n.checkVisible(t)
				}
			})
		})
	}
}

// loseLease takes the lease away, and what only it keeps, between an image's content and
// its record.
func (n *ctrdNode) loseLease(t *testing.T, times int) {
	t.Helper()
	for i := range times {
		config := world.cache.Images[i%len(world.cache.Images)].Config.Digest
		run := startInjector(t, n.Machine, "containerd", inject)
		for written := false; !written && run.runsFor(0); {
			_, err := n.ctrd.ContentStore().Info(n.context(t), config)
			written = err == nil
		}
		err := expireLease(t, n, nil, run)
		run.wait(t)
		if err != nil && !errors.Is(err, errNotRunning) {
			t.Fatal(err)
		}
		if err == nil {
			total.fault(leaseExpired)
		}
		n.checkVisible(t)
		n.recover(t, eject, leaseExpired)
	}
}

// suffer runs inject or eject, or one after the other until the fault strikes, and says
// what happened.
func (n *ctrdNode) suffer(t *testing.T, r *rand.Rand, f ctrdFault, command string) string {
	t.Helper()
	if f.prepare != nil {
		f.prepare(t, n)
	}
	for {
		if what, struck := n.struck(t, r, f, command); struck {
			return what
		}
		command = map[string]string{inject: eject, eject: inject}[command]
	}
}

// struck runs a command that the fault strikes, unless it ends before.
func (n *ctrdNode) struck(t *testing.T, r *rand.Rand, f ctrdFault, command string) (what string, struck bool) {
	t.Helper()
	after := time.Duration(r.Int64N(int64(n.took[command])))
	what = fmt.Sprintf("%s %v into %s", f.kind, after.Round(time.Millisecond), command)
	i := startInjector(t, n.Machine, "containerd", strings.Fields(command)...)
	if !i.runsFor(after) {
		n.took[command] = n.took[command] * 9 / 10 // it was slower when it was timed
		i.wait(t)
		return what + ", too late", false
	}
	err := f.strike(t, n, r, i)
	status := i.wait(t)
	if errors.Is(err, errNotRunning) {
		return what + ", nothing to strike", false
	}
	if err != nil {
		t.Fatalf("%s: %v", what, err)
	}
	t.Logf("%s: exit status %d %s", what, status, i.last())
	if said := i.stderr.String(); status == 1 && f.says != "" && (strings.Count(said, "\n") != 1 || !strings.Contains(said, f.says)) {
		t.Errorf("%s: it does not say %q in one line: %s", what, f.says, said)
	}
	if !f.passive || status != 0 {
		total.fault(f.kind)
	}
	return what, true
}
