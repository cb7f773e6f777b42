//go:build e2e

package pipeline_test

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"cloud.google.com/go/compute/apiv1/computepb"
	"cloud.google.com/go/container/apiv1/containerpb"
	"github.com/google/go-cmp/cmp"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/selkies-project/packer-plugin-selkies/e2e/cluster"
	"github.com/selkies-project/packer-plugin-selkies/e2e/gcp"
	"github.com/selkies-project/packer-plugin-selkies/e2e/host"
)

// TestPipeline runs the whole template five times. The first generation comes to a
// node, the second, with one image changed, to a later node while the first goes on,
// the third starts from nothing, the fourth finds the first node gone, and the last goes
// back to the second. Pods of the cached images start without a pull.
func TestPipeline(t *testing.T) {
	c := newCloud(t, administrator(t))
	c.addBroker([]string{zone})
	c.attachVolumes(t)
	stable := push(t, world.registry, "stable:1", world.busybox, newLayer(t))
	app := push(t, world.registry, "app:1", world.busybox, newLayer(t))

	world.registry.Reset()
	kept := t.TempDir()
	report, copied := filepath.Join(kept, "cache.html"), filepath.Join(kept, "manifest.json")
	c.run(t, "-var", traces(world.registry.Addr+"/app:1"), "-var", "injector="+world.injector, "-var", "report="+report, "-var", "manifest_output="+copied)
	checkFetched(t, world.registry.Reset(), stable, app)
	for _, file := range []string{report, copied} {
		if fi, err := os.Stat(file); err != nil || fi.Size() == 0 {
			t.Errorf("the build keeps no %s: %v", file, err)
		}
	}
	first := c.node(t)
	cluster.Wait(t, "the agent to read the recorded start ahead", func(ctx context.Context) error {
		log, err := world.Kubectl(ctx, "logs", "-n", "selkies-image-cache", "-l", "app.kubernetes.io/name=selkies-image-injector", "--tail=-1")
		if err == nil && !strings.Contains(log, `msg="read ahead"`) {
			err = errors.New(log)
		}
		return err
	})
	c.startPods(t, first)
	checkNotFetched(t, stable, app)

	changed := push(t, world.registry, "app:1", world.busybox, newLayer(t))
	world.registry.Reset()
	c.run(t)
	checkFetched(t, world.registry.Reset(), layersOf(t, changed)[1])
	second := c.node(t)
	c.startPods(t, second)
	checkNotFetched(t, stable, changed)
	if a, b := c.diskOf(t, first), c.diskOf(t, second); a == b || a == "" || b == "" {
		t.Errorf("the nodes have the disks %q and %q", a, b)
	}
	c.checkPods(t, first)
	before := c.Resources()

	world.registry.Reset()
	c.run(t, "-var", "rebuild=true")
	checkFetched(t, world.registry.Reset(), stable, changed)
	// The first generation is one more than is kept, but in use.
	for _, r := range before {
		if !slices.Contains(c.Resources(), r) {
			t.Errorf("%s is gone", r)
		}
	}
	c.checkPods(t, first)

	old := c.diskOf(t, first)
	third := c.Resources()
	c.removeNode(t, first)
	c.run(t)
	gone := []string{
		"projects/broker/global/images/" + imageOf(old),
		"projects/broker/zones/us-central1-a/disks/" + old,
		"projects/broker/zones/us-central1-a/instances/" + first.Name,
	}
	for _, r := range third {
		if slices.Contains(c.Resources(), r) == slices.Contains(gone, r) {
			t.Errorf("after the last run %s is there: %v", r, slices.Contains(c.Resources(), r))
		}
	}
	if n := len(c.Resources()); n != len(third)-len(gone)+2 { // an image and a disk are new
		t.Errorf("there are %d resources: %v", n, c.Resources())
	}
	if out := world.Output(t, "get", "persistentvolumes,persistentvolumeclaims,daemonsets", "-A", "-o", "name"); strings.Contains(out, old) {
		t.Errorf("the cluster has\n%s", out)
	}
	c.checkPods(t, second)

	// A rollback builds nothing.
	fourth := c.Resources()
	back := imageOf(c.diskOf(t, second))
	if out, want := c.run(t, "-var", "rollback_to="+back), "Image "+back+" is on 1 disks, in 1 clusters"; !strings.Contains(out, want) {
		t.Errorf("Packer does not say %q", want)
	}
	if diff := cmp.Diff(fourth, c.Resources()); diff != "" {
		t.Errorf("the rollback changed (-before +after):\n%s", diff)
	}

	// An injector that nodes cannot run leaves them as they are.
	out, err := c.rollOut(t, back, world.registry.Addr+"/stable:1")
	if want := "no pod of DaemonSet selkies-image-cache-gate was ready after 10s: pod selkies-image-cache-gate-"; err == nil || !strings.Contains(out, want) {
		t.Errorf("Packer does not say %q: %v\n%s", want, err, out)
	}
	cluster.Wait(t, "the pods that do not start to go", func(ctx context.Context) error {
		pods, err := world.Client.CoreV1().Pods("").List(ctx, metav1.ListOptions{FieldSelector: "spec.nodeName=" + second.Name})
		if err == nil && len(pods.Items) > len(cached)+2 {
			err = fmt.Errorf("there are %d", len(pods.Items))
		}
		return err
	})
	c.checkPods(t, second)
}

