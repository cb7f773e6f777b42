//go:build e2e

package containerd_test

import (
	"archive/tar"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/google/go-cmp/cmp"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/selkies-project/packer-plugin-selkies/e2e/cachedisk"
	"github.com/selkies-project/packer-plugin-selkies/e2e/images"
	"github.com/selkies-project/packer-plugin-selkies/e2e/machine"
	"github.com/selkies-project/packer-plugin-selkies/e2e/pods"
	"github.com/selkies-project/packer-plugin-selkies/e2e/treediff"
	"github.com/selkies-project/packer-plugin-selkies/injector/report"
)

// TestTrees compares what a container sees after inject with what it sees after a
// pull, for every shape of image.
func TestTrees(t *testing.T) {
	all, err := catalogue()
	check(t, err)
	onEach(t, func(t *testing.T, n *node) {
		n.attach(t, all.disk, cacheDir)
		before := cachedisk.Checksum(t, all.disk)
		r := n.inject(t, cacheDir)
		for _, img := range r.Disks[0].Images {
			if img.State != report.Registered || img.Reason != "" {
				t.Errorf("%v: %s %s", img.Names, img.State, img.Reason)
			}
		}
		n.settled(t, false)
		for _, shape := range all.refs {
			t.Run(strings.TrimPrefix(shape, world.reg.Addr+"/"), func(t *testing.T) { n.CompareImage(t, n.ns, shape) })
		}
		n.eject(t)
		if cachedisk.Checksum(t, all.disk) != before {
			t.Error("the cache disk has changed")
		}
	})
}

// allShapes is a cache disk with every shape of image.
type allShapes struct {
	disk string
	refs []string
}

// catalogue makes that disk when it is first asked for. The upstream Docker fills
// it: Debian's does not know zstd layers.
var catalogue = sync.OnceValues(func() (all allShapes, err error) {
	ctx := context.Background()
	busybox, err := machine.Busybox(ctx)
	if err != nil {
		return all, err
	}
	shapes, err := images.Catalogue(busybox)
	if err != nil {
		return all, err
	}
	if all.refs, err = images.Push(ctx, world.reg.Addr, shapes); err != nil {
		return all, err
	}
	m, err := machine.Boot(ctx, machine.Config{Name: "builder"})
	if err != nil {
		return all, err
	}
	defer m.Close()
	all.disk = filepath.Join(world.dir, "catalogue")
	_, err = cachedisk.Build(ctx, m, cachedisk.Config{Image: all.disk, References: all.refs, Release: machine.Upstream})
	return all, err
})

// TestMountFlags runs set-user-ID programs from a layer that is bind-mounted alone
// and from one that is below an overlay.
func TestMountFlags(t *testing.T) {
	onEach(t, func(t *testing.T, n *node) {
		n.attach(t, world.first, cacheDir)
		n.Output(t, "mount", "-o", "remount,bind,ro,nosuid,noexec,nodev", cacheDir)
		n.inject(t, cacheDir)
		for _, args := range [][]string{{ref(single)}, {"--read-only", ref(single)}, {ref(app1)}} {
			run := append([]string{"run", "--rm", "--net-host", "--allow-new-privs"}, args...)
			n.ctr(t, append(run, "euid", "/bin/euid", "/bin/euid")...)
		}
		if out, err := n.Run(t.Context(), "sh", "-c", "for d in "+snapshotsDir+"/*/fs/selkies-image-cache; do touch $d/x; done"); err == nil || !strings.Contains(err.Error(), "Read-only file system") {
			t.Errorf("writing to the disk through its anchor: %s, %v", out, err)
		}
	})
}

// TestUserNamespace runs containers whose users are mapped: the tree is the one after
// a pull, and the container's root may write.
func TestUserNamespace(t *testing.T) {
	all, err := catalogue()
	check(t, err)
	n := newNode(t, machine.Upstream)
	n.emptyNetwork(t)
	shapes := []string{ref(app1), ref(single), ref("odd-files:latest"), ref("same-layer-twice:latest"), ref("deep:latest")}

	empty := n.settled(t, false)
	pulled := map[string]treediff.Tree{}
	for _, shape := range shapes {
		n.pull(t, shape)
		pulled[shape] = n.mappedTree(t, shape)
	}
	remapped := n.remappedTree(t, ref(app1))
	for _, shape := range append(shapes, ref(sandbox)) {
		n.removeImage(t, shape)
	}
	if diff := cmp.Diff(empty, n.settled(t, false)); diff != "" {
		t.Fatalf("left over of what was pulled: %s", diff)
	}

	const shapesDir = "/mnt/disks/shapes"
	n.attach(t, world.first, cacheDir)
	n.attach(t, all.disk, shapesDir)
	n.inject(t, cacheDir, shapesDir)
	n.listed(t, ref(sandbox))
	for _, shape := range shapes {
		t.Run(strings.TrimPrefix(shape, world.reg.Addr+"/"), func(t *testing.T) {
			n.listed(t, shape)
			compareMapped(t, pulled[shape], n.mappedTree(t, shape))
		})
	}
	t.Run("ctr", func(t *testing.T) { compareMapped(t, remapped, n.remappedTree(t, ref(app1))) })
}

