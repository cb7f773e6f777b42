//go:build e2e

package containerd_test

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/selkies-project/packer-plugin-selkies/e2e/cachedisk"
	"github.com/selkies-project/packer-plugin-selkies/e2e/machine"
	"github.com/selkies-project/packer-plugin-selkies/injector/report"
	"github.com/selkies-project/packer-plugin-selkies/manifest"
)

func onEach(t *testing.T, f func(t *testing.T, n *node)) {
	for _, release := range []machine.Release{machine.Debian, machine.Upstream} {
		t.Run(string(release), func(t *testing.T) { f(t, newNode(t, release)) })
	}
}

// TestLifecycle goes the whole way of a cache disk on a node: registered, run,
// pulled over, ejected.
func TestLifecycle(t *testing.T) {
	onEach(t, lifecycle)
}

func lifecycle(t *testing.T, n *node) {
	before := cachedisk.Checksum(t, world.first)
	n.attach(t, world.first, cacheDir)
	empty := n.settled(t, false)

	if err := world.reg.Stop(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := world.reg.Start(); err != nil {
			t.Error(err)
		}
	})
	var plan report.Inject
	if err := n.injector(t, &plan, "plan", "--cache", cacheDir); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(empty, n.settled(t, false)); diff != "" {
		t.Errorf("plan changed something: %s", diff)
	}
	r := n.inject(t, cacheDir)
	if planned := plan.Disks[0]; planned.Registered != r.Disks[0].Registered || len(planned.Images) != len(r.Disks[0].Images) {
		t.Errorf("planned %+v, done %+v", plan, r)
	}
	if d := r.Disks[0]; d.Registered != 5 || d.Present != 0 || len(d.Images) != 3 {
		t.Errorf("report: %+v", r)
	}

	t.Run("the CRI lists it", func(t *testing.T) {
		var img *cri.Image
		// It learns of one name after the other.
		wait(t, "the CRI to list tags and digest", func() error {
			img = n.listed(t, ref(app1))
			slices.Sort(img.RepoTags)
			if !slices.Equal(img.RepoTags, []string{ref(app1), ref(stable)}) || len(img.RepoDigests) != 1 {
				return fmt.Errorf("tags %v, digests %v", img.RepoTags, img.RepoDigests)
			}
			return nil
		})
		if !strings.HasPrefix(img.RepoDigests[0], world.reg.Addr+"/test/app@sha256:") {
			t.Errorf("digests: %v", img.RepoDigests)
		}
		if n.config.Release == machine.Upstream && !img.Pinned {
			t.Error("not pinned")
		}
		_, digest, _ := strings.Cut(img.RepoDigests[0], "@")
		for _, name := range []string{img.RepoDigests[0], ref(app1) + "@" + digest} {
			if got := n.listed(t, name); got.Id != img.Id {
				t.Errorf("as %s it is %s, by tag %s", name, got.Id, img.Id)
			}
			n.listed(t, ref(sandbox))
			n.mustRun(t, "by-name", name).remove(t)
		}
	})

	clean := n.settled(t, false)
	t.Run("twice", func(t *testing.T) {
		times := n.state(t, true)
		r := n.inject(t, cacheDir)
		for _, img := range r.Disks[0].Images {
			if img.State != report.Present {
				t.Errorf("%v is %s: %s", img.Names, img.State, img.Reason)
			}
		}
		if diff := cmp.Diff(times, n.settled(t, true)); diff != "" {
			t.Errorf("the second run changed something: %s", diff)
		}
	})

	t.Run("image IDs that an interrupted eject has removed", func(t *testing.T) {
		n.Output(t, "sh", "-ec", "ctr -n "+n.ns+" images rm $(ctr -n "+n.ns+" images ls -q | grep ^sha256:)")
		if diff := cmp.Diff(clean, n.settled(t, false)); diff == "" {
			t.Error("no image ID was removed")
		}
		n.inject(t, cacheDir)
		if diff := cmp.Diff(clean, n.settled(t, false)); diff != "" {
			t.Errorf("after inject: %s", diff)
		}
	})

	t.Run("runs without a registry", func(t *testing.T) {
		n.listed(t, ref(sandbox))
		p := n.mustRun(t, "offline", ref(app1))
		if got := p.sh(t, "cat /version; echo; ls /data /opaque; id -u; stat -c %u /data/owned"); got != "1\n/data:\nowned\n\n/opaque:\nnew\n0\n1000" {
			t.Errorf("in the container: %q", got)
		}
		p.sh(t, "echo more >> /data/owned && rm /version && mkdir /opaque/dir")

		var answers []report.Reference
		if err := n.injector(t, &answers, "plan", "--cache", cacheDir, ref(app1), ref(app2), ref("other/thing:1")); err != nil {
			t.Fatal(err)
		}
		for i, want := range []report.Cover{report.Hit, report.Miss, report.Miss} {
			if answers[i].Cover != want {
				t.Errorf("plan: %+v, want %s", answers[i], want)
			}
		}
		if !strings.HasSuffix(answers[1].Reason, "; a pull may find layers of "+ref(app1)) || strings.Contains(answers[2].Reason, "may") {
			t.Errorf("plan: %+v", answers[1:])
		}

		running := n.settled(t, true)
		if _, err := n.Run(t.Context(), "selkies-image-injector", "eject", "--runtime", "containerd"); err == nil || !strings.Contains(err.Error(), "container main of pod test/offline") {
			t.Errorf("eject while a container runs: %v", err)
		}
		if diff := cmp.Diff(running, n.settled(t, true)); diff != "" {
			t.Errorf("eject refused, and changed something: %s", diff)
		}
		n.Refused(t, 2, []string{"selkies-image-injector", "eject", "--runtime", "containerd", digest.FromString("another").String()}, "nothing is registered from such a cache")
		var status []report.Registration
		if err := n.injector(t, &status, "status"); err != nil {
			t.Fatal(err)
		}
		if len(status) != 3 || !status[0].Readable || len(status[0].Names) != 3 {
			t.Errorf("status: %+v", status)
		}
		p.remove(t)
	})

	if err := world.reg.Start(); err != nil {
		t.Fatal(err)
	}
	t.Run("a pull of the same tag", func(t *testing.T) {
		world.reg.Reset()
		n.pull(t, ref(app1))
		if c := world.reg.Reset(); c.BlobGets != 0 || c.BlobHeads != 0 {
			t.Errorf("asked of the registry: %+v", c)
		}
		// The pull may have replaced our labels; inject puts them back.
		n.inject(t, cacheDir)
		if diff := cmp.Diff(clean, n.settled(t, false)); diff != "" {
			t.Errorf("after the pull and inject: %s", diff)
		}
	})
	t.Run("a newer tag fetches what it adds", func(t *testing.T) {
		world.reg.Reset()
		n.pull(t, ref(app2))
		slices.Sort(world.added)
		got := world.reg.Reset().Blobs
		if slices.Sort(got); !slices.Equal(got, world.added) {
			t.Errorf("blobs fetched: %v, want the config and the one layer %v", got, world.added)
		}
		p := n.mustRun(t, "newer", ref(app2))
		if got := p.sh(t, "cat /version /data/owned"); got != "2owned" {
			t.Errorf("in the container: %q", got)
		}
		p.remove(t)

		r := n.eject(t)
		if len(r.Kept) != 1 || !strings.Contains(r.Kept[0], ref(app2)) {
			t.Errorf("eject under a newer image: %+v", r)
		}
		again := n.mustRun(t, "kept", ref(app2))
		if got := again.sh(t, "cat /version /data/owned"); got != "2owned" {
			t.Errorf("in the container, after eject: %q", got)
		}
		again.remove(t)
		n.inject(t, cacheDir)
		n.removeImage(t, ref(app2))
		if diff := cmp.Diff(clean, n.settled(t, false)); diff != "" {
			t.Errorf("after the newer image is gone: %s", diff)
		}
	})

	t.Run("the CRI removes an image", func(t *testing.T) {
		n.removeImage(t, ref(app1))
		n.inject(t, cacheDir)
		if diff := cmp.Diff(clean, n.settled(t, false)); diff != "" {
			t.Errorf("removed and injected again: %s", diff)
		}
	})
	t.Run("the CRI removes all images", func(t *testing.T) {
		for _, img := range []string{app1, stable, single, sandbox} {
			n.removeImage(t, ref(img))
		}
		// Only eject removes the anchor and the mount on it.
		isAnchor := func(line string) bool {
			return strings.HasPrefix(line, "snapshot selkies-image-cache-sha256:") || strings.HasSuffix(line, " mounts below snapshots")
		}
		want, got := slices.DeleteFunc(slices.Clone(empty), isAnchor), slices.DeleteFunc(n.settled(t, false), isAnchor)
		if diff := cmp.Diff(want, got); diff != "" {
			t.Errorf("left over: %s", diff)
		}
		if r := n.inject(t, cacheDir); r.Disks[0].Registered != 5 {
			t.Errorf("inject again: %+v", r)
		}
		if diff := cmp.Diff(clean, n.settled(t, false)); diff != "" {
			t.Errorf("injected again: %s", diff)
		}
	})

	if r := n.eject(t); r.Layers != 5 || len(r.Kept) != 0 {
		t.Errorf("eject: %+v", r)
	}
	if diff := cmp.Diff(empty, n.settled(t, false)); diff != "" {
		t.Errorf("eject left something: %s", diff)
	}
	if after := cachedisk.Checksum(t, world.first); after != before {
		t.Error("the cache disk has changed")
	}
}

