//go:build e2e

package cluster_test

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/selkies-project/packer-plugin-selkies/e2e/cluster"
	"github.com/selkies-project/packer-plugin-selkies/e2e/host"
	"github.com/selkies-project/packer-plugin-selkies/e2e/machine"
)

// tag gives an image of the registry another name there.
func tag(ctx context.Context, image, as string) error {
	from, err := name.ParseReference(ref(image))
	if err != nil {
		return err
	}
	to, err := name.ParseReference(ref(as))
	if err != nil {
		return err
	}
	img, err := remote.Image(from, remote.WithContext(ctx))
	if err != nil {
		return err
	}
	return remote.Write(to, img, remote.WithContext(ctx))
}

// stored is all that containerd holds, a line each, but for what its containers have.
// kubelet leaves ended sandboxes there for a minute.
func stored(ctx context.Context, n *cluster.Node) ([]string, error) {
	out, err := n.Run(ctx, "ctr", "-n", "k8s.io", "containers", "list", "-q")
	if err != nil {
		return nil, err
	}
	containers := strings.Fields(out)
	var all []string
	for _, kind := range []string{"images", "content", "snapshots", "leases"} {
		out, err := n.Run(ctx, "ctr", "-n", "k8s.io", kind, "list")
		if err != nil {
			return nil, err
		}
		for line := range strings.Lines(out) {
			fields := strings.Fields(line)
			switch {
			case len(fields) == 0 || slices.Contains(containers, fields[0]):
				continue
			case kind == "content":
				fields = fields[:1] // the age changes
			}
			all = append(all, kind+" "+strings.Join(fields, " "))
		}
	}
	// Directories that no snapshot has.
	out, err = n.Run(ctx, "sh", "-c", "echo $(ls "+snapshots+" | wc -l) - $(ctr -n k8s.io snapshots list | tail -n +2 | wc -l)")
	if err != nil {
		return nil, err
	}
	var directories, known int
	if _, err := fmt.Sscanf(out, "%d - %d", &directories, &known); err != nil {
		return nil, fmt.Errorf("reading %q: %w", out, err)
	}
	return append(all, fmt.Sprintf("%d directories without a snapshot", directories-known)), nil
}

// waitStored waits until containerd holds what it did before: it collects garbage in
// its own time.
func waitStored(t *testing.T, n *cluster.Node, before []string) {
	t.Helper()
	cluster.Wait(t, "containerd to hold what it did before", func(ctx context.Context) error {
		now, err := stored(ctx, n)
		if diff := cmp.Diff(before, now); err == nil && diff != "" {
			err = fmt.Errorf("before and now: %s", diff)
		}
		return err
	})
}

// settledStore waits until what containerd holds stays the same.
func settledStore(t *testing.T, n *cluster.Node) []string {
	t.Helper()
	var last []string
	same := 0
	cluster.Wait(t, "a store that stays as it is", func(ctx context.Context) error {
		now, err := stored(ctx, n)
		if err != nil {
			return err
		}
		if same++; !slices.Equal(now, last) {
			same = 0
		}
		if last = now; same < 5 {
			return fmt.Errorf("it changes")
		}
		return nil
	})
	return last
}