func compareMapped(t *testing.T, pulled, injected treediff.Tree) {
	t.Helper()
	for _, diff := range treediff.Compare(pulled, injected) {
		t.Error(diff)
	}
	if got := injected["bin/busybox"]; got.UID != firstID || got.Type != "file" {
		t.Errorf("the container's root does not own /bin/busybox: %+v", got)
	}
}

// emptyNetwork lets the node run pods with a network of their own, as those with
// hostUsers: false have, which reaches nothing.
func (n *node) emptyNetwork(t *testing.T) {
	t.Helper()
	plugin := "#!/bin/sh\ncat >/dev/null\n[ \"$CNI_COMMAND\" = VERSION ] && echo '{\"cniVersion\":\"1.0.0\",\"supportedVersions\":[\"1.0.0\"]}' && exit\n" +
		"echo '{\"cniVersion\":\"1.0.0\",\"interfaces\":[{\"name\":\"eth0\",\"sandbox\":\"/x\"}],\"ips\":[{\"address\":\"10.9.9.9/32\",\"interface\":0}]}'\n"
	for _, name := range []string{"empty", "loopback"} {
		check(t, n.WriteFile("/opt/cni/bin/"+name, []byte(plugin), 0o755))
	}
	check(t, n.WriteFile("/etc/cni/net.d/10-empty.conflist", []byte(`{"cniVersion":"1.0.0","name":"empty","plugins":[{"type":"empty"}]}`), 0o644))
	n.start(t)
}

// Users of a container are mapped to those of the host from firstID on.
const (
	firstID = 100000
	mapped  = 65536
)

// writeMapped changes files as the container's root, and fails if it may not or if
// owners are not what it made them.
const writeMapped = `echo x >> /etc/passwd && chown 1000 /bin/busybox && touch /bin/new && rm /bin/sh &&
	test "$(echo $(stat -c %u /etc/passwd /bin/busybox /bin/new) $(cat /proc/self/uid_map))" = "0 1000 0 0 100000 65536"`

// mappedTree is what a pod with hostUsers: false sees of an image, owners as the host
// sees them. It writes there afterwards.
func (n *node) mappedTree(t *testing.T, reference string) treediff.Tree {
	t.Helper()
	mapping := []*cri.IDMapping{{HostId: firstID, ContainerId: 0, Length: mapped}}
	users := &cri.UserNamespace{Mode: cri.NamespaceMode_POD, Uids: mapping, Gids: mapping}
	p, err := n.runIn(t, "mapped", reference, &cri.NamespaceOption{Network: cri.NamespaceMode_POD, UsernsOptions: users})
	check(t, err)
	defer p.remove(t)
	tree := n.containerTree(t, p.Container)
	p.sh(t, writeMapped)
	return tree
}

// remappedTree is the same for a container that ctr runs.
func (n *node) remappedTree(t *testing.T, reference string) treediff.Tree {
	t.Helper()
	ids := fmt.Sprintf("0:%d:%d", firstID, mapped)
	n.ctr(t, "run", "--detach", "--null-io", "--remap-labels", "--uidmap", ids, "--gidmap", ids,
		"--snapshotter", "overlayfs", reference, "remapped", "/bin/busybox", "sleep", "86397")
	tree := n.containerTree(t, "remapped")
	n.ctr(t, "tasks", "exec", "--exec-id", "write", "remapped", "/bin/busybox", "sh", "-c", writeMapped)
	n.ctr(t, "tasks", "delete", "--force", "remapped")
	n.ctr(t, "containers", "delete", "remapped")
	return tree
}

// containerTree is what a running container sees, but for what the runtime makes.
func (n *node) containerTree(t *testing.T, id string) treediff.Tree {
	t.Helper()
	tree, err := pods.Tree(n.context(t), n.Machine, n.ctrd, id)
	check(t, err)
	return tree
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
	before := cachedisk.Checksum(t, world.second)
	n.attach(t, world.second, cacheDir)
	empty := n.settled(t, false)
	var r report.Inject
	check(t, json.Unmarshal([]byte(n.Output(t, "selkies-image-injector", "inject", "--runtime", "docker", "--output", "json", "--cache", cacheDir)), &r))
	if r.Runtime != "containerd/moby" || r.Disks[0].Registered != 6 {
		t.Errorf("with --runtime docker: %+v", r)
	}
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
	if cachedisk.Checksum(t, world.second) != before {
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
		if errors.Is(err, io.EOF) {
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
