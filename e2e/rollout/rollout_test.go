//go:build e2e

package rollout_test

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"

	"cloud.google.com/go/auth"
	compute "cloud.google.com/go/compute/apiv1"
	"cloud.google.com/go/compute/apiv1/computepb"
	"cloud.google.com/go/container/apiv1/containerpb"
	"github.com/google/go-cmp/cmp"
	packersdk "github.com/hashicorp/packer-plugin-sdk/packer"
	"google.golang.org/api/option"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/selkies-project/packer-plugin-selkies/e2e/cluster"
	"github.com/selkies-project/packer-plugin-selkies/e2e/gcp"
)

// Token implements auth.TokenProvider.
func (c *cloud) Token(context.Context) (*auth.Token, error) {
	return &auth.Token{Value: c.token, Type: "Bearer"}, nil
}

// attach has an instance use a zone's disk, as a node does.
func (c *cloud) attach(instance, zone string, stamp int) (detach func()) {
	c.t.Helper()
	client, err := compute.NewInstancesRESTClient(c.t.Context(), option.WithEndpoint(c.URL),
		option.WithAuthCredentials(auth.NewCredentials(&auth.CredentialsOptions{TokenProvider: c})))
	if err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(func() { client.Close() })
	c.AddImage("debian-cloud", &computepb.Image{Name: new("debian"), Family: new("debian")})
	op, err := client.Insert(c.t.Context(), &computepb.InsertInstanceRequest{Project: project, Zone: zone, InstanceResource: &computepb.Instance{
		Name:        &instance,
		MachineType: new("zones/" + zone + "/machineTypes/e2-standard-2"),
		Disks: []*computepb.AttachedDisk{
			{Boot: new(true), AutoDelete: new(true), InitializeParams: &computepb.AttachedDiskInitializeParams{
				SourceImage: new("projects/debian-cloud/global/images/debian"), DiskName: new(instance)}},
			{Source: new(fmt.Sprintf("projects/%s/zones/%s/disks/%s", project, zone, c.diskName(zone, stamp))), Mode: new("READ_ONLY")},
		},
		NetworkInterfaces: []*computepb.NetworkInterface{{Network: new("global/networks/default")}},
	}})
	if err != nil {
		c.t.Fatal(err)
	}
	if err := op.Wait(c.t.Context()); err != nil {
		c.t.Fatal(err)
	}
	return func() {
		op, err := client.Delete(c.t.Context(), &computepb.DeleteInstanceRequest{Project: project, Zone: zone, Instance: instance})
		if err != nil {
			c.t.Fatal(err)
		}
		if err := op.Wait(c.t.Context()); err != nil {
			c.t.Fatal(err)
		}
	}
}

// resources are the images and disks of the cache.
func (c *cloud) resources() []string {
	return slices.DeleteFunc(c.Resources(), func(r string) bool {
		return !strings.Contains(r, "selkies-image-cache-17") && !strings.Contains(r, "/disks/"+c.name+"-")
	})
}

func (c *cloud) wantResources(want ...string) {
	c.t.Helper()
	slices.Sort(want)
	if diff := cmp.Diff(want, c.resources()); diff != "" {
		c.t.Errorf("images and disks: %s", diff)
	}
}

func (c *cloud) disk(zone string, stamp int) string {
	return fmt.Sprintf("projects/%s/zones/%s/disks/%s", project, zone, c.diskName(zone, stamp))
}

func image(stamp int) string { return "projects/" + project + "/global/images/" + imageName(stamp) }