// rollOut rolls an image out with another injector, and returns what Packer said.
func (c *cloud) rollOut(t *testing.T, image, injector string) (string, error) {
	t.Helper()
	template := filepath.Join(t.TempDir(), "template.pkr.hcl")
	text := fmt.Sprintf(`
source "null" "none" {
  communicator = "none"
}

build {
  sources = ["source.null.none"]

  post-processor "selkies-image-cache" {
    project_id       = %q
    image_name       = %q
    cluster_pattern  = "^broker-"
    injector_image   = %q
    start_timeout    = "10s"
    access_token     = %q
    custom_endpoints = { compute = "%[5]s/compute/v1/", container = "%[5]s/" }
  }
}
`, project, image, injector, c.token, c.URL)
	if err := os.WriteFile(template, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := packerCommand(t.Context(), "build", template).CombinedOutput()
	return strings.Join(strings.Fields(string(out)), " "), err
}

// TestDryRun runs the template for the list of images alone. One is from a catalog.
func TestDryRun(t *testing.T) {
	c := newCloud(t, "ya29.dryrun")
	before := c.Resources()
	listed := push(t, world.registry, "stable:1", newLayer(t))
	found := push(t, world.registry, "apps/found:latest", newLayer(t))
	world.registry.Reset()
	out := c.run(t, "-var", "dry_run=true", "-var", "images="+hclList(world.registry.Addr+"/stable:1"), "-var", "repositories="+world.registry.Addr+"/apps")
	checkNotFetched(t, listed, found)
	for _, ref := range []string{"/stable:1", "/apps/found:latest"} {
		if !strings.Contains(out, world.registry.Addr+ref+" ") {
			t.Errorf("the list does not have %s", ref)
		}
	}
	if diff := cmp.Diff(before, c.Resources()); diff != "" {
		t.Errorf("left over (-want +got):\n%s", diff)
	}
}

// administrator is the token of an account of the cluster that may do everything, as
// Google's access tokens are good for the clusters too.
func administrator(t *testing.T) string {
	t.Helper()
	account := strings.ToLower(strings.ReplaceAll(t.Name(), "/", "-"))
	world.Output(t, "create", "serviceaccount", account)
	world.Output(t, "create", "clusterrolebinding", account, "--clusterrole=cluster-admin", "--serviceaccount=default:"+account)
	return strings.TrimSpace(world.Output(t, "create", "token", account))
}

// addBroker adds a GKE cluster with nodes in the zones, which is the real one.
func (c *cloud) addBroker(zones []string) {
	c.AddCluster(project, &containerpb.Cluster{
		Name: "broker-us-central1", Location: "us-central1",
		Endpoint:   strings.TrimPrefix(world.config.Host, "https://"),
		MasterAuth: &containerpb.MasterAuth{ClusterCaCertificate: base64.StdEncoding.EncodeToString(world.config.CAData)},
		NodePools:  []*containerpb.NodePool{{Name: "tier1", Locations: zones}},
	})
}

// cached are the images of the cache.
var cached = []string{"stable:1", "app:1"}

// template makes a packer build of the example template as it is, with variables only.
func (c *cloud) template(t *testing.T, args ...string) *exec.Cmd {
	t.Helper()
	template, err := filepath.Abs(filepath.Join(examples, "image-cache.pkr.hcl"))
	if err != nil {
		t.Fatal(err)
	}
	var refs []string
	for _, image := range cached {
		refs = append(refs, world.registry.Addr+"/"+image)
	}
	args = append([]string{"build", "-var", "project_id=" + project, "-var", "zone=" + zone, "-var", "cluster_pattern=^broker-", "-var", "disk_size_gb=20",
		"-var", "access_token=" + c.token, "-var", fmt.Sprintf(`custom_endpoints={ compute = "%[1]s/compute/v1/", container = "%[1]s/" }`, c.URL),
		"-var", "images=" + hclList(refs...), "-var", "injector_image=" + world.registry.Addr + "/injector:1"}, args...)
	cmd := packerCommand(t.Context(), append(args, template)...)
	cmd.Dir = t.TempDir()
	return cmd
}

// traces sets the template's variable: a start of an image to be recorded.
func traces(image string) string {
	return fmt.Sprintf(`traces=[{ image = %q, command = ["/bin/busybox", "true"], seconds = 5 }]`, image)
}

// run runs such a build and returns what Packer said.
func (c *cloud) run(t *testing.T, args ...string) string {
	t.Helper()
	cmd := c.template(t, args...)
	log := filepath.Join(cmd.Dir, "log")
	cmd.Env = append(cmd.Env, "PACKER_LOG=1", "PACKER_LOG_PATH="+log)
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("packer build: %v\n%s", err, out)
	}
	logged, err := os.ReadFile(log)
	if err != nil || !strings.Contains(string(logged), "packer-plugin-selkies") {
		t.Errorf("Packer's log is %q, %v", logged, err)
	}
	for where, text := range map[string]string{"output": string(out), "log": string(logged)} {
		if strings.Contains(text, c.token) {
			t.Errorf("the access token is in Packer's %s", where)
		}
	}
	t.Logf("packer build:\n%s", out)
	return string(out)
}

