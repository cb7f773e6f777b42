//go:build e2e

package containerd_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/selkies-project/packer-plugin-selkies/e2e/host"
	"github.com/selkies-project/packer-plugin-selkies/e2e/machine"
	"github.com/selkies-project/packer-plugin-selkies/injector/report"
	"github.com/selkies-project/packer-plugin-selkies/manifest"
)

// TestBadInput gives inject what it cannot work with: one line that names the
// thing and the remedy, and nothing changed.
func TestBadInput(t *testing.T) {
	onEach(t, func(t *testing.T, n *node) {
		n.attach(t, world.first, cacheDir)
		inject := []string{"selkies-image-injector", "inject", "--runtime", "containerd", "--cache", cacheDir}
		before := n.settled(t, false)

		t.Run("not root", func(t *testing.T) {
			n.fails(t, "not root", append([]string{"setpriv", "--reuid=1000", "--clear-groups"}, inject...)...)
		})
		t.Run("no disk", func(t *testing.T) {
			n.fails(t, "no layer manifest at /mnt", append(inject, "--cache", "/mnt")...)
		})
		if diff := cmp.Diff(before, n.settled(t, false)); !strings.Contains(diff, "image") && diff != "" {
			t.Error(diff)
		}
		n.eject(t)
		if diff := cmp.Diff(before, n.settled(t, false)); diff != "" {
			t.Errorf("after eject: %s", diff)
		}

		broken := map[string]struct{ spoil, want string }{
			"layer missing":      {"rm -r $(ls -d docker/overlay2/*/diff/opaque | head -n 1 | sed s,/diff/opaque,,)", "no such file or directory; build the disk again"},
			"truncated manifest": {"truncate -s 1000 " + manifest.Path, "truncated"},
			"newer schema":       {"sed -i 's/\"schemaVersion\": 1/\"schemaVersion\": 2/' " + manifest.Path, "schemaVersion is 2"},
			"wrong digest":       {"sed -i 's/\"size\": 1,/\"size\": 2,/; s/\"os\": \"linux\"/\"os\": \"plan9\"/' " + manifest.Path, "plan9"},
		}
		for name, tt := range broken {
			t.Run(name, func(t *testing.T) {
				disk := changed(t, world.first, tt.spoil)
				dir := "/mnt/disks/" + filepath.Base(filepath.Dir(disk))
				detach := n.attach(t, disk, dir)
				n.fails(t, tt.want, "selkies-image-injector", "inject", "--runtime", "containerd", "--cache", dir)
				n.Output(t, "umount", dir)
				detach()
			})
		}
		if diff := cmp.Diff(before, n.settled(t, false)); diff != "" {
			t.Errorf("a broken disk changed something: %s", diff)
		}

		t.Run("what the node has wins", func(t *testing.T) {
			n.pull(t, ref(app2))
			n.ctr(t, "images", "tag", ref(app2), ref(app1))
			r := n.inject(t, cacheDir)
			i := slices.IndexFunc(r.Disks[0].Images, func(i report.Image) bool { return slices.Contains(i.Names, ref(app1)) })
			if img := r.Disks[0].Images[i]; !strings.Contains(img.Reason, ref(app1)+" is ") {
				t.Errorf("report: %+v", img)
			}
			if got := n.listed(t, ref(app1)); got.Id != n.listed(t, ref(app2)).Id {
				t.Error("inject replaced the node's image")
			}
			n.eject(t)
			n.removeImage(t, ref(app2))
			if diff := cmp.Diff(before, n.settled(t, false)); diff != "" {
				t.Errorf("left over: %s", diff)
			}
		})

		t.Run("another snapshotter", func(t *testing.T) {
			n.config.Snapshotter = "native"
			n.start(t)
			n.fails(t, "snapshotter is native, not overlayfs", inject...)
		})
		t.Run("not running", func(t *testing.T) {
			n.Output(t, "systemctl", "stop", "containerd")
			n.fails(t, "containerd is not running at /run/containerd/containerd.sock", inject...)
		})
	})
}

// TestNoRoom registers on nodes whose file system is too small.
func TestNoRoom(t *testing.T) {
	// containerd itself takes some of both before it is there.
	tests := map[string]struct{ size, fill, want string }{
		"bytes":  {"20M", "true", "B free, registering needs"},
		"inodes": {"200M", "cd " + stateDir + " && while [ $(stat -f -c %d .) -gt 60 ]; do mktemp -p . fill-XXXXXX; done", "inodes free, registering needs"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			image := filepath.Join(t.TempDir(), "store")
			if _, err := host.Output(exec.CommandContext(t.Context(), "mkfs.ext4", "-q", "-N", "1000", image, tt.size)); err != nil {
				t.Fatal(err)
			}
			n := newNodeOn(t, machine.Upstream, image)
			n.Output(t, "sh", "-c", tt.fill)
			n.attach(t, world.first, cacheDir)
			before := n.settled(t, false)
			n.fails(t, tt.want, "selkies-image-injector", "inject", "--runtime", "containerd", "--cache", cacheDir)
			n.eject(t)
			if diff := cmp.Diff(before, n.settled(t, false)); diff != "" {
				t.Errorf("changed: %s", diff)
			}
		})
	}
}

// fails runs a command that has to fail with one line that has the text want.
func (n *node) fails(t *testing.T, want string, args ...string) {
	t.Helper()
	out, err := n.Run(t.Context(), args...)
	if err == nil {
		t.Errorf("no error; it says %s", out)
		return
	}
	text := err.Error()
	_, said, _ := strings.Cut(text, "selkies-image-injector: ")
	if !strings.Contains(said, want) || strings.Contains(strings.TrimSpace(said), "\n") {
		t.Errorf("error %q, want one line with %q", text, want)
	}
}

// changed is a copy of a disk image, changed by a shell command.
func changed(t *testing.T, image, script string) string {
	t.Helper()
	dir := t.TempDir()
	disk, mnt := filepath.Join(dir, "disk"), filepath.Join(dir, "mnt")
	if err := os.Mkdir(mnt, 0o755); err != nil {
		t.Fatal(err)
	}
	script = fmt.Sprintf("cp --sparse=always %s %s; mount -o loop %[2]s %[3]s; cd %[3]s; (%[4]s) || e=$?; cd /; umount %[3]s; exit $e", image, disk, mnt, script)
	if _, err := host.Output(exec.CommandContext(t.Context(), "sh", "-c", script)); err != nil {
		t.Fatal(err)
	}
	return disk
}
