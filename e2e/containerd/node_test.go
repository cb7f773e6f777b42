//go:build e2e

package containerd_test

import (
	"context"
	"encoding/json"
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/selkies-project/packer-plugin-selkies/e2e/machine"
	"github.com/selkies-project/packer-plugin-selkies/e2e/nodestate"
	"github.com/selkies-project/packer-plugin-selkies/e2e/pods"
	"github.com/selkies-project/packer-plugin-selkies/injector/report"
)

const (
	// cacheDir is where the node has the cache disk.
	cacheDir     = "/mnt/disks/cache"
	stateDir     = nodestate.ContainerdDir
	snapshotsDir = nodestate.SnapshotsDir
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
	if strings.Contains(text, "null") {
		t.Errorf("an empty list is null in the report of %v: %s", args, text)
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

// state is all that containerd and its directories have, one line each.
func (n *node) state(t testing.TB, strict bool) []string {
	t.Helper()
	lines, err := nodestate.Containerd(n.context(t), n.Machine, n.ctrd, strict)
	if err != nil {
		t.Fatal(err)
	}
	return lines
}

// settled is the same once the CRI has stopped changing records, without garbage.
func (n *node) settled(t testing.TB, strict bool) []string {
	t.Helper()
	lines, err := nodestate.SettledContainerd(n.context(t), n.Machine, n.ctrd, strict)
	if err != nil {
		t.Fatal(err)
	}
	return lines
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
type pod struct{ *pods.Pod }

// run starts a container of the image in a pod of its own, on the host's network.
func (n *node) run(t testing.TB, name, reference string) (*pod, error) {
	t.Helper()
	return n.runIn(t, name, reference, nil)
}

func (n *node) runIn(t testing.TB, name, reference string, options *cri.NamespaceOption) (*pod, error) {
	t.Helper()
	p, err := pods.Run(t.Context(), n.conn, name, reference, options)
	return &pod{p}, err
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
	out, err := p.Shell(t.Context(), command)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func (p *pod) remove(t testing.TB) {
	t.Helper()
	if err := p.Remove(t.Context()); err != nil {
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