func TestGenerations(t *testing.T) {
	c := newCloud(t, "generations", administrator(t))
	c.tidy()
	addNode(t, "a1", zoneA)
	addNode(t, "a2", zoneA)
	addNode(t, "b1", zoneB)

	// The first generation comes to all nodes.
	first := c.build(1)
	c.must(first)
	old := map[string]string{"a1": c.diskName(zoneA, 1), "a2": c.diskName(zoneA, 1), "b1": c.diskName(zoneB, 1)}
	c.waitGenerations(old)
	c.waitObjects(slices.Concat(c.three(zoneA, 1), c.three(zoneB, 1))...)
	c.wantResources(image(1), c.disk(zoneA, 1), c.disk(zoneB, 1))
	if err := c.working(); err != nil {
		t.Error(err)
	}

	// Once more, nothing changes.
	versions, changed := c.objects(true), c.changes()
	c.must(first)
	if diff := cmp.Diff(versions, c.objects(true)); diff != "" {
		t.Errorf("a second run changed objects: %s", diff)
	}
	if diff := cmp.Diff(changed, c.changes()); diff != "" {
		t.Errorf("a second run changed something: %s", diff)
	}

	// A dry run of the second generation changes nothing and says what it would do.
	second := c.build(2)
	u := c.must(second, "dry_run", true)
	if diff := cmp.Diff(versions, c.objects(true)); diff != "" {
		t.Errorf("a dry run changed objects: %s", diff)
	}
	if diff := cmp.Diff(changed, c.changes()); diff != "" {
		t.Errorf("a dry run changed something: %s", diff)
	}
	for _, want := range []string{
		"dry run: would make disk generations-us-central1-a-1700000002, pd-balanced of 20 GB, from image selkies-image-cache-1700000002",
		"dry run: would apply PersistentVolume generations-us-central1-b-1700000002 to cluster us-central1/broker-us-central1",
		"dry run: would label node a1 of cluster us-central1/broker-us-central1 with generations-us-central1-a-1700000001",
		"dry run: would lock DaemonSet generations-us-central1-a-1700000001 of cluster us-central1/broker-us-central1 to the 2 nodes that have its disk",
	} {
		if !slices.Contains(u.lines, want) {
			t.Errorf("the dry run does not say %q, but %q", want, u.lines)
		}
	}

	// The second generation serves new nodes, and the first those that have it, whose
	// pods go on.
	pods := podsOf(t, c.name)
	c.must(second)
	addNode(t, "a3", zoneA)
	c.waitGenerations(with(old, "a3", c.diskName(zoneA, 2)))
	for _, p := range pods {
		if !slices.Contains(podsOf(t, c.name), p) {
			t.Errorf("pod %s has not gone on", p)
		}
	}
	c.waitObjects(slices.Concat(c.three(zoneA, 1), c.three(zoneB, 1), c.three(zoneA, 2), c.three(zoneB, 2))...)

	// With the third, the first is one too many, but in use.
	detach := c.attach("a1", zoneA, 1)
	c.must(c.build(3))
	addNode(t, "b2", zoneB)
	c.waitGenerations(with(old, "a3", c.diskName(zoneA, 2), "b2", c.diskName(zoneB, 3)))
	c.waitObjects(slices.Concat(c.three(zoneA, 1), c.three(zoneB, 1), c.three(zoneA, 2), c.two(zoneB, 2), c.three(zoneA, 3), c.three(zoneB, 3))...)

	// The nodes of the first go, but an instance still has its disk in one zone. The
	// second has a node in one zone only.
	for _, n := range []string{"a1", "a2", "b1"} {
		removeNode(t, n)
	}
	c.mustAsPlanned(c.build(4))
	c.waitObjects(slices.Concat(c.three(zoneA, 2), c.two(zoneA, 3), c.three(zoneB, 3), c.three(zoneA, 4), c.three(zoneB, 4))...)
	c.wantResources(image(1), image(2), image(3), image(4),
		c.disk(zoneA, 1), c.disk(zoneA, 2), c.disk(zoneA, 3), c.disk(zoneB, 3), c.disk(zoneA, 4), c.disk(zoneB, 4))
	detach()
	c.mustAsPlanned(artifact(imageName(4)))
	c.wantResources(image(2), image(3), image(4),
		c.disk(zoneA, 2), c.disk(zoneA, 3), c.disk(zoneB, 3), c.disk(zoneA, 4), c.disk(zoneB, 4))

	// A rollback.
	c.must(artifact(imageName(4)), "image_name", imageName(3))
	addNode(t, "a4", zoneA)
	c.waitGenerations(map[string]string{"a3": c.diskName(zoneA, 2), "b2": c.diskName(zoneB, 3), "a4": c.diskName(zoneA, 3)})
	if err := c.working(); err != nil {
		t.Error(err)
	}
	c.wantResources(image(2), image(3), image(4),
		c.disk(zoneA, 2), c.disk(zoneA, 3), c.disk(zoneB, 3), c.disk(zoneA, 4), c.disk(zoneB, 4))

	// The next build keeps the generation that is worth going back to once more.
	c.must(c.build(5))
	c.wantResources(image(2), image(3), image(5),
		c.disk(zoneA, 2), c.disk(zoneA, 3), c.disk(zoneB, 3), c.disk(zoneA, 5), c.disk(zoneB, 5))
}

