//go:build e2e

package containerd_test

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/selkies-project/packer-plugin-selkies/e2e/machine"
	"github.com/selkies-project/packer-plugin-selkies/injector/report"
)

const (
	// cacheDir is where the node has the cache disk.
	cacheDir     = "/mnt/disks/cache"
	stateDir     = "/var/lib/containerd"
	snapshotsDir = stateDir + "/io.containerd.snapshotter.v1.overlayfs/snapshots"
)

// node is a machine with a running containerd.
type node struct {
	*machine.Machine
	config machine.Containerd
	ns     string
	conn   *grpc.ClientConn
	ctrd   *client.Client
}

func newNode(t testing.TB, release machine.Release) *node {
	t.Helper()
	return newNodeOn(t, release, "")
}

// newNodeOn makes a node whose containerd keeps everything on the disk image store.
func newNodeOn(t testing.TB, release machine.Release, store string) *node {
	t.Helper()
	n := &node{
		Machine: machine.New(t, machine.Config{Name: "node"}),
		config:  machine.Containerd{Release: release, Sandbox: ref(sandbox)},
		ns:      "k8s.io",
	}
	if err := n.Install(world.injector, "/usr/local/bin/selkies-image-injector"); err != nil {
		t.Fatal(err)
	}
	if store != "" {
		n.MountDisk(t, store, stateDir, "rw")
	}
	n.start(t)
	t.Cleanup(n.disconnect)
	return n
}

// ctr runs containerd's own client in the node's namespace.
func (n *node) ctr(t testing.TB, args ...string) string {
	t.Helper()
	return n.Output(t, append([]string{"ctr", "-n", n.ns}, args...)...)
}

// start starts containerd and connects to it.
func (n *node) start(t testing.TB) {
	t.Helper()
	n.disconnect()
	if err := n.StartContainerd(t.Context(), n.config); err != nil {
		t.Fatal(err)
	}
	n.connect(t)
}

func (n *node) connect(t testing.TB) {
	t.Helper()
	var err error
	socket := n.Path(machine.Socket)
	if n.ctrd, err = client.New(socket, client.WithDefaultNamespace(n.ns)); err != nil {
		t.Fatal(err)
	}
	if n.conn, err = grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials())); err != nil {
		t.Fatal(err)
	}
	wait(t, "the CRI", func() error {
		_, err := n.runtime().Version(t.Context(), &cri.VersionRequest{})
		return err
	})
}

func (n *node) disconnect() {
	if n.conn != nil {
		n.conn.Close()
		n.ctrd.Close()
		n.conn = nil
	}
}

func (n *node) runtime() cri.RuntimeServiceClient { return cri.NewRuntimeServiceClient(n.conn) }
func (n *node) images() cri.ImageServiceClient    { return cri.NewImageServiceClient(n.conn) }

func (n *node) context(t testing.TB) context.Context {
	return namespaces.WithNamespace(t.Context(), n.ns)
}

// attach attaches a disk image read-only and mounts it at dir, as GKE does. detach
// takes the disk away again.
func (n *node) attach(t testing.TB, image, dir string) (detach func()) {
	t.Helper()
	return n.MountDisk(t, image, dir, "ro,noload")
}

// injector runs the injector and decodes its report.
func (n *node) injector(t testing.TB, out any, args ...string) error {
	t.Helper()
	cmd := append([]string{"selkies-image-injector", "--containerd-namespace", n.ns, "--runtime", "containerd", "--output", "json"}, args...)
	text, err := n.Run(t.Context(), cmd...)
	if err != nil {
		return err
	}
	if err := json.Unmarshal([]byte(text), out); err != nil {
		t.Fatalf("decoding the report of %v: %v: %s", args, err, text)
	}
	return nil
}

func (n *node) inject(t testing.TB, dirs ...string) report.Inject {
	t.Helper()
	args := []string{"inject"}
	for _, d := range dirs {
		args = append(args, "--cache", d)
	}
	var r report.Inject
	if err := n.injector(t, &r, args...); err != nil {
		t.Fatal(err)
	}
	return r
}

func (n *node) eject(t testing.TB, ids ...string) report.Eject {
	t.Helper()
	var r report.Eject
	if err := n.injector(t, &r, append([]string{"eject"}, ids...)...); err != nil {
		t.Fatal(err)
	}
	return r
}

// anchor is the path that the disk is mounted on, of the only generation.
func (n *node) anchor(t testing.TB) string {
	t.Helper()
	dir := ""
	err := n.ctrd.SnapshotService("overlayfs").Walk(n.context(t), func(_ context.Context, i snapshots.Info) error {
		if i.Labels["selkies.io/image-cache.anchor"] != "" {
			dir = i.Labels["selkies.io/image-cache.dir"]
		}
		return nil
	})
	if err != nil || dir == "" {
		t.Fatalf("no anchor: %v", err)
	}
	return filepath.Join(snapshotsDir, dir, "fs")
}

