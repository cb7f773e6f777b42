//go:build e2e

package docker_test

import (
	"archive/tar"
	"encoding/json"
	"errors"
	"io"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/selkies-project/packer-plugin-selkies/e2e/cachedisk"
	"github.com/selkies-project/packer-plugin-selkies/e2e/machine"
	"github.com/selkies-project/packer-plugin-selkies/e2e/treediff"
)

// TestModernDisk registers images of a disk that Moby 29 has filled: one with zstd
// layers, which Docker 20.10 could not pull but runs, and one of Docker Hub.
func TestModernDisk(t *testing.T) {
	sum := cachedisk.Checksum(t, world.modern.image)
	var zstd treediff.Tree
	// Moby first: its pull of the zstd image is what both are compared with.
	for _, r := range slices.Backward(releases) {
		t.Run(r.name, func(t *testing.T) {
			n := newNode(t, r.docker)
			n.docker.Config = map[string]any{"registry-mirrors": []string{"http://" + world.reg.Addr}}
			n.start(t)
			if r.docker == machine.Upstream {
				n.Output(t, "docker", "pull", "-q", world.zstd)
				zstd = n.tree(t, world.zstd)
			} else if _, err := n.Run(t.Context(), "docker", "pull", "-q", world.zstd); err == nil {
				t.Log("this Docker knows zstd")
			}
			n.Output(t, "docker", "pull", "-q", world.hub)
			pulled := n.inspect(t, world.hub)
			n.fresh(t)
			before := n.store(t)
			n.attach(t, world.modern.image, cacheDir)
			if got := n.inject(t).Disks[0].Registered; got != len(world.modern.manifest.Layers) {
				t.Errorf("%d of %d layers registered", got, len(world.modern.manifest.Layers))
			}

			n.hello(t, world.zstd)
			same(t, "zstd", zstd, n.tree(t, world.zstd))
			n.saves(t, world.zstd)
			for _, name := range []string{world.hub, "library/" + world.hub, "docker.io/library/" + world.hub} {
				n.hello(t, name)
			}
			if diff := cmp.Diff(pulled, n.inspect(t, world.hub)); diff != "" {
				t.Errorf("docker inspect %s (-pulled +injected):\n%s", world.hub, diff)
			}
			world.reg.Reset()
			n.Output(t, "docker", "pull", "-q", world.hub)
			n.Output(t, "docker", "pull", "-q", ref("odd-files:latest"))
			if c := world.reg.Count(); c.ManifestHeads+c.ManifestGets == 0 || c.BlobGets != 0 {
				t.Errorf("pulls of registered tags: %+v", c)
			}
			n.eject(t)
			same(t, "after eject", before, n.store(t))
		})
	}
	if cachedisk.Checksum(t, world.modern.image) != sum {
		t.Error("the cache disk was written to")
	}
}

