//go:build e2e

package containerd_test

import (
	"encoding/json"
	"fmt"
	"os"
	"regexp"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/google/go-cmp/cmp"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/selkies-project/packer-plugin-selkies/e2e/machine"
	"github.com/selkies-project/packer-plugin-selkies/e2e/nodestate"
	"github.com/selkies-project/packer-plugin-selkies/injector/report"
	"github.com/selkies-project/packer-plugin-selkies/manifest"
)

// TestRace lets two injectors and a pull of the same image run at once.
func TestRace(t *testing.T) {
	onEach(t, func(t *testing.T, n *node) {
		n.attach(t, world.first, cacheDir)
		empty := n.settled(t, false)
		for range 5 {
			var wg sync.WaitGroup
			for range 2 {
				wg.Go(func() {
					if _, err := n.Run(t.Context(), "selkies-image-injector", "inject", "--runtime", "containerd", "--cache", cacheDir); err != nil {
						t.Error(err)
					}
				})
			}
			wg.Go(func() { n.pull(t, ref(app1)) })
			wg.Wait()
			if t.Failed() {
				return
			}
			n.listed(t, ref(sandbox))
			n.settled(t, false)
			p := n.mustRun(t, "race", ref(app1))
			if got := p.sh(t, "cat /version /data/owned /opaque/*"); got != "1ownednew" {
				t.Errorf("in the container: %q", got)
			}
			p.remove(t)
			n.eject(t)
			for _, img := range []string{app1, stable, sandbox, single} {
				n.removeImage(t, ref(img))
			}
			n.eject(t)
			if diff := cmp.Diff(empty, n.settled(t, false)); diff != "" {
				t.Fatalf("left over: %s", diff)
			}
		}
	})
}

// TestReboot reboots the node: without its disk containers fail with an error,
// with it they run, and nothing is registered anew. Blobs that the disk keeps are there again
// too.
func TestReboot(t *testing.T) {
	onEach(t, func(t *testing.T, n *node) {
		detach := n.attach(t, world.second, cacheDir)
		n.inject(t, cacheDir)
		n.listed(t, ref(sandbox))
		n.listed(t, ref(app1))
		// Of the same image, with no sandbox that would fail first.
		n.Output(t, "ctr", "-n", n.ns, "containers", "create", ref(app1), "earlier", "/bin/busybox", "grep", "-qx", "1", "/version")
		before := n.settled(t, true)

		n.disconnect()
		if err := n.Reboot(t.Context()); err != nil {
			t.Fatal(err)
		}
		detach()
		n.connect(t)
		n.listed(t, ref(app1))
		p, err := n.run(t, "no-disk", ref(app1))
		if err == nil {
			out := p.sh(t, "ls /")
			t.Fatalf("a container started without the disk and sees %q", out)
		}
		if !strings.Contains(err.Error(), "no such file or directory") {
			t.Errorf("without the disk: %v", err)
		}
		for _, cmd := range [][]string{{"tasks", "start", "earlier"}, {"run", "--rm", ref(app1), "new", "/bin/busybox", "cat", "/version"}} {
			if out, err := n.Run(t.Context(), append([]string{"ctr", "-n", n.ns}, cmd...)...); err == nil || !strings.Contains(err.Error(), "no such file or directory") {
				t.Errorf("ctr %v without the disk said %q: %v", cmd, out, err)
			}
		}
		if _, err := n.Run(t.Context(), "selkies-image-injector", "status", "--runtime", "containerd"); err == nil || !strings.Contains(err.Error(), "disk not readable") {
			t.Errorf("status without the disk: %v", err)
		}

		n.attach(t, world.second, cacheDir)
		// The mount alone brings the images back, whoever makes it.
		fs := n.anchor(t)
		n.Output(t, "mount", "--bind", cacheDir, fs)
		p = n.mustRun(t, "by-hand", ref(app1))
		p.remove(t)
		n.Output(t, "umount", fs)

		r := n.inject(t, cacheDir)
		if d := r.Disks[0]; d.Registered != 0 {
			t.Errorf("registered anew: %+v", d)
		}
		after := n.settled(t, true)
		if diff := cmp.Diff(before, after); diff != "" {
			t.Errorf("the disk is back, and inject changed more than the mount: %s", diff)
		}
		// By the exit status: ctr 1.6 may lose what a program prints that ends at once.
		n.Output(t, "ctr", "-n", n.ns, "tasks", "start", "earlier")
		n.Output(t, "ctr", "-n", n.ns, "containers", "delete", "earlier")
		p = n.mustRun(t, "back", ref(app1))
		if got := p.sh(t, "cat /version /data/owned"); got != "1owned" {
			t.Errorf("in the container: %q", got)
		}
		p.remove(t)
		n.checkBlobs(t)
		t.Run("a directory without a record", func(t *testing.T) { forgotten(t, n) })
	})
}