var anchorDir = regexp.MustCompile(`^\.\./[0-9]+/`)

// state is all that containerd and its directories have, one line each. Numbers
// that differ from run to run are left out, times too unless strict.
func (n *node) state(t testing.TB, strict bool) []string {
	t.Helper()
	ctx := n.context(t)
	var lines []string
	add := func(format string, a ...any) { lines = append(lines, fmt.Sprintf(format, a...)) }
	fail := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	when := func(at time.Time) string {
		if strict {
			return at.String()
		}
		return ""
	}

	images, err := n.ctrd.ImageService().List(ctx)
	fail(err)
	for _, i := range images {
		add("image %s %s %s %s", i.Name, i.Target.Digest, labels(i.Labels), when(i.UpdatedAt))
	}
	fail(n.ctrd.ContentStore().Walk(ctx, func(i content.Info) error {
		add("content %s %d %s %s", i.Digest, i.Size, labels(i.Labels), when(i.UpdatedAt))
		return nil
	}))
	list, err := n.ctrd.LeasesService().List(ctx)
	fail(err)
	for _, l := range list {
		add("lease %s %s", l.ID, labels(l.Labels))
		resources, err := n.ctrd.LeasesService().ListResources(ctx, leases.Lease{ID: l.ID})
		fail(err)
		for _, r := range resources {
			add("lease %s has %s %s", l.ID, r.Type, r.ID)
		}
	}
	known := 0
	fail(n.ctrd.SnapshotService("overlayfs").Walk(ctx, func(_ context.Context, i snapshots.Info) error {
		known++
		link := ""
		if dir := i.Labels["selkies.io/image-cache.dir"]; dir != "" {
			target, _ := os.Readlink(n.Path(filepath.Join(snapshotsDir, dir, "fs")))
			link = anchorDir.ReplaceAllString(target, "../ANCHOR/")
			i.Labels = maps.Clone(i.Labels)
			i.Labels["selkies.io/image-cache.dir"] = "DIR"
		}
		add("snapshot %s %s parent=%s %s link=%s %s", i.Name, i.Kind, i.Parent, labels(i.Labels), link, when(i.Updated))
		return nil
	}))
	dirs, err := os.ReadDir(n.Path(snapshotsDir))
	fail(err)
	add("%d snapshot directories more than snapshots", len(dirs)-known)
	blobs, err := filepath.Glob(n.Path(stateDir + "/io.containerd.content.v1.content/blobs/sha256/*"))
	fail(err)
	for _, b := range blobs {
		add("blob file %s", filepath.Base(b))
	}
	mounts, err := os.ReadFile(fmt.Sprintf("%s/mountinfo", n.Path("/proc/1")))
	fail(err)
	count := 0
	for line := range strings.Lines(string(mounts)) {
		if f := strings.Fields(line); strings.HasPrefix(f[4], snapshotsDir) {
			count++
		}
	}
	add("%d mounts below snapshots", count)
	slices.Sort(lines)
	return lines
}

// collect has containerd collect its garbage, such as the directories of
// containers that were removed.
func (n *node) collect(t testing.TB) {
	t.Helper()
	ctx := n.context(t)
	l, err := n.ctrd.LeasesService().Create(ctx, leases.WithRandomID())
	if err == nil {
		err = n.ctrd.LeasesService().Delete(ctx, l, leases.SynchronousDelete)
	}
	if err != nil {
		t.Fatal(err)
	}
}

func labels(m map[string]string) string {
	var s []string
	for k, v := range m {
		s = append(s, k+"="+v)
	}
	slices.Sort(s)
	return strings.Join(s, ",")
}

// settled waits until the CRI, which follows containerd's events, has stopped
// changing records, and gives the state then, without garbage.
func (n *node) settled(t testing.TB, strict bool) []string {
	t.Helper()
	n.collect(t)
	last := n.state(t, strict)
	same := 0
	wait(t, "a state that stays", func() error {
		now := n.state(t, strict)
		if slices.Equal(now, last) {
			same++
		} else {
			same = 0
		}
		last = now
		if same < 3 {
			return fmt.Errorf("still changing")
		}
		return nil
	})
	return last
}

// listed waits until the CRI knows the image.
func (n *node) listed(t testing.TB, reference string) *cri.Image {
	t.Helper()
	var img *cri.Image
	wait(t, "the CRI to list "+reference, func() error {
		resp, err := n.images().ImageStatus(t.Context(), &cri.ImageStatusRequest{Image: &cri.ImageSpec{Image: reference}})
		if err == nil && resp.Image == nil {
			err = fmt.Errorf("not listed")
		}
		if err == nil {
			img = resp.Image
		}
		return err
	})
	return img
}

