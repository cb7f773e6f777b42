//go:build e2e

package docker_test

import (
	"encoding/json"
	"fmt"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/selkies-project/packer-plugin-selkies/e2e/cachedisk"
	"github.com/selkies-project/packer-plugin-selkies/e2e/machine"
	"github.com/selkies-project/packer-plugin-selkies/e2e/treediff"
	"github.com/selkies-project/packer-plugin-selkies/injector/report"
)

// TestLife is the life of the catalogue's images on a node: registered, used in
// every way, removed, ejected.
func TestLife(t *testing.T) {
	sum := cachedisk.Checksum(t, world.first.image)
	for _, r := range releases {
		t.Run(r.name, func(t *testing.T) {
			n := newNode(t, r.docker)
			life(t, n)
		})
	}
	if cachedisk.Checksum(t, world.first.image) != sum {
		t.Error("the cache disk was written to")
	}
}

func life(t *testing.T, n *node) {
	// What a normal pull gives.
	trees, inspects := map[string]treediff.Tree{}, map[string]map[string]any{}
	for _, image := range world.refs {
		n.Output(t, "docker", "pull", "-q", image)
		trees[image] = n.tree(t, image)
	}
	for _, image := range world.refs {
		inspects[image] = n.inspect(t, image)
	}
	listed := n.images(t)
	n.fresh(t)
	before := n.store(t)
	n.attach(t, world.first.image, cacheDir)
	if err := world.reg.Stop(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := world.reg.Start(); err != nil && !strings.Contains(err.Error(), "running") {
			t.Log(err)
		}
	})

	var registered treediff.Tree
	t.Run("plan", func(t *testing.T) {
		var refs []report.Reference
		if err := n.injector(t, &refs, "plan", ref("oci:latest"), ref("nothing:1")); err != nil {
			t.Fatal(err)
		}
		if refs[0].Cover != report.Hit || refs[1].Cover != report.Miss {
			t.Errorf("plan says %+v", refs)
		}
		same(t, "after plan", before, n.store(t))
	})
	t.Run("inject", func(t *testing.T) {
		r := n.inject(t)
		t.Logf("%d ms", r.Milliseconds)
		if d := r.Disks[0]; d.Registered != len(world.first.manifest.Layers) || d.Present != 0 {
			t.Errorf("%d layers registered and %d present, want all %d registered", d.Registered, d.Present, len(world.first.manifest.Layers))
		}
		for _, img := range r.Disks[0].Images {
			if img.State != report.Registered || img.Reason != "" {
				t.Errorf("%s is %s: %s", img.Names, img.State, img.Reason)
			}
		}
		registered = n.store(t)
	})
	t.Run("inject twice", func(t *testing.T) {
		pid := n.pid(t)
		r := n.inject(t)
		if r.Restart || r.Disks[0].Registered != 0 || slices.ContainsFunc(r.Disks[0].Images, func(i report.Image) bool { return i.State != report.Present }) {
			t.Errorf("the second run says %+v", r.Disks[0])
		}
		if n.pid(t) != pid {
			t.Error("the second run restarted docker")
		}
		same(t, "after the second run", registered, n.store(t))
	})
	t.Run("use without a registry", func(t *testing.T) {
		for _, image := range world.refs {
			if diff := cmp.Diff(inspects[image], n.inspect(t, image)); diff != "" {
				t.Errorf("docker inspect %s differs from a pulled image's (-pulled +injected):\n%s", image, diff)
			}
			n.hello(t, image)
			same(t, image, trees[image], n.tree(t, image))
		}
		if diff := cmp.Diff(listed, n.images(t)); diff != "" {
			t.Errorf("docker images (-pulled +injected):\n%s", diff)
		}
		n.hello(t, ref("oci:latest")+"@"+digestOf(t, ref("oci:latest")))
		n.hello(t, ref("platforms:latest")+"@"+digestOf(t, ref("platforms:latest")))
	})
	t.Run("eject of another cache", func(t *testing.T) {
		n.Refused(t, 2, []string{"selkies-image-injector", "--runtime", "docker", "eject", digest.FromString("another").String()}, "nothing is registered from such a cache")
	})
	t.Run("status", func(t *testing.T) {
		var regs []report.Registration
		if err := n.injector(t, &regs, "status"); err != nil {
			t.Fatal(err)
		}
		// Docker knows an image by its config: two manifests may have the same.
		ids := map[string]bool{}
		for _, img := range world.first.manifest.Images {
			ids[img.Config.Digest.String()] = true
		}
		if len(regs) != len(ids) {
			t.Errorf("%d images, want %d", len(regs), len(ids))
		}
		for _, r := range regs {
			if !r.Readable {
				t.Errorf("%s: %s", r.Names, r.Problem)
			}
		}
	})
	t.Run("save", func(t *testing.T) {
		for _, image := range world.refs {
			n.saves(t, image)
		}
	})
	t.Run("build on top", func(t *testing.T) {
		n.builds(t, "0", ref("oci:latest"))
		n.Output(t, "docker", "run", "--name", "changed", "--network", "none", ref("odd-files:latest"), "/bin/busybox", "touch", "/committed")
		if out := n.Output(t, "docker", "diff", "changed"); out != "A /committed\n" {
			t.Errorf("docker diff says %q", out)
		}
		n.Output(t, "docker", "commit", "changed", "committed")
		n.Output(t, "docker", "rm", "changed")
		n.hello(t, "committed")
		n.Output(t, "docker", "rmi", "built", "committed")
	})
	t.Run("rmi", func(t *testing.T) {
		// Moby 29's save holds layers until it restarts, pulled ones too (see
		// TestSaveKeepsLayers).
		n.Output(t, "systemctl", "restart", "docker.service")
		for _, image := range world.refs {
			n.Output(t, "docker", "rmi", image)
		}
		n.wait(t, "layers are left over", func() bool {
			n.Output(t, "docker", "image", "prune", "-af")
			layers, _ := filepath.Glob(n.Path(dataRoot + "/image/overlay2/layerdb/sha256/*"))
			dirs, _ := filepath.Glob(n.Path(dataRoot + "/overlay2/*"))
			links, _ := filepath.Glob(n.Path(dataRoot + "/overlay2/l/*"))
			return len(layers) == 0 && len(dirs) == 1 && len(links) == 0
		})
		n.inject(t)
		same(t, "registered again", registered, n.store(t))
	})
	t.Run("a newer tag shares layers", func(t *testing.T) {
		if err := world.reg.Start(); err != nil {
			t.Fatal(err)
		}
		world.reg.Reset()
		n.Output(t, "docker", "pull", "-q", world.newer)
		if c := world.reg.Count(); c.BlobGets != 2 {
			t.Errorf("the pull fetched %v, want the config and one layer", c.Blobs)
		}
		n.hello(t, world.newer)
		n.Output(t, "docker", "rmi", world.newer)
		world.reg.Reset()
		n.Output(t, "docker", "pull", "-q", ref("shared:1"))
		if c := world.reg.Count(); c.BlobGets != 0 {
			t.Errorf("the pull of a registered tag fetched %v", c.Blobs)
		}
	})
	t.Run("eject", func(t *testing.T) {
		n.Output(t, "docker", "run", "-d", "--name", "user", "--network", "none", ref("oci:latest"), "/bin/sleep", "1000")
		used := n.store(t)
		n.refused(t, []string{"eject"}, "user", "docker rm")
		same(t, "after a refused eject", used, n.store(t))
		n.Output(t, "docker", "rm", "-f", "user")

		n.Output(t, "docker", "tag", ref("oci:latest"), "mine")
		if r := n.eject(t); len(r.Kept) == 0 {
			t.Errorf("nothing is kept of an image that has another tag: %+v", r)
		}
		n.hello(t, "mine")
		n.Output(t, "docker", "rmi", "mine")
		n.eject(t)
		after := n.store(t)
		// The pull of the newer tag left its own metadata, as dockerd does.
		for name := range after {
			if _, ok := before[name]; !ok && strings.Contains(name, "/distribution/") {
				delete(after, name)
			}
		}
		same(t, "after eject", before, after)
	})
	// Last, since BuildKit removes what it has built in its own time, and what a restart
	// of Docker keeps it from removing stays on the disk for ever.
	t.Run("build on top by BuildKit", func(t *testing.T) {
		n.inject(t)
		n.builds(t, "1", ref("oci:latest"))
	})
}