// TestImageStore registers in Moby 29's containerd image store, from a disk that keeps
// the layers' blobs and from one that does not.
func TestImageStore(t *testing.T) {
	for _, tt := range []struct {
		name  string
		disk  disk
		refs  []string
		blobs bool
	}{
		{"with blobs", world.modern, append(slices.Clone(world.refs), world.zstd), true},
		{"without blobs", world.first, world.refs, false},
	} {
		t.Run(tt.name, func(t *testing.T) {
			sum := cachedisk.Checksum(t, tt.disk.image)
			n := newNode(t, machine.Upstream)
			n.docker.ImageStore = true
			n.start(t)
			empty := n.containerd(t)
			trees := map[string]treediff.Tree{}
			for _, image := range tt.refs {
				n.Output(t, "docker", "pull", "-q", image)
				trees[image] = n.tree(t, image)
			}
			n.removeImages(t)
			n.wait(t, "layers of pulled images are left over", func() bool { return slices.Equal(n.containerd(t), empty) })

			n.attach(t, tt.disk.image, cacheDir)
			n.inject(t)
			registered := n.containerd(t)
			n.inject(t)
			if diff := cmp.Diff(registered, n.containerd(t)); diff != "" {
				t.Errorf("the second run changed something: %s", diff)
			}
			if err := world.reg.Stop(); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() {
				if err := world.reg.Start(); err != nil {
					t.Error(err)
				}
			})
			listed := n.Output(t, "docker", "images", "--format", "{{.Repository}}:{{.Tag}}")
			for _, image := range tt.refs {
				if !strings.Contains(image, "@") && !strings.Contains(listed, image+"\n") {
					t.Errorf("docker images does not list %s", image)
				}
				n.hello(t, image)
				same(t, image, trees[image], n.tree(t, image))
				if n.completelySaved(t, image) != tt.blobs {
					t.Errorf("docker save of %s is complete: %t", image, !tt.blobs)
				}
			}
			n.builds(t, "0", ref("oci:latest"))
			n.Output(t, "docker", "rmi", "built")
			// BuildKit exports what it builds with the blobs of the base.
			if err := n.build(t, "1", ref("oci:latest")); (err == nil) != tt.blobs {
				t.Errorf("BuildKit without a registry: %v", err)
			}
			n.Output(t, "docker", "rmi", "-f", "built")
			n.Output(t, "docker", "run", "--name", "changed", "--network", "none", ref("oci:latest"), "/bin/busybox", "touch", "/committed")
			n.Output(t, "docker", "commit", "changed", "committed")
			n.Output(t, "docker", "rm", "changed")
			n.hello(t, "committed")
			n.Output(t, "docker", "rmi", "committed")

			if err := world.reg.Start(); err != nil {
				t.Fatal(err)
			}
			world.reg.Reset()
			n.Output(t, "docker", "pull", "-q", world.newer)
			if c := world.reg.Count(); c.BlobGets != 2 {
				t.Errorf("the pull of a newer tag fetched %v, want the config and one layer", c.Blobs)
			}
			n.hello(t, world.newer)
			n.Output(t, "docker", "rmi", world.newer)
			n.builds(t, "1", ref("oci:latest"))
			n.Output(t, "docker", "rmi", "built")
			// What BuildKit still works on, a moment after a build, a prune passes over.
			n.wait(t, "BuildKit keeps what it built", func() bool {
				n.Output(t, "docker", "builder", "prune", "-af")
				return strings.Contains(n.Output(t, "docker", "system", "df", "--format", "{{.Type}}: {{.Size}}"), "Build Cache: 0B\n")
			})

			n.removeImages(t)
			n.inject(t)
			n.hello(t, ref("deep:latest"))
			n.eject(t)
			n.wait(t, "eject leaves something", func() bool { return slices.Equal(n.containerd(t), empty) })
			if t.Failed() {
				t.Logf("before: %q; now: %q", empty, n.containerd(t))
			}
			if cachedisk.Checksum(t, tt.disk.image) != sum {
				t.Error("the cache disk was written to")
			}
		})
	}
}

// removeImages removes all images, by every name.
func (n *node) removeImages(t *testing.T) {
	t.Helper()
	n.Output(t, "sh", "-ec", "docker rmi -f $(docker images -q | sort -u)")
}

// containerd is what containerd has for Docker's image store.
func (n *node) containerd(t *testing.T) []string {
	t.Helper()
	out := n.Output(t, "sh", "-ec", `c="ctr -n moby"; $c images ls -q; $c content ls -q; $c leases ls -q
		$c snapshots --snapshotter overlayfs ls | awk 'NR > 1 { print $1 }'`)
	return slices.Sorted(strings.Lines(out))
}

// completelySaved saves an image and says if the archive has every layer that it
// lists.
func (n *node) completelySaved(t *testing.T, image string) bool {
	t.Helper()
	n.Output(t, "docker", "save", "-o", "/tmp/saved.tar", image)
	f, err := os.Open(n.Path("/tmp/saved.tar"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	sizes := map[string]int64{}
	var list []struct{ Layers []string }
	for r := tar.NewReader(f); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		sizes[h.Name] = h.Size
		if h.Name == "manifest.json" {
			if err := json.NewDecoder(r).Decode(&list); err != nil {
				t.Fatal(err)
			}
		}
	}
	if len(list) != 1 || len(list[0].Layers) == 0 {
		t.Fatalf("%s: the archive lists %+v", image, list)
	}
	return !slices.ContainsFunc(list[0].Layers, func(l string) bool { return sizes[l] == 0 })
}