// pod is a pod with one container.
type pod struct {
	n                  *node
	sandbox, container string
}

// run starts a container of the image in a pod of its own, on the host's network.
func (n *node) run(t testing.TB, name, reference string) (*pod, error) {
	t.Helper()
	return n.runIn(t, name, reference, &cri.NamespaceOption{Network: cri.NamespaceMode_NODE})
}

func (n *node) runIn(t testing.TB, name, reference string, options *cri.NamespaceOption) (*pod, error) {
	t.Helper()
	config := &cri.PodSandboxConfig{
		Metadata:     &cri.PodSandboxMetadata{Name: name, Namespace: "test", Uid: name, Attempt: 0},
		LogDirectory: "/tmp",
		Labels: map[string]string{
			"io.kubernetes.pod.name": name, "io.kubernetes.pod.namespace": "test", "io.kubernetes.pod.uid": name,
		},
		Linux: &cri.LinuxPodSandboxConfig{SecurityContext: &cri.LinuxSandboxSecurityContext{NamespaceOptions: options}},
	}
	s, err := n.runtime().RunPodSandbox(t.Context(), &cri.RunPodSandboxRequest{Config: config})
	if err != nil {
		return nil, err
	}
	p := &pod{n: n, sandbox: s.PodSandboxId}
	c, err := n.runtime().CreateContainer(t.Context(), &cri.CreateContainerRequest{
		PodSandboxId:  s.PodSandboxId,
		SandboxConfig: config,
		Config: &cri.ContainerConfig{
			Metadata: &cri.ContainerMetadata{Name: "main"},
			Image:    &cri.ImageSpec{Image: reference},
			Command:  []string{"/bin/busybox", "sleep", "86398"},
			LogPath:  name + ".log",
			Labels: map[string]string{
				"io.kubernetes.container.name": "main", "io.kubernetes.pod.name": name, "io.kubernetes.pod.namespace": "test",
			},
			Linux: &cri.LinuxContainerConfig{SecurityContext: &cri.LinuxContainerSecurityContext{NamespaceOptions: options}},
		},
	})
	if err != nil {
		p.remove(t)
		return nil, err
	}
	p.container = c.ContainerId
	if _, err := n.runtime().StartContainer(t.Context(), &cri.StartContainerRequest{ContainerId: c.ContainerId}); err != nil {
		p.remove(t)
		return nil, err
	}
	return p, nil
}

func (n *node) mustRun(t testing.TB, name, reference string) *pod {
	t.Helper()
	p, err := n.run(t, name, reference)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// sh runs a shell command in the container.
func (p *pod) sh(t testing.TB, command string) string {
	t.Helper()
	resp, err := p.n.runtime().ExecSync(t.Context(), &cri.ExecSyncRequest{
		ContainerId: p.container, Cmd: []string{"/bin/busybox", "sh", "-c", command}, Timeout: 20,
	})
	if err != nil {
		t.Fatalf("%s: %v", command, err)
	}
	if resp.ExitCode != 0 {
		t.Fatalf("%s: exit status %d: %s", command, resp.ExitCode, resp.Stderr)
	}
	return strings.TrimSpace(string(resp.Stdout))
}

func (p *pod) remove(t testing.TB) {
	t.Helper()
	if _, err := p.n.runtime().StopPodSandbox(t.Context(), &cri.StopPodSandboxRequest{PodSandboxId: p.sandbox}); err != nil {
		t.Fatal(err)
	}
	if _, err := p.n.runtime().RemovePodSandbox(t.Context(), &cri.RemovePodSandboxRequest{PodSandboxId: p.sandbox}); err != nil {
		t.Fatal(err)
	}
}

func (n *node) pull(t testing.TB, reference string) {
	t.Helper()
	if _, err := n.images().PullImage(t.Context(), &cri.PullImageRequest{Image: &cri.ImageSpec{Image: reference}}); err != nil {
		t.Fatal(err)
	}
}

func (n *node) removeImage(t testing.TB, reference string) {
	t.Helper()
	if _, err := n.images().RemoveImage(t.Context(), &cri.RemoveImageRequest{Image: &cri.ImageSpec{Image: reference}}); err != nil {
		t.Fatal(err)
	}
}

// wait asks f until it gives no error.
func wait(t testing.TB, what string, f func() error) {
	t.Helper()
	deadline := time.After(30 * time.Second)
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		err := f()
		if err == nil {
			return
		}
		select {
		case <-tick.C:
		case <-deadline:
			t.Fatalf("waiting for %s: %v", what, err)
		case <-t.Context().Done():
			t.Fatalf("waiting for %s: %v", what, t.Context().Err())
		}
	}
}