// images is what docker images lists, without what depends on the day.
func (n *node) images(t *testing.T) []string {
	t.Helper()
	out := n.Output(t, "docker", "images", "--digests", "--no-trunc", "--format", "{{.Repository}} {{.Tag}} {{.Digest}} {{.ID}} {{.Size}}")
	return slices.Sorted(strings.Lines(out))
}

// digestOf is the digest that a tag stands for on the first disk.
func digestOf(t *testing.T, tag string) string {
	t.Helper()
	for _, img := range world.first.manifest.Images {
		if slices.Contains(img.Names, tag) {
			return img.Target().Digest.String()
		}
	}
	t.Fatalf("no %s on the first disk", tag)
	return ""
}

// builds builds an image on top of one, with BuildKit or without ("1" or "0").
func (n *node) builds(t *testing.T, buildKit, base string) {
	t.Helper()
	if err := n.build(t, buildKit, base); err != nil {
		t.Fatal(err)
	}
	if out := n.Output(t, "docker", "run", "--rm", "--network", "none", "built", "/bin/busybox", "cat", "/both"); out != "new\nhello\n" {
		t.Errorf("the built image has %q", out)
	}
}

// build builds an image on top of another.
func (n *node) build(t *testing.T, buildKit, base string) error {
	_, err := n.Run(t.Context(), "sh", "-ec", fmt.Sprintf(`mkdir -p /tmp/build; cd /tmp/build; echo new >file
		printf 'FROM %s\nCOPY file /file\nRUN ["/bin/busybox", "sh", "-c", "cat /file /greeting >/both"]\n' >Dockerfile
		DOCKER_BUILDKIT=%s docker build -q --network none -t built .`, base, buildKit))
	return err
}