// node is a node of the zone, which waits for its images before it takes pods.
func (c *cloud) node(t *testing.T) *cluster.Node {
	t.Helper()
	const taint = "startup-taint.cluster-autoscaler.kubernetes.io/selkies-image-cache"
	n := world.Node(t, cluster.NodeConfig{
		Taints: []corev1.Taint{{Key: taint, Value: "true", Effect: corev1.TaintEffectNoSchedule}},
		Labels: map[string]string{corev1.LabelTopologyZone: zone},
	})
	c.serveDisks(t, n, zone)
	n.WaitTaint(t, taint, false)
	return n
}

// diskOf is the cache disk that a node says it has.
func (c *cloud) diskOf(t *testing.T, n *cluster.Node) string {
	t.Helper()
	node, err := world.Client.CoreV1().Nodes().Get(t.Context(), n.Name, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return node.Labels["app.broker/cache-pd"]
}

// imageOf is the image that a cache disk was made from.
func imageOf(disk string) string {
	return "selkies-image-cache-" + disk[strings.LastIndex(disk, "-")+1:]
}

// startPods starts a pod of each cached image on a node and waits for them.
func (c *cloud) startPods(t *testing.T, n *cluster.Node) {
	t.Helper()
	for _, image := range cached {
		name := n.Name + "-" + strings.ReplaceAll(image, ":", "-")
		world.Run(t, &corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{Name: name, Namespace: "default"},
			Spec: corev1.PodSpec{
				NodeName: n.Name,
				Containers: []corev1.Container{{
					Name: "main", Image: world.registry.Addr + "/" + image, ImagePullPolicy: corev1.PullIfNotPresent,
					Command: []string{"/bin/busybox", "sleep", "infinity"},
				}},
				TerminationGracePeriodSeconds: new(int64),
			},
		})
		world.WaitPodReady(t, "default", name)
	}
}