// TestNodeWins injects where the node has another image under one of the names, and where
// another namespace has the blobs of one, which containerd keeps once for all.
func TestNodeWins(t *testing.T) {
	onEach(t, func(t *testing.T, n *node) {
		n.attach(t, world.first, cacheDir)
		n.pull(t, ref(app2))
		n.ctr(t, "images", "tag", ref(app2), ref(app1))
		n.Output(t, "ctr", "-n", "other", "images", "pull", "--plain-http", ref(single))
		before := n.settled(t, false)
		r := n.inject(t, cacheDir)
		i := slices.IndexFunc(r.Disks[0].Images, func(i report.Image) bool { return slices.Contains(i.Names, ref(app1)) })
		if img := r.Disks[0].Images[i]; img.State != report.Registered || !strings.Contains(img.Reason, ref(app1)+" is ") {
			t.Errorf("report: %+v", img)
		}
		if got := n.listed(t, ref(app1)); got.Id != n.listed(t, ref(app2)).Id {
			t.Error("inject replaced the node's image")
		}
		n.listed(t, ref(stable))
		n.listed(t, ref(single))
		n.eject(t)
		if diff := cmp.Diff(before, n.settled(t, false)); diff != "" {
			t.Errorf("left over: %s", diff)
		}
	})
}