// removeImage removes an image with all of its names, as kubelet does.
func removeImage(t *testing.T, n *cluster.Node, image string) {
	t.Helper()
	conn, err := grpc.NewClient("unix://"+n.Path(machine.Socket), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	request := &cri.RemoveImageRequest{Image: &cri.ImageSpec{Image: image}}
	if _, err := cri.NewImageServiceClient(conn).RemoveImage(t.Context(), request); err != nil {
		t.Fatal(err)
	}
}

// TestTagMoves has a pod with imagePullPolicy Always run a newer image of a tag than
// the cache has. The tag is the node's then, the older image stays cached, and when
// both are taken away nothing is left of them.
func TestTagMoves(t *testing.T) {
	c := world.cluster
	disk := cluster.Disk{Name: firstDevice, Image: world.first}
	n := c.Node(t, cluster.NodeConfig{Disks: []cluster.Disk{disk}})
	mountSecondary(t, n, disk)
	// Its image and that of sandboxes are there from now on.
	if ok, said := runOnce(t, n, daemonSets(t, "secondary-boot-disk")[0].Spec.Template.Spec, nil, "version"); !ok {
		t.Fatal(said)
	}
	empty := settledStore(t, n)
	old := byDigest(t, moving)

	deploy(t, cluster.Agent{Component: "secondary-boot-disk"})
	n.WaitCondition(t, agentCondition)
	ns := c.Namespace(t)
	run := func(name, image string, policy corev1.PullPolicy, files string) {
		t.Helper()
		pod := podOn(n, ns, name, image)
		pod.Spec.Containers[0].ImagePullPolicy = policy
		c.Run(t, pod)
		c.WaitPodReady(t, ns, name)
		if out := c.Output(t, "exec", "-n", ns, name, "--", "/bin/busybox", "ls", "/"); strings.Contains(out, "newer") != (files == "newer") {
			t.Errorf("%s runs an image with the files %q, want the %s one", name, strings.Fields(out), files)
		}
	}
	world.reg.Reset()
	run("before", ref(moving), corev1.PullAlways, "older")
	expectPulls(t)
	if err := tag(t.Context(), appNext, moving); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := tag(context.Background(), app, moving); err != nil {
			t.Error(err)
		}
	})
	world.reg.Reset()
	run("after", ref(moving), corev1.PullAlways, "newer")
	// Of its layers the cache has all but one.
	fetched, older := world.reg.Count().Blobs, blobsOf(t, app)
	if len(fetched) != 2 || slices.ContainsFunc(fetched, func(b string) bool { return slices.Contains(older, b) }) {
		t.Errorf("fetched %q, want the config and the one layer that %v lacks", fetched, older)
	}

	world.reg.Reset()
	run("by-digest", old, corev1.PullNever, "older")
	const pin = "io.cri-containerd.pinned=pinned"
	record := func(name string) string { return n.Output(t, "ctr", "-n", "k8s.io", "images", "list", "name=="+name) }
	if got := record(old); !strings.Contains(got, pin) {
		t.Errorf("the older image lost its pin:\n%s", got)
	}
	// Or kubelet could never collect the newer one.
	if got := record(ref(moving)); !strings.Contains(got, ref(moving)) || strings.Contains(got, pin) {
		t.Errorf("the tag has the pin of the image that it was:\n%s", got)
	}
	// An agent that starts anew does not take the tag back.
	removeAgent(t.Context(), t)
	deploy(t, cluster.Agent{Component: "secondary-boot-disk"})
	n.WaitCondition(t, agentCondition)
	run("still", ref(moving), corev1.PullIfNotPresent, "newer")
	expectPulls(t)

	remove := func(names ...string) {
		t.Helper()
		for _, name := range names {
			if err := c.Client.CoreV1().Pods(ns).Delete(t.Context(), name, metav1.DeleteOptions{}); err != nil {
				t.Fatal(err)
			}
		}
		for _, name := range names {
			c.WaitPodGone(t, ns, name)
		}
	}
	remove("before", "after", "by-digest", "still")
	cluster.Wait(t, "eject in the agent's pod to succeed", func(context.Context) error {
		_, err := host.Output(documentedCommand(t, "docs/operations.md", "    kubectl exec -n selkies-image-cache $agent -- selkies-image-injector eject", "$agent", onlyAgent(t, n).Name))
		if err != nil && !strings.Contains(err.Error(), "remove the container first") {
			t.Fatal(err)
		}
		return err
	})
	removeAgent(t.Context(), t)
	// The newer image is the node's, and stands on layers of the cache.
	run("ejected", ref(moving), corev1.PullNever, "newer")
	remove("ejected")
	removeImage(t, n, ref(moving))
	eject(t, n)
	waitStored(t, n, empty)
	if got := mounted(t, n, anchors, "/fs "); len(got) != 0 {
		t.Errorf("the cache disk is still mounted for containerd as %q", got)
	}
}
