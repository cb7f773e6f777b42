//go:build e2e

package containerd_test

import (
	"archive/tar"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/selkies-project/packer-plugin-selkies/e2e/cachedisk"
	"github.com/selkies-project/packer-plugin-selkies/e2e/images"
	"github.com/selkies-project/packer-plugin-selkies/e2e/machine"
	"github.com/selkies-project/packer-plugin-selkies/e2e/treediff"
	"github.com/selkies-project/packer-plugin-selkies/injector/report"
)

// TestTrees compares what a container sees after inject with what it sees after a
// pull, for every shape of image.
func TestTrees(t *testing.T) {
	catalogue, shapes := buildCatalogue(t)
	onEach(t, func(t *testing.T, n *node) {
		n.attach(t, catalogue, cacheDir)
		before := checksum(t, catalogue)
		r := n.inject(t, cacheDir)
		for _, img := range r.Disks[0].Images {
			if img.State != report.Registered || img.Reason != "" {
				t.Errorf("%v: %s %s", img.Names, img.State, img.Reason)
			}
		}
		n.settled(t, false)
		for i, shape := range shapes {
			t.Run(strings.TrimPrefix(shape, world.reg.Addr+"/"), func(t *testing.T) {
				injected := n.tree(t, n.ns, shape, fmt.Sprintf("/mnt/injected-%d", i))
				n.Output(t, "ctr", "-n", "pulled", "images", "pull", "--plain-http", shape)
				pulled := n.tree(t, "pulled", shape, fmt.Sprintf("/mnt/pulled-%d", i))
				// No layer has the root: its time is that of its unpacking.
				root := injected["."]
				root.ModTime = pulled["."].ModTime
				injected["."] = root
				for _, diff := range treediff.Compare(pulled, injected) {
					t.Error(diff)
				}
				if len(injected) < 3 {
					t.Errorf("only %d names in the tree", len(injected))
				}
				n.ctr(t, "run", "--rm", "--net-host", shape, "e2e", "/bin/busybox", "true")
			})
		}
		n.eject(t)
		if checksum(t, catalogue) != before {
			t.Error("the cache disk has changed")
		}
	})
}