// saves saves an image and checks every layer of the archive.
func (n *node) saves(t *testing.T, image string) {
	t.Helper()
	n.Output(t, "docker", "save", "-o", "/tmp/saved.tar", image)
	img, err := tarball.ImageFromPath(n.Path("/tmp/saved.tar"), nil)
	if err != nil {
		t.Fatal(err)
	}
	checkLayers(t, image, img)
}

// checkLayers hashes a saved image's layers.
func checkLayers(t *testing.T, what string, img v1.Image) {
	t.Helper()
	config, err := img.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	layers, err := img.Layers()
	if err != nil {
		t.Fatal(err)
	}
	for i, l := range layers {
		r, err := l.Uncompressed()
		if err != nil {
			t.Fatal(err)
		}
		h, _, err := v1.SHA256(r)
		r.Close()
		if err != nil {
			t.Fatal(err)
		}
		if h != config.RootFS.DiffIDs[i] {
			t.Errorf("%s: saved layer %d is %s, not %s", what, i, h, config.RootFS.DiffIDs[i])
		}
	}
}

// TestEjectClean removes what was registered on a node that never pulled.
func TestEjectClean(t *testing.T) {
	for _, release := range releases {
		t.Run(release.name, func(t *testing.T) {
			n := newNode(t, release.docker)
			before := n.store(t)
			n.attach(t, world.first.image, cacheDir)
			n.inject(t)
			r := n.eject(t)
			if r.Layers != len(world.first.manifest.Layers) || len(r.Kept) != 0 {
				t.Errorf("%d layers ejected and %v kept, want %d and nothing", r.Layers, r.Kept, len(world.first.manifest.Layers))
			}
			same(t, "after eject", before, n.store(t))

			n.inject(t)
			n.unfinish(t)
			if r := n.eject(t); len(r.Kept) != 0 {
				t.Errorf("%v is kept", r.Kept)
			}
			same(t, "after eject of what was not finished", before, n.store(t))
		})
	}
}

// unfinish leaves of an inject what one leaves that is cut off while it registers
// layers: none of its images, and of the layers those that others lie on.
func (n *node) unfinish(t *testing.T) {
	t.Helper()
	n.stop(t)
	n.Output(t, "sh", "-ec", `cd /var/lib/docker/image/overlay2
		mkdir -p selkies-image-cache/staging/layerdb
		for layer in layerdb/sha256/*; do
			grep -qs "${layer##*/}" layerdb/sha256/*/parent || echo "$layer"
		done | xargs mv -t selkies-image-cache/staging/layerdb
		rm imagedb/content/sha256/*
		printf '{"Repositories":{}}' >repositories.json`)
	n.start(t)
}

// TestSaveKeepsLayers saves an image that has a layer twice. Moby 29 does not release
// the second one (saveLayer in its daemon/internal/image/tarexport/save.go), so that
// eject cannot remove it: its remedy has to work.
func TestSaveKeepsLayers(t *testing.T) {
	n := newNode(t, machine.Upstream)
	before := n.store(t)
	n.attach(t, world.first.image, cacheDir)
	n.inject(t)
	n.saves(t, ref("same-layer-twice:latest"))
	if r := n.eject(t); len(r.Kept) > 0 {
		t.Logf("kept: %q", r.Kept)
		if !strings.Contains(r.Kept[0], "restart docker and inject") {
			t.Error("that does not say what to do")
		}
		n.Output(t, "systemctl", "restart", "docker.service")
		n.inject(t)
		if r := n.eject(t); len(r.Kept) > 0 {
			t.Errorf("still kept: %q", r.Kept)
		}
	}
	same(t, "after eject", before, n.store(t))
}