// checkBlobs has containerd give every blob that it says it has.
func (n *node) checkBlobs(t *testing.T) {
	t.Helper()
	out := n.Output(t, "sh", "-ec", "for d in $(ctr -n "+n.ns+" content ls -q); do echo $d $(ctr -n "+n.ns+" content get $d | sha256sum); done")
	for line := range strings.Lines(out) {
		if f := strings.Fields(line); f[0] != "sha256:"+f[1] {
			t.Errorf("blob %s hashes to %s", f[0], f[1])
		}
	}
	for _, d := range world.added {
		if !strings.Contains(out, d) {
			t.Errorf("no blob %s", d)
		}
	}
}

// forgotten has containerd find the directory of a snapshot that it is about to make, as
// when it was killed or the node lost its power while it made one: inject goes on, where
// a pull fails once.
func forgotten(t *testing.T, n *node) {
	clean := n.settled(t, false)
	again := func(when string) {
		t.Helper()
		n.forget(t)
		n.inject(t, cacheDir)
		n.release(t)
		if diff := cmp.Diff(clean, n.settled(t, false)); diff != "" {
			t.Errorf("%s: %s", when, diff)
		}
	}
	n.eject(t)
	again("at the anchor")
	n.removeImage(t, ref(single))
	again("at a layer")

	n.eject(t)
	n.forget(t)
	pull := func() error {
		_, err := n.images().PullImage(t.Context(), &cri.PullImageRequest{Image: &cri.ImageSpec{Image: ref(app1)}})
		return err
	}
	if err := pull(); err == nil || !strings.Contains(err.Error(), "file exists") {
		t.Errorf("the pull that finds the directory: %v", err)
	}
	if err := pull(); err != nil {
		t.Errorf("the next pull: %v", err)
	}
	n.release(t)
}

// forget makes the directory of the next snapshot.
func (n *node) forget(t *testing.T) {
	t.Helper()
	check(t, nodestate.Collect(n.context(t), n.ctrd)) // else it may take the directory away
	root := snapshots.WithLabels(map[string]string{"containerd.io/gc.root": time.Now().UTC().Format(time.RFC3339)})
	mounts, err := n.ctrd.SnapshotService("overlayfs").Prepare(n.context(t), lastKey, "", root)
	check(t, err)
	var id int
	if _, err := fmt.Sscanf(mounts[0].Source, snapshotsDir+"/%d/fs", &id); err != nil {
		t.Fatalf("%s: %v", mounts[0].Source, err)
	}
	dir := fmt.Sprintf("%s/%d", snapshotsDir, id+1)
	n.Output(t, "mkdir", "-p", dir+"/fs", dir+"/work")
}

// release removes the snapshot that forget has made to see the number of the next.
func (n *node) release(t *testing.T) {
	t.Helper()
	check(t, n.ctrd.SnapshotService("overlayfs").Remove(n.context(t), lastKey))
}

const lastKey = "last"

// TestGenerations replaces a disk by a newer one.
func TestGenerations(t *testing.T) {
	const newer = "/mnt/disks/newer"
	onEach(t, func(t *testing.T, n *node) {
		detach := n.attach(t, world.first, cacheDir)
		n.attach(t, world.second, newer)
		empty := n.settled(t, false)
		first := n.inject(t, cacheDir).Disks[0].CacheID
		both := n.inject(t, cacheDir, newer)
		if both.Disks[0].Dir != newer || both.Disks[0].Registered != 1 || both.Disks[0].Present != 5 {
			t.Errorf("both: %+v", both)
		}
		for _, img := range both.Disks[1].Images {
			if img.State != report.Skipped || !strings.Contains(img.Reason, "comes from the newer cache "+both.Disks[0].CacheID.Encoded()[:12]) {
				t.Errorf("of the older disk: %+v", img)
			}
		}
		settled := n.settled(t, true)
		table := n.Output(t, "selkies-image-injector", "inject", "--runtime", "containerd", "--cache", cacheDir, "--cache", newer)
		if !regexp.MustCompile(regexp.QuoteMeta(ref(single)) + ` .* skipped .* comes from the newer cache`).MatchString(table) {
			t.Errorf("the table does not say what was skipped and why:\n%s", table)
		}
		if diff := cmp.Diff(settled, n.settled(t, true)); diff != "" {
			t.Errorf("both again: %s", diff)
		}

		if r := n.eject(t, first.Encoded()[:12]); len(r.Kept) != 0 || len(r.Images) != 0 {
			t.Errorf("eject of the older: %+v", r)
		}
		n.Output(t, "umount", cacheDir)
		if out := n.Output(t, "grep", "-c", "selkies\\|/fs ", "/proc/1/mountinfo"); strings.TrimSpace(out) == "0" {
			t.Error("the newer disk is not mounted")
		}
		detach()
		n.listed(t, ref(sandbox))
		for _, img := range []string{app1, app2} {
			p := n.mustRun(t, "handed-over", ref(img))
			if got := p.sh(t, "cat /data/owned"); got != "owned" {
				t.Errorf("%s: in the container: %q", img, got)
			}
			p.remove(t)
		}
		n.eject(t)
		if diff := cmp.Diff(empty, n.settled(t, false)); diff != "" {
			t.Errorf("eject left something: %s", diff)
		}

		// The older disk is lost, and never ejected.
		detach = n.attach(t, world.first, cacheDir)
		n.inject(t, cacheDir)
		n.settled(t, false)
		n.Output(t, "umount", n.anchor(t), cacheDir)
		detach()
		n.inject(t, newer)
		n.settled(t, false)
		n.listed(t, ref(sandbox))
		p := n.mustRun(t, "lost", ref(app1))
		if got := p.sh(t, "cat /data/owned"); got != "owned" {
			t.Errorf("in the container: %q", got)
		}
		p.remove(t)
		n.eject(t)
		if got := n.settled(t, false); !slices.Equal(empty, got) {
			t.Errorf("eject left something: %s", cmp.Diff(empty, got))
		}
	})
}

