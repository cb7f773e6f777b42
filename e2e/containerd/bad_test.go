//go:build e2e

package containerd_test

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"

	"github.com/selkies-project/packer-plugin-selkies/e2e/cachedisk"
	"github.com/selkies-project/packer-plugin-selkies/e2e/host"
	"github.com/selkies-project/packer-plugin-selkies/e2e/machine"
	"github.com/selkies-project/packer-plugin-selkies/e2e/treediff"
	"github.com/selkies-project/packer-plugin-selkies/manifest"
)

var injectCache = []string{"selkies-image-injector", "inject", "--runtime", "containerd", "--cache", cacheDir}

// TestBadDisk injects disks that are not what the provisioner made.
func TestBadDisk(t *testing.T) {
	other := digest.FromString("another layer")
	tests := []struct {
		name  string
		spoil func(t *testing.T, dir string)
		want  []string
	}{
		{"no manifest", func(t *testing.T, dir string) {
			check(t, os.Remove(filepath.Join(dir, manifest.Path)))
		}, []string{"no layer manifest at ", "mount the cache disk there"}},
		{"truncated manifest", func(t *testing.T, dir string) {
			check(t, os.Truncate(filepath.Join(dir, manifest.Path), 1000))
		}, []string{"truncated", "build the disk again"}},
		{"newer schema", edited(func(m *manifest.Manifest) {
			m.SchemaVersion++
		}), []string{"schemaVersion is 2", "use an injector as new as the provisioner"}},
		{"flipped byte in an index", edited(func(m *manifest.Manifest) {
			image(m, ref(app1)).Index.Data[10] ^= 1
		}), []string{ref(app1), "index: digest is", "build the disk again"}},
		{"flipped byte in a manifest", edited(func(m *manifest.Manifest) {
			image(m, ref(single)).Manifest.Data[10] ^= 1
		}), []string{ref(single), "manifest: digest is", "build the disk again"}},
		{"flipped byte in a config", edited(func(m *manifest.Manifest) {
			image(m, ref(single)).Config.Data[10] ^= 1
		}), []string{ref(single), "config: digest is", "build the disk again"}},
		{"changed chain ID", edited(func(m *manifest.Manifest) {
			m.Layers[1].ChainID = other
		}), []string{"layers[1]: chainID " + other.String() + " does not follow", "build the disk again"}},
		{"changed diff ID", edited(func(m *manifest.Manifest) {
			m.Layers[1].DiffID = other
		}), []string{"layers[1]: chainID ", "does not follow", "build the disk again"}},
		{"another platform", edited(func(m *manifest.Manifest) {
			m.Platform.Architecture, m.Images, m.Layers = "s390x", nil, nil
		}), []string{"for linux/s390x, this node runs linux/amd64", "build a disk for that platform"}},
		{"missing layer directory", func(t *testing.T, dir string) {
			m := readManifest(t, dir)
			check(t, os.RemoveAll(filepath.Join(dir, filepath.Dir(m.LayerPath(m.Layers[1])))))
		}, []string{"layer sha256:", "no such file or directory", "build the disk again"}},
	}
	disks := make([]string, len(tests))
	for i, tt := range tests {
		disks[i] = changed(t, world.first, tt.spoil)
	}
	onEach(t, func(t *testing.T, n *node) {
		before := n.settled(t, true)
		for i, tt := range tests {
			t.Run(tt.name, func(t *testing.T) {
				n.attach(t, disks[i], cacheDir)
				n.Refused(t, 1, injectCache, append(tt.want, cacheDir)...)
				if diff := cmp.Diff(before, n.settled(t, true)); diff != "" {
					t.Errorf("changed: %s", diff)
				}
				n.Output(t, "umount", cacheDir)
			})
		}
		t.Run("beside a good one", func(t *testing.T) {
			n.attach(t, world.first, cacheDir)
			if _, err := n.Run(t.Context(), append(injectCache, "--cache", "/mnt")...); err == nil || !strings.Contains(err.Error(), "no layer manifest at /mnt/") {
				t.Errorf("inject of a good disk and a bad one: %v", err)
			}
			n.listed(t, ref(app1))
		})
	})
}