// checkPods fails the test if a node's pods have not gone on all the time.
func (c *cloud) checkPods(t *testing.T, n *cluster.Node) {
	t.Helper()
	pods, err := world.Client.CoreV1().Pods("").List(t.Context(), metav1.ListOptions{FieldSelector: "spec.nodeName=" + n.Name})
	if err != nil {
		t.Fatal(err)
	}
	if len(pods.Items) != len(cached)+2 { // and the agent and the gate
		t.Errorf("%s has %d pods", n.Name, len(pods.Items))
	}
	for _, p := range pods.Items {
		if p.Status.Phase != corev1.PodRunning || p.Status.ContainerStatuses[0].RestartCount > 0 {
			t.Errorf("pod %s of %s is %+v", p.Name, n.Name, p.Status)
		}
	}
}

// removeNode ends a node as an autoscaler does that gives an instance back.
func (c *cloud) removeNode(t *testing.T, n *cluster.Node) {
	t.Helper()
	if err := n.Machine.Kill(); err != nil {
		t.Fatal(err)
	}
	// What kubelet says when it has shut down in order. Without it the controller
	// manager waits for six minutes before it takes a node's volumes away.
	world.Output(t, "patch", "node", n.Name, "--subresource=status", "--type=merge", "-p", `{"status":{"volumesInUse":null}}`)
	if err := n.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	cluster.Wait(t, n.Name+" to lose its volumes", func(ctx context.Context) error {
		list, err := world.Client.StorageV1().VolumeAttachments().List(ctx, metav1.ListOptions{})
		if err != nil {
			return err
		}
		for _, v := range list.Items {
			if v.Spec.NodeName == n.Name {
				return fmt.Errorf("it has %s", *v.Spec.Source.PersistentVolumeName)
			}
		}
		return nil
	})
	op, err := c.Clients(t).Instances.Delete(t.Context(), &computepb.DeleteInstanceRequest{Project: project, Zone: zone, Instance: n.Name})
	gcp.Wait(t, op, err)
}

// checkNotFetched fails the test if a layer of the images was fetched since the last
// Reset of the registry.
func checkNotFetched(t *testing.T, images ...v1.Image) {
	t.Helper()
	count := world.registry.Reset()
	for _, i := range images {
		for _, l := range layersOf(t, i) {
			if slices.Contains(count.Blobs, l) {
				t.Errorf("a node fetched layer %s", l)
			}
		}
	}
}

// TestTemplates has Packer look at every template of the project.
func TestTemplates(t *testing.T) {
	t.Parallel()
	key := filepath.Join(t.TempDir(), "key")
	if _, err := host.Output(exec.CommandContext(t.Context(), "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", key)); err != nil {
		t.Fatal(err)
	}
	variables := map[string][]string{ // those that have no default
		"gke": {"project_id=broker", "zone=us-central1-a", "cluster_pattern=^broker-", "injector_image=registry.example/injector:1", "repositories=registry.example/apps registry.example/games",
			traces("registry.example/apps/app:1"), "injector=" + world.injector, "report=cache.html", "manifest_output=manifest.json"},
		"local": {`images=["debian:12"]`, "device=/dev/sdb", "ssh_host=localhost", "ssh_private_key_file=" + key},
	}
	templates, err := filepath.Glob("../../example/*/*.pkr.hcl")
	if err != nil {
		t.Fatal(err)
	}
	if len(templates) != len(variables) {
		t.Errorf("there are %d templates, %q", len(templates), templates)
	}
	for _, template := range templates {
		example := filepath.Base(filepath.Dir(template))
		t.Run(example, func(t *testing.T) {
			validate := []string{"validate"}
			for _, v := range variables[example] {
				validate = append(validate, "-var", v)
			}
			for _, args := range [][]string{{"fmt", "-check", "-diff"}, validate} {
				if out, err := packerCommand(t.Context(), append(args, template)...).CombinedOutput(); err != nil {
					t.Errorf("packer %v: %v\n%s", args, err, out)
				}
			}
		})
	}
}