// mustAsPlanned has a dry run before the run, which deletes just what that one says.
func (c *cloud) mustAsPlanned(a packersdk.Artifact) {
	c.t.Helper()
	deleted := func(u *ui, prefix string) (lines []string) {
		for _, line := range u.lines {
			if what, ok := strings.CutPrefix(line, prefix+"delete "); ok {
				lines = append(lines, what)
			}
		}
		slices.Sort(lines)
		return lines
	}
	plan := deleted(c.must(a, "dry_run", true), "dry run: would ")
	if diff := cmp.Diff(plan, deleted(c.must(a), "")); diff != "" || len(plan) == 0 {
		c.t.Errorf("the dry run plans to delete %q, and the run differs: %s", plan, diff)
	}
}

func with(m map[string]string, kv ...string) map[string]string {
	out := map[string]string{}
	for k, v := range m {
		out[k] = v
	}
	for i := 0; i < len(kv); i += 2 {
		out[kv[i]] = kv[i+1]
	}
	return out
}

// podsOf are the IDs of a cache's pods.
func podsOf(t *testing.T, name string) []string {
	t.Helper()
	pods, err := world.Client.CoreV1().Pods(namespace).List(t.Context(), metav1.ListOptions{LabelSelector: agents + name})
	if err != nil {
		t.Fatal(err)
	}
	var ids []string
	for _, p := range pods.Items {
		if p.DeletionTimestamp == nil {
			ids = append(ids, string(p.UID))
		}
	}
	return ids
}

// TestInterrupted ends runs at each thing that they do. At every moment some
// generation takes new nodes, and the last run leaves what one that was never
// interrupted would have left.
func TestInterrupted(t *testing.T) {
	c := newCloud(t, "interrupted", administrator(t))
	c.tidy()
	addNode(t, "ia", zoneA)
	addNode(t, "ib", zoneB)
	c.must(c.build(1))
	c.waitGenerations(map[string]string{"ia": c.diskName(zoneA, 1), "ib": c.diskName(zoneB, 1)})

	interrupted := errors.New("interrupted by the test")
	stamp, steps := 1, 0
	for n := 1; ; n++ {
		stamp++
		ctx, cancel := context.WithCancelCause(t.Context())
		u := &ui{}
		u.said = func(string) {
			if len(u.lines) == n {
				cancel(interrupted)
			}
		}
		err := c.process(ctx, u, c.build(stamp))
		if wrong := c.working(); wrong != nil {
			t.Fatalf("interrupted after %q: %v", u.lines[len(u.lines)-1], wrong)
		}
		if len(u.lines) < n {
			if err != nil {
				t.Fatal(err)
			}
			steps = n - 1
			break
		}
		if err != nil && !errors.Is(err, interrupted) {
			t.Fatalf("interrupted after %q: %v", u.lines[len(u.lines)-1], err)
		}
	}
	t.Logf("interrupted at %d steps", steps)
	if steps < 20 {
		t.Errorf("a run has %d steps only", steps)
	}
	c.settle(stamp, map[string]string{"ia": c.diskName(zoneA, 1), "ib": c.diskName(zoneB, 1)})
}