// TestBadNode injects where that cannot be done.
func TestBadNode(t *testing.T) {
	onEach(t, func(t *testing.T, n *node) {
		n.attach(t, world.first, cacheDir)
		before := n.settled(t, true)
		unchanged := func(t *testing.T) {
			t.Helper()
			if diff := cmp.Diff(before, n.settled(t, true)); diff != "" {
				t.Errorf("changed: %s", diff)
			}
		}

		t.Run("not root", func(t *testing.T) {
			n.Refused(t, 1, append([]string{"setpriv", "--reuid=1000", "--clear-groups"}, injectCache...), "not root", "run with sudo")
			unchanged(t)
		})
		t.Run("no look at the host", func(t *testing.T) {
			n.Refused(t, 1, append([]string{"setpriv", "--bounding-set", "-sys_ptrace"}, injectCache...), stateDir, "permission denied", "CAP_SYS_PTRACE")
			unchanged(t)
		})
		t.Run("not a reference", func(t *testing.T) {
			n.Refused(t, 2, []string{"selkies-image-injector", "plan", ref(app1), "Bad:::ref"}, `"Bad:::ref"`, "plan --help")
			unchanged(t)
		})
		t.Run("another snapshotter", func(t *testing.T) {
			n.config.Snapshotter = "native"
			n.start(t)
			before = n.settled(t, true)
			n.Refused(t, 1, injectCache, "snapshotter is native, not overlayfs", "choose a node pool with overlayfs")
			unchanged(t)
		})
		t.Run("containerd is not running", func(t *testing.T) {
			n.Output(t, "systemctl", "stop", "containerd")
			before := n.files(t)
			n.Refused(t, 1, injectCache, "containerd is not running at "+machine.Socket, "start it")
			for _, diff := range treediff.Compare(before, n.files(t)) {
				t.Error(diff)
			}
		})
	})
}

// TestNoRoom registers on nodes whose file system is too small.
func TestNoRoom(t *testing.T) {
	// containerd itself takes some of both before it is there.
	tests := map[string]struct {
		size, fill string
		want       []string
	}{
		"bytes":  {"20M", "true", []string{"B free, registering needs", "free some space"}},
		"inodes": {"200M", "cd " + stateDir + " && while [ $(stat -f -c %d .) -gt 60 ]; do mktemp -p . fill-XXXXXX; done", []string{"inodes free, registering needs", "remove some files"}},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			store := filepath.Join(t.TempDir(), "store")
			if _, err := host.Output(exec.CommandContext(t.Context(), "mkfs.ext4", "-q", "-N", "1000", store, tt.size)); err != nil {
				t.Fatal(err)
			}
			n := newNodeOn(t, machine.Upstream, store)
			n.Output(t, "sh", "-c", tt.fill)
			n.attach(t, world.first, cacheDir)
			before := n.settled(t, true)
			n.Refused(t, 1, injectCache, append(tt.want, stateDir)...)
			if diff := cmp.Diff(before, n.settled(t, true)); diff != "" {
				t.Errorf("changed: %s", diff)
			}
		})
	}
}

// files is everything in containerd's directory.
func (n *node) files(t *testing.T) treediff.Tree {
	t.Helper()
	tree, err := treediff.Dir(n.Path(stateDir))
	check(t, err)
	return tree
}

// changed is a copy of a disk image, changed by edit where it is mounted.
func changed(t *testing.T, image string, edit func(t *testing.T, dir string)) string {
	t.Helper()
	return cachedisk.Changed(t, image, func(dir string) error {
		edit(t, dir)
		return nil
	})
}

// edited changes a disk's layer manifest, which need not be valid then.
func edited(edit func(m *manifest.Manifest)) func(t *testing.T, dir string) {
	return func(t *testing.T, dir string) {
		t.Helper()
		m := readManifest(t, dir)
		edit(m)
		data, err := json.Marshal(m)
		check(t, err)
		check(t, os.WriteFile(filepath.Join(dir, manifest.Path), data, 0o644))
	}
}

func readManifest(t *testing.T, dir string) *manifest.Manifest {
	t.Helper()
	m, err := manifest.Read(dir)
	check(t, err)
	return m
}

// image is the manifest's image of that name.
func image(m *manifest.Manifest, name string) *manifest.Image {
	i := slices.IndexFunc(m.Images, func(i manifest.Image) bool { return slices.Contains(i.Names, name) })
	return &m.Images[i]
}

func check(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