// TestDeadDisk has a disk whose device fails every read, while the kernel goes on
// answering from memory.
func TestDeadDisk(t *testing.T) {
	const newer = "/mnt/disks/newer"
	onEach(t, func(t *testing.T, n *node) {
		disk := changed(t, world.first, func(*testing.T, string) {})
		n.attach(t, disk, cacheDir)
		n.attach(t, world.second, newer)
		id := n.inject(t, cacheDir).Disks[0].CacheID
		check(t, os.Truncate(disk, 0))

		out, err := n.Run(t.Context(), "selkies-image-injector", "--runtime", "containerd", "--output", "json", "status")
		if err == nil || !strings.Contains(err.Error(), "cache "+id.Encoded()[:12]+": disk not readable") {
			t.Errorf("status says %v", err)
		}
		var regs []report.Registration
		check(t, json.Unmarshal([]byte(out), &regs))
		for _, r := range regs {
			if r.Readable {
				t.Errorf("status says that %s is readable", r.Names)
			}
		}
		// The newer disk heals what it has.
		n.inject(t, newer)
		p := n.mustRun(t, "healed", ref(app1))
		if got := p.sh(t, "cat /data/owned"); got != "owned" {
			t.Errorf("in the container: %q", got)
		}
		p.remove(t)
		if err := n.injector(t, &regs, "status"); err != nil {
			t.Error(err)
		}
	})
}

// TestGenerationsWithBlobs hands the links of layer blobs from one generation to the
// next, when the older is ejected and when its disk is lost.
func TestGenerationsWithBlobs(t *testing.T) {
	const newer = "/mnt/disks/newer"
	third := changed(t, world.second, edited(func(m *manifest.Manifest) { m.Created = m.Created.AddDate(0, 1, 0) }))
	n := newNode(t, machine.Upstream)
	detach := n.attach(t, world.second, cacheDir)
	n.attach(t, third, newer)
	empty := n.settled(t, false)
	readable := func(when string) {
		t.Helper()
		dir := stateDir + "/io.containerd.content.v1.content/blobs/sha256"
		if out := n.Output(t, "sh", "-c", "cd "+dir+"; ls | wc -l; cat * | wc -c; for f in *; do [ -e $f ] || echo $f; done"); strings.Count(out, "\n") != 2 || strings.HasPrefix(out, "0") {
			t.Errorf("blobs %s: %s", when, out)
		}
	}

	older := n.inject(t, cacheDir).Disks[0].CacheID
	readable("of the older")
	n.inject(t, newer)
	n.settled(t, false)
	n.eject(t, older.String())
	readable("after eject of the older")
	n.eject(t)
	if diff := cmp.Diff(empty, n.settled(t, false)); diff != "" {
		t.Errorf("eject left something: %s", diff)
	}

	n.inject(t, cacheDir)
	n.settled(t, false)
	n.Output(t, "umount", n.anchor(t), cacheDir)
	detach()
	n.inject(t, newer)
	readable("after the older disk is lost")
	n.settled(t, false)
	n.eject(t)
	if diff := cmp.Diff(empty, n.settled(t, false)); diff != "" {
		t.Errorf("eject left something: %s", diff)
	}
}