// settle runs the post-processor once more after runs that went wrong. Nodes have kept
// the first generation, and everything since is gone but the last one and the one
// before it that was rolled out.
func (c *cloud) settle(last int, nodes map[string]string) {
	c.t.Helper()
	c.waitGenerations(nodes)
	c.must(artifact(imageName(last)))
	var left []int
	for s := 1; s <= last; s++ {
		if slices.Contains(c.resources(), image(s)) {
			left = append(left, s)
		}
	}
	if len(left) != 3 || left[0] != 1 || left[2] != last {
		c.t.Fatalf("images of the generations %v are left; want the first, which is in use, the last and one before it", left)
	}
	var want []string
	for _, s := range left {
		want = append(want, image(s), c.disk(zoneA, s), c.disk(zoneB, s))
	}
	c.wantResources(want...)
	c.waitObjects(slices.Concat(c.three(zoneA, 1), c.three(zoneB, 1), c.two(zoneA, left[1]), c.two(zoneB, left[1]), c.three(zoneA, last), c.three(zoneB, last))...)
}

// TestRefused has each of the calls to Google's APIs refused in turn, for good.
func TestRefused(t *testing.T) {
	c := newCloud(t, "refused", administrator(t))
	c.tidy()
	addNode(t, "ra", zoneA)
	addNode(t, "rb", zoneB)
	c.must(c.build(1))
	nodes := map[string]string{"ra": c.diskName(zoneA, 1), "rb": c.diskName(zoneB, 1)}
	c.waitGenerations(nodes)

	stamp, refused := 1, 0
	for n := 0; ; n++ {
		stamp++
		before := len(c.Calls())
		c.Inject(gcp.Fault{Call: "*", After: n, Error: &gcp.Error{Code: http.StatusForbidden, Reason: "forbidden", Message: "refused by the test"}})
		err := c.process(t.Context(), &ui{}, c.build(stamp))
		if wrong := c.working(); wrong != nil {
			t.Fatalf("%s refused: %v", c.Calls()[before+n], wrong)
		}
		if len(c.Calls())-before <= n {
			if err != nil {
				t.Fatal(err)
			}
			break
		}
		// What goes wrong while room is made for disks is no reason to stop.
		if err != nil && !strings.Contains(err.Error(), "refused by the test") {
			t.Errorf("%s refused: %v", c.Calls()[before+n], err)
		}
		refused++
	}
	t.Logf("%d calls refused", refused)
	if refused < 12 {
		t.Errorf("a run has %d calls only", refused)
	}
	// The fault of the last run has not come up yet.
	if err := c.process(t.Context(), &ui{}, artifact(imageName(stamp))); err != nil && !strings.Contains(err.Error(), "refused by the test") {
		t.Error(err)
	}
	c.settle(stamp, nodes)
}

