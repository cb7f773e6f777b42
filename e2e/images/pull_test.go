//go:build e2e

package images_test

import (
	"fmt"
	"strings"
	"testing"

	"github.com/selkies-project/packer-plugin-selkies/e2e/images"
	"github.com/selkies-project/packer-plugin-selkies/e2e/machine"
	"github.com/selkies-project/packer-plugin-selkies/e2e/registry"
	"github.com/selkies-project/packer-plugin-selkies/e2e/treediff"
)

// TestPull pulls and runs every image with every runtime, and sees the same files
// in each.
func TestPull(t *testing.T) {
	busybox, err := machine.Busybox(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	all, err := images.Catalogue(busybox)
	if err != nil {
		t.Fatal(err)
	}
	r := registry.New(t, registry.Config{})
	m := machine.New(t, machine.Config{Name: "node"})
	tests := []struct {
		name       string
		containerd machine.Release
		docker     *machine.Docker
	}{
		{"containerd 1.6", machine.Debian, nil},
		{"containerd 2.4", machine.Upstream, nil},
		{"Docker 20.10", machine.Debian, &machine.Docker{Release: machine.Debian}},
		{"Moby 29, graph driver", machine.Upstream, &machine.Docker{Release: machine.Upstream}},
		{"Moby 29, image store", machine.Upstream, &machine.Docker{Release: machine.Upstream, ImageStore: true}},
	}
	var want treediff.Tree
	for i, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if err := m.StartContainerd(t.Context(), machine.Containerd{Release: tt.containerd}); err != nil {
				t.Fatal(err)
			}
			if tt.docker != nil {
				if err := m.StartDocker(t.Context(), *tt.docker); err != nil {
					t.Fatal(err)
				}
			}
			for _, image := range all {
				if image.Zstd && tt.docker != nil && tt.docker.Release == machine.Debian {
					continue // it does not know zstd
				}
				refs, err := images.Push(t.Context(), r.Addr, []images.Image{image})
				if err != nil {
					t.Fatal(err)
				}
				for _, ref := range refs {
					// Its status is looked at: ctr can lose what a container says that ends at once.
					const command = "/bin/busybox test -x /bin/busybox"
					script := fmt.Sprintf("docker pull -q %[1]s >/dev/null; docker run --rm --network none %[1]s %[2]s", ref, command)
					if tt.docker == nil {
						script = fmt.Sprintf("ctr i pull --plain-http %[1]s >/dev/null; ctr run --rm %[1]s e2e-%[3]d %[2]s", ref, command, i)
					}
					m.Output(t, "sh", "-ec", script)
				}
			}

			tree := oddTree(t, m, r.Addr+"/odd-files:latest", tt.docker != nil)
			if want == nil {
				want = tree
			}
			for _, diff := range treediff.Compare(want, tree) {
				t.Error(diff)
			}
		})
	}
	if e := want["odd/capable"]; len(e.Xattrs["security.capability"]) != 20 {
		t.Errorf("the capability is %q", e.Xattrs)
	}
	if e := want["odd/sub/third"]; e.SameAs != "odd/first" {
		t.Errorf("the hard link is to %q", e.SameAs)
	}
}

// oddTree is the tree that a container of ref sees, without what a runtime mounts or
// makes in it.
func oddTree(t *testing.T, m *machine.Machine, ref string, docker bool) treediff.Tree {
	t.Helper()
	var root string
	if docker {
		id := strings.TrimSpace(m.Output(t, "docker", "run", "-d", "--network", "none", ref, "/bin/sleep", "1000"))
		defer m.Output(t, "docker", "rm", "-f", id)
		root = fmt.Sprintf("/proc/%s/root", strings.TrimSpace(m.Output(t, "docker", "inspect", "-f", "{{.State.Pid}}", id)))
	} else {
		m.Output(t, "mkdir", "-p", "/mnt/tree")
		m.Output(t, "ctr", "images", "mount", ref, "/mnt/tree")
		defer m.Output(t, "sh", "-ec", "umount /mnt/tree; ctr snapshots rm /mnt/tree")
		root = "/mnt/tree"
	}
	// A process of the machine's has its root in the machine's /proc only.
	tree, err := treediff.Dir(m.Path(root))
	if err != nil {
		t.Fatal(err)
	}
	for name := range tree {
		top, _, _ := strings.Cut(name, "/")
		switch top {
		case ".", ".dockerenv", "dev", "proc", "sys", "etc", "run":
			delete(tree, name)
		}
	}
	return tree
}