// buildCatalogue makes a cache disk with every shape of image, those with zstd
// layers too, which Docker 20.10 does not know.
func buildCatalogue(t *testing.T) (disk string, refs []string) {
	t.Helper()
	busybox, err := machine.Busybox(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	shapes, err := images.Catalogue(busybox)
	if err != nil {
		t.Fatal(err)
	}
	if refs, err = images.Push(t.Context(), world.reg.Addr, shapes); err != nil {
		t.Fatal(err)
	}
	m := machine.New(t, machine.Config{Name: "builder"})
	disk = filepath.Join(t.TempDir(), "catalogue")
	if _, err := cachedisk.Build(t.Context(), m, cachedisk.Config{Image: disk, References: refs, Release: machine.Upstream}); err != nil {
		t.Fatal(err)
	}
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	return disk, refs
}

// tree is an image's tree, mounted at dir as for a read-only container.
func (n *node) tree(t *testing.T, ns, ref, dir string) treediff.Tree {
	t.Helper()
	n.Output(t, "mkdir", "-p", dir)
	n.Output(t, "ctr", "-n", ns, "images", "mount", ref, dir)
	tree, err := treediff.Dir(n.Path(dir))
	n.Output(t, "ctr", "-n", ns, "images", "unmount", "--rm", dir)
	if err != nil {
		t.Fatal(err)
	}
	return tree
}

// TestMountFlags runs set-user-ID programs from a layer that is bind-mounted alone
// and from one that is below an overlay.
func TestMountFlags(t *testing.T) {
	onEach(t, func(t *testing.T, n *node) {
		n.attach(t, world.first, cacheDir)
		n.Output(t, "mount", "-o", "remount,bind,ro,nosuid,noexec,nodev", cacheDir)
		n.inject(t, cacheDir)
		for _, args := range [][]string{{ref(single)}, {"--read-only", ref(single)}, {ref(app1)}} {
			run := append([]string{"run", "--rm", "--net-host", "--allow-new-privs"}, args...)
			if out := n.ctr(t, append(run, "euid", "/bin/euid", "/bin/euid")...); strings.TrimSpace(out) != "0" {
				t.Errorf("%v: effective user ID is %s", args, out)
			}
		}
		if out, err := n.Run(t.Context(), "sh", "-c", "for d in "+snapshotsDir+"/*/fs/selkies-image-cache; do touch $d/x; done"); err == nil || !strings.Contains(err.Error(), "Read-only file system") {
			t.Errorf("writing to the disk through its anchor: %s, %v", out, err)
		}
	})
}

// TestUserNamespace runs containers whose users are mapped: owners are as after a
// pull, and the container's root may write.
func TestUserNamespace(t *testing.T) {
	n := newNode(t, machine.Upstream)
	n.attach(t, world.first, cacheDir)
	n.inject(t, cacheDir)
	n.listed(t, ref(sandbox))
	n.Output(t, "ctr", "-n", "pulled", "images", "pull", "--plain-http", ref(app1))
	script := "stat -c '%n %u %g' / /bin/busybox /data/owned /opaque/new; echo x >> /data/owned && chown 1000 /version && rm -r /opaque && cat /data/owned"

	t.Run("ctr", func(t *testing.T) {
		see := func(ns string) string {
			return n.Output(t, "ctr", "-n", ns, "run", "--rm", "--remap-labels", "--uidmap", "0:100000:65536",
				"--gidmap", "0:100000:65536", "--snapshotter", "overlayfs", ref(app1), "mapped", "/bin/busybox", "sh", "-ec", script)
		}
		pulled, injected := see("pulled"), see(n.ns)
		if pulled != injected || !strings.Contains(injected, "/data/owned 1000 1000\n") || !strings.Contains(injected, "/bin/busybox 0 0\n") {
			t.Errorf("after a pull %q, injected %q", pulled, injected)
		}
	})

	t.Run("CRI", func(t *testing.T) {
		// A pod with hostUsers: false has a network of its own; this one is empty.
		plugin := "#!/bin/sh\ncat >/dev/null\n[ \"$CNI_COMMAND\" = VERSION ] && echo '{\"cniVersion\":\"1.0.0\",\"supportedVersions\":[\"1.0.0\"]}' && exit\n" +
			"echo '{\"cniVersion\":\"1.0.0\",\"interfaces\":[{\"name\":\"eth0\",\"sandbox\":\"/x\"}],\"ips\":[{\"address\":\"10.9.9.9/32\",\"interface\":0}]}'\n"
		for _, name := range []string{"empty", "loopback"} {
			if err := n.WriteFile("/opt/cni/bin/"+name, []byte(plugin), 0o755); err != nil {
				t.Fatal(err)
			}
		}
		if err := n.WriteFile("/etc/cni/net.d/10-empty.conflist", []byte(`{"cniVersion":"1.0.0","name":"empty","plugins":[{"type":"empty"}]}`), 0o644); err != nil {
			t.Fatal(err)
		}
		n.start(t)
		mapping := []*cri.IDMapping{{HostId: 100000, ContainerId: 0, Length: 65536}}
		users := &cri.UserNamespace{Mode: cri.NamespaceMode_POD, Uids: mapping, Gids: mapping}
		p, err := n.runIn(t, "mapped", ref(app1), &cri.NamespaceOption{Network: cri.NamespaceMode_POD, UsernsOptions: users})
		if err != nil {
			t.Fatal(err)
		}
		got := p.sh(t, script+"; cat /proc/self/uid_map")
		if !strings.Contains(got, "/data/owned 1000 1000\n") || !strings.Contains(got, "/bin/busybox 0 0\n") || !strings.Contains(got, "100000") {
			t.Errorf("in the container: %q", got)
		}
		p.remove(t)
	})
}

// TestMoby registers with the containerd image store of Docker 29.
func TestMoby(t *testing.T) {
	n := newNode(t, machine.Upstream)
	n.ns = "moby"
	n.disconnect()
	n.connect(t)
	if err := n.StartDocker(t.Context(), machine.Docker{Release: machine.Upstream, ImageStore: true}); err != nil {
		t.Fatal(err)
	}
	before := checksum(t, world.second)
	n.attach(t, world.second, cacheDir)
	empty := n.settled(t, false)
	n.inject(t, cacheDir)
	full := n.settled(t, true)
	n.inject(t, cacheDir)
	if now := n.settled(t, true); strings.Join(full, "\n") != strings.Join(now, "\n") {
		t.Error("the second run changed something")
	}
	if err := world.reg.Stop(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := world.reg.Start(); err != nil {
			t.Error(err)
		}
	})
	if out := n.Output(t, "docker", "images", "--format", "{{.Repository}}:{{.Tag}}"); !strings.Contains(out, ref(app2)) {
		t.Errorf("docker images: %s", out)
	}
	if out := n.Output(t, "docker", "run", "--rm", "--network", "none", ref(app2), "/bin/busybox", "cat", "/version", "/data/owned"); out != "2owned" {
		t.Errorf("docker run: %q", out)
	}
	t.Run("save", func(t *testing.T) {
		n.Output(t, "docker", "save", "-o", "/var/lib/docker/saved.tar", ref(app2))
		checkArchive(t, n.Path("/var/lib/docker/saved.tar"))
	})
	t.Run("in use", func(t *testing.T) {
		n.Output(t, "docker", "run", "-d", "--name", "busy", "--network", "none", ref(app1))
		id := strings.TrimSpace(n.Output(t, "docker", "inspect", "-f", "{{.Id}}", "busy"))
		_, err := n.Run(t.Context(), "selkies-image-injector", "eject", "--runtime", "containerd", "--containerd-namespace", "moby")
		if err == nil || !strings.Contains(err.Error(), "container "+id) {
			t.Errorf("eject while a container runs: %v", err)
		}
		n.Output(t, "docker", "rm", "-f", "busy")
	})
	n.Output(t, "docker", "rmi", ref(app2))
	n.inject(t, cacheDir)
	if out := n.Output(t, "docker", "images", "-q", ref(app2)); out == "" {
		t.Error("not back after rmi and inject")
	}
	n.eject(t)
	got := n.settled(t, false)
	if strings.Join(got, "\n") != strings.Join(empty, "\n") {
		t.Errorf("eject left something:\n%s\nbefore:\n%s", strings.Join(got, "\n"), strings.Join(empty, "\n"))
	}
	if checksum(t, world.second) != before {
		t.Error("the cache disk has changed")
	}
}

// checkArchive checks that a saved image has every blob that its manifests name.
func checkArchive(t *testing.T, file string) {
	t.Helper()
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	blobs := map[string][]byte{}
	tr := tar.NewReader(f)
	for {
		h, err := tr.Next()
		if err == io.EOF {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if blobs[h.Name], err = io.ReadAll(tr); err != nil {
			t.Fatal(err)
		}
	}
	var list []struct{ Layers []string }
	if err := json.Unmarshal(blobs["manifest.json"], &list); err != nil {
		t.Fatalf("manifest.json of the archive: %v", err)
	}
	if len(list) != 1 || len(list[0].Layers) != 6 {
		t.Fatalf("the archive lists %+v", list)
	}
	for _, l := range list[0].Layers {
		if len(blobs[l]) == 0 {
			t.Error(fmt.Errorf("the archive lacks %s", l))
		}
	}
}