// TestAbsentCluster has one cluster that does not answer.
func TestAbsentCluster(t *testing.T) {
	c := newCloud(t, "absent", administrator(t))
	c.tidy()
	addNode(t, "xa", zoneA)
	c.AddCluster(project, &containerpb.Cluster{
		Name: "broker-europe-west4", Location: "europe-west4", Endpoint: "127.0.0.1:1",
		NodePools: []*containerpb.NodePool{{Locations: []string{"europe-west4-a"}}},
	})
	u := &ui{}
	err := c.process(t.Context(), u, c.build(1))
	if err == nil || !strings.HasPrefix(err.Error(), "1 of 2 clusters failed: cluster europe-west4/broker-europe-west4: it does not answer: ") {
		t.Errorf("error is %v", err)
	}
	c.waitGenerations(map[string]string{"xa": c.diskName(zoneA, 1)})
	c.wantResources(image(1), c.disk(zoneA, 1), c.disk(zoneB, 1))

	// It keeps no image that no disk was made from.
	for stamp := 2; stamp <= 3; stamp++ {
		if err := c.process(t.Context(), u, c.build(stamp), "keep", 1); err == nil || !strings.HasPrefix(err.Error(), "1 of 2 clusters failed: ") {
			t.Errorf("error is %v", err)
		}
	}
	c.wantResources(image(1), image(3), c.disk(zoneA, 1), c.disk(zoneA, 3), c.disk(zoneB, 3))

	// Left out, nothing is wrong.
	c.must(artifact(imageName(3)), "exclude_regions", []string{"europe-west4"})

	if err := c.process(t.Context(), u, artifact(imageName(3)), "zones", []string{zoneA, "europe-west4-b"}); err == nil ||
		err.Error() != `no cluster with a name like "^broker-" has nodes in europe-west4-b; drop it from zones, or check cluster_pattern and exclude_regions` {
		t.Errorf("error is %v", err)
	}
	if err := c.process(t.Context(), u, artifact(imageName(3)), "cluster_pattern", "^none"); err == nil ||
		!strings.Contains(err.Error(), `project p has no running cluster with a name like "^none"`) {
		t.Errorf("error is %v", err)
	}
	c.Deny("container.clusters.list")
	if err := c.process(t.Context(), u, artifact(imageName(3))); err == nil ||
		!strings.Contains(err.Error(), "the permission container.clusters.list is missing, grant roles/container.clusterViewer (403)") {
		t.Errorf("error is %v", err)
	}
}

// TestDroppedZone drops a zone, which keeps the generation that it has.
func TestDroppedZone(t *testing.T) {
	c := newCloud(t, "dropped", administrator(t))
	c.tidy()
	c.must(c.build(1))
	for stamp := 2; stamp <= 3; stamp++ {
		c.must(c.build(stamp), "zones", []string{zoneA}, "keep", 1)
	}
	if err := c.working(); err != nil {
		t.Error(err)
	}
	c.waitObjects(slices.Concat(c.three(zoneB, 1), c.three(zoneA, 3))...)
	c.wantResources(image(1), image(3), c.disk(zoneB, 1), c.disk(zoneA, 3))
}

// TestReleasedVolume has a run find a volume whose claim was deleted, as after an
// interrupt between the two.
func TestReleasedVolume(t *testing.T) {
	c := newCloud(t, "released", administrator(t))
	c.tidy()
	c.must(c.build(1))
	name := c.diskName(zoneA, 1)
	world.Output(t, "delete", "daemonset,persistentvolumeclaim", "-n", namespace, name)
	cluster.Wait(t, "the volume to be released", func(ctx context.Context) error {
		v, err := world.Client.CoreV1().PersistentVolumes().Get(ctx, name, metav1.GetOptions{})
		if err == nil && v.Status.Phase != corev1.VolumeReleased {
			err = fmt.Errorf("it is %s", v.Status.Phase)
		}
		return err
	})
	c.must(artifact(imageName(1)))
	if err := c.working(); err != nil {
		t.Error(err)
	}
}

// TestStuckDisk has a disk that cannot be deleted. New generations come to the nodes
// all the same, and the build says what is wrong.
func TestStuckDisk(t *testing.T) {
	c := newCloud(t, "stuck", administrator(t))
	c.tidy()
	c.must(c.build(1), "keep", 1)
	c.Deny("compute.disks.delete")
	for stamp := 2; stamp <= 3; stamp++ {
		err := c.process(t.Context(), &ui{}, c.build(stamp), "keep", 1)
		if err == nil || !strings.Contains(err.Error(), "deleting disk "+c.diskName(zoneA, 1)+": ") || !strings.Contains(err.Error(), "grant roles/compute.storageAdmin") {
			t.Errorf("error is %v", err)
		}
		c.waitObjects(slices.Concat(c.three(zoneA, stamp), c.three(zoneB, stamp))...)
	}
	c.Allow("compute.disks.delete")
	c.must(artifact(imageName(3)), "keep", 1)
	c.wantResources(image(3), c.disk(zoneA, 3), c.disk(zoneB, 3))
}