// TestShortNames runs an image of Docker Hub by the names that pods give it.
func TestShortNames(t *testing.T) {
	disk := changed(t, world.first, edited(func(m *manifest.Manifest) {
		img := image(m, ref(single))
		img.Names = []string{"docker.io/library/single:1", "docker.io/library/single@" + img.Target().Digest.String()}
	}))
	onEach(t, func(t *testing.T, n *node) {
		n.attach(t, disk, cacheDir)
		n.inject(t, cacheDir)
		n.listed(t, ref(sandbox))
		id := n.listed(t, "docker.io/library/single:1").Id
		for _, name := range []string{"single:1", "library/single:1", "docker.io/single:1"} {
			if got := n.listed(t, name); got.Id != id {
				t.Errorf("%s is %s, want %s", name, got.Id, id)
			}
			n.mustRun(t, "short", name).remove(t)
			var answers []report.Reference
			if err := n.injector(t, &answers, "plan", "--cache", cacheDir, name); err != nil {
				t.Fatal(err)
			}
			if answers[0].Cover != report.Hit {
				t.Errorf("plan: %+v", answers)
			}
		}
	})
}

// TestPrivateMount injects as a pod would: with a mount namespace of its own, in
// which alone the disk is mounted, and the host's root elsewhere. The pod goes,
// the disk stays readable, and eject lets go of it.
func TestPrivateMount(t *testing.T) {
	onEach(t, func(t *testing.T, n *node) {
		detach := n.attach(t, world.first, cacheDir)
		device := strings.TrimSpace(n.Output(t, "findmnt", "-n", "-o", "SOURCE", cacheDir))
		n.Output(t, "umount", cacheDir)
		empty := n.settled(t, false)
		asPod := func(command string) {
			t.Helper()
			n.Output(t, "unshare", "--mount", "--propagation", "private", "sh", "-ec",
				"mkdir -p /host /cache; mount -o ro,noload "+device+" /cache; mount --rbind / /host; mount -t tmpfs none /var/lib/containerd; "+
					"selkies-image-injector "+command+" --runtime containerd --host-root /host --containerd-address /host/run/containerd/containerd.sock")
		}
		asPod("inject --cache /cache")
		n.listed(t, ref(sandbox))
		n.listed(t, ref(app1))
		p := n.mustRun(t, "private", ref(app1))
		if got := p.sh(t, "cat /version /data/owned"); got != "1owned" {
			t.Errorf("in the container: %q", got)
		}
		p.remove(t)
		n.settled(t, false)
		asPod("status")
		asPod("eject")
		if diff := cmp.Diff(empty, n.settled(t, false)); diff != "" {
			t.Errorf("eject left something: %s", diff)
		}
		detach()
		if out, err := os.ReadFile("/sys/block/" + filepath.Base(device) + "/loop/backing_file"); err == nil && strings.TrimSpace(string(out)) == world.first {
			t.Error("something still holds the disk")
		}
	})
}