// TestNodeWins registers on a node that has images of its own under the same names.
func TestNodeWins(t *testing.T) {
	n := newNode(t, releases[0].docker)
	n.Output(t, "docker", "pull", "-q", ref("shared:1"))
	n.Output(t, "docker", "tag", ref("shared:1"), ref("oci:latest"))
	n.Output(t, "docker", "run", "--name", "changed", "--network", "none", ref("shared:1"), "/bin/busybox", "touch", "/f")
	n.Output(t, "docker", "commit", "changed", ref("two-tags:one"))
	n.Output(t, "docker", "rm", "changed")
	own := map[string]any{}
	for _, image := range []string{ref("oci:latest"), ref("two-tags:one"), ref("shared:1")} {
		own[image] = n.inspect(t, image)["Id"]
	}
	before := n.store(t)
	n.attach(t, world.first.image, cacheDir)
	r := n.inject(t)
	if got := r.Disks[0].Present; got != 4 {
		t.Errorf("%d layers were present, want the four pulled ones", got)
	}
	told := 0
	for _, img := range r.Disks[0].Images {
		if strings.Contains(img.Reason, "another image as") {
			told++
		}
	}
	if told != 2 {
		t.Errorf("%d images are reported as standing back, want 2: %+v", told, r.Disks[0].Images)
	}
	for image, id := range own {
		if got := n.inspect(t, image)["Id"]; got != id {
			t.Errorf("%s was replaced", image)
		}
	}
	n.hello(t, ref("two-tags:two"))
	n.hello(t, ref("deep:latest"))
	n.eject(t)
	same(t, "after eject", before, n.store(t))
	n.hello(t, ref("shared:1"))
}

// TestVerify finds what was changed behind the manifest's back.
func TestVerify(t *testing.T) {
	n := newNode(t, releases[0].docker)
	n.attach(t, world.first.image, cacheDir)
	var reports []report.Verify
	if err := n.injector(t, &reports, "verify"); err != nil {
		t.Fatal(err)
	}
	if reports[0].Layers != len(world.first.manifest.Layers) || reports[0].Bytes == 0 {
		t.Errorf("verified %+v", reports[0])
	}
	t.Logf("%d bytes in %d ms", reports[0].Bytes, reports[0].Milliseconds)

	// A writable copy, through an overlay as the image is read-only.
	n.Output(t, "sh", "-ec", "mkdir -p /run/copy; cp -a /cache /run/copy/")
	odd := odd(t)
	for _, tt := range []struct{ name, change, undo string }{
		{"content", "cp -a odd/first /tmp/f; printf x | dd of=odd/first conv=notrunc status=none", "cat /tmp/f >odd/first; touch -r /tmp/f odd/first"},
		{"mode", "chmod 0600 odd/first", "chmod --reference=/tmp/f odd/first"},
		{"owner", "chown 12:13 odd/first; chmod --reference=/tmp/f odd/first", "chown --reference=/tmp/f odd/first; chmod --reference=/tmp/f odd/first"},
		{"time", "touch -d @1 odd/first", "touch -r /tmp/f odd/first"},
		{"link", "ln -s elsewhere odd/l; mv -T odd/l odd/dangling; touch -h -d @0 odd/dangling", "ln -s /no/such/file odd/l; mv -T odd/l odd/dangling"},
		{"more", "touch odd/more", "rm odd/more"},
		{"attribute", "", ""},
		{"missing", "mv odd/first /tmp/g", "mv /tmp/g odd/first"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := "/run/copy/cache/" + odd
			touched := "touch -r odd /tmp/dirtime; " + tt.change + "\ntouch -r /tmp/dirtime odd"
			n.Output(t, "sh", "-ec", "cd "+dir+"; "+touched)
			if file := n.Path(dir + "/odd/owned"); tt.name == "attribute" {
				if err := unix.Setxattr(file, "user.x", []byte("y"), 0); err != nil {
					t.Fatal(err)
				}
				defer unix.Removexattr(file, "user.x")
			}
			var reports []report.Verify
			err := n.injector(t, &reports, "verify", "--cache", "/run/copy/cache")
			if err == nil || !strings.Contains(err.Error(), odd) {
				t.Errorf("the damage was not found: %v", err)
			}
			if b, _ := json.Marshal(reports); !strings.Contains(string(b), "odd/") {
				t.Errorf("the file is not named: %s", b)
			}
			n.Output(t, "sh", "-ec", "cd "+dir+"; touch -r odd /tmp/dirtime; "+tt.undo+"\ntouch -r /tmp/dirtime odd")
		})
	}
}

// odd is the directory of the layer that has odd/first, relative to the disk's root.
func odd(t *testing.T) string {
	t.Helper()
	m := world.first.manifest
	for _, img := range m.Images {
		if !slices.Contains(img.Names, ref("odd-files:latest")) {
			continue
		}
		chain, err := img.ChainIDs()
		if err != nil {
			t.Fatal(err)
		}
		for _, l := range m.Layers {
			if l.ChainID == chain[1] {
				return m.LayerPath(l)
			}
		}
	}
	t.Fatal("no odd-files")
	return ""
}
