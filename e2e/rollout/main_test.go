//go:build e2e

// Package rollout_test runs the post-processor and the data source of apps against a
// real API server, controller manager and scheduler. Google's APIs are the fake ones,
// and nodes are objects without a kubelet, so that the tests say when one comes and
// goes, and which pods start.
package rollout_test

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"maps"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"cloud.google.com/go/compute/apiv1/computepb"
	"cloud.google.com/go/container/apiv1/containerpb"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	packersdk "github.com/hashicorp/packer-plugin-sdk/packer"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/selkies-project/packer-plugin-selkies/e2e/cluster"
	"github.com/selkies-project/packer-plugin-selkies/e2e/gcp"
	"github.com/selkies-project/packer-plugin-selkies/e2e/host"
	"github.com/selkies-project/packer-plugin-selkies/e2e/registry"
	"github.com/selkies-project/packer-plugin-selkies/post-processor/imagecache"
)

const (
	project   = "p"
	namespace = "selkies-image-cache"
	diskLabel = "app.broker/cache-pd"
	zoneLabel = "topology.kubernetes.io/zone"
	zoneA     = "us-central1-a"
	zoneB     = "us-central1-b"
)

// world is what all tests share.
var world struct {
	*cluster.Cluster
	config *rest.Config
	// packer is Packer's program, plugin the one that it has installed.
	packer, plugin string
	// injector is the image of the agents, pinned the same by its digest. Nothing is in
	// it: there is no kubelet to run it.
	injector, pinned string
	kubelet          *kubelet
	registry         *registry.Registry
}

func TestMain(m *testing.M) {
	cluster.Main(
		func(ctx context.Context, dir string) error { return host.Build(ctx, ".", pluginIn(dir)) },
		func(ctx context.Context, dir string) (int, error) { return run(ctx, dir, m) })
}

func pluginIn(dir string) string { return filepath.Join(dir, "packer-plugin-selkies") }

func run(ctx context.Context, dir string, m *testing.M) (int, error) {
	tools, err := host.Tool(ctx, "packer")
	if err != nil {
		return 1, err
	}
	world.packer, world.plugin = filepath.Join(tools, "packer"), pluginIn(dir)
	install := exec.CommandContext(ctx, world.packer, "plugins", "install", "--path", world.plugin, "github.com/selkies-project/selkies")
	install.Env = packerEnv()
	if _, err := host.Output(install); err != nil {
		return 1, err
	}
	c, err := cluster.Start(ctx, cluster.Config{Dir: dir})
	if err != nil {
		return 1, err
	}
	defer c.Stop()
	world.Cluster = c
	if world.config, err = clientcmd.BuildConfigFromFlags("", c.Kubeconfig); err != nil {
		return 1, err
	}
	reg, err := registry.Start(registry.Config{Dir: filepath.Join(dir, "blobs")})
	if err != nil {
		return 1, err
	}
	defer reg.Stop()
	world.registry = reg
	if world.injector, world.pinned, err = pushInjector(reg, "1"); err != nil {
		return 1, err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	world.kubelet = &kubelet{}
	go world.kubelet.run(ctx)
	return m.Run(), nil
}

// pushInjector pushes an image with the tag.
func pushInjector(reg *registry.Registry, tag string) (ref, pinned string, err error) {
	image, err := mutate.ConfigFile(empty.Image, &v1.ConfigFile{OS: "linux", Architecture: "amd64", Author: tag})
	if err != nil {
		return "", "", err
	}
	digest, err := image.Digest()
	if err != nil {
		return "", "", err
	}
	repository := reg.Addr + "/injector"
	r, err := name.NewTag(repository + ":" + tag)
	if err != nil {
		return "", "", err
	}
	return r.String(), repository + "@" + digest.String(), remote.Write(r, image)
}

// cloud is a Google Cloud project with the cluster in it.
type cloud struct {
	*gcp.Server
	t       *testing.T
	name    string // of the cache
	token   string
	cluster *containerpb.Cluster // GKE's record of it
}

// newCloud makes a project. account names a service account of the cluster, whose
// token is the access token.
func newCloud(t *testing.T, name, account string) *cloud {
	t.Helper()
	c := &cloud{t: t, name: name, token: strings.TrimSpace(world.Output(t, "create", "token", "-n", "default", account))}
	c.Server = gcp.New(t, gcp.Config{Token: c.token})
	ca := world.config.CAData
	if len(ca) == 0 {
		t.Fatal("the kubeconfig has no certificate")
	}
	c.cluster = &containerpb.Cluster{
		Name: "broker-us-central1", Location: "us-central1",
		Endpoint:   strings.TrimPrefix(world.config.Host, "https://"),
		MasterAuth: &containerpb.MasterAuth{ClusterCaCertificate: base64.StdEncoding.EncodeToString(ca)},
		NodePools:  []*containerpb.NodePool{{Name: "tier1", Locations: []string{zoneA}}, {Name: "gpu", Locations: []string{zoneA, zoneB}}},
	}
	c.AddCluster(project, c.cluster)
	return c
}

// administrator makes a service account that may do everything.
func administrator(t *testing.T) string {
	t.Helper()
	account := "admin-" + strings.ToLower(strings.ReplaceAll(t.Name(), "/", "-"))
	world.Output(t, "create", "serviceaccount", "-n", "default", account)
	world.Output(t, "create", "clusterrolebinding", account, "--clusterrole=cluster-admin", "--serviceaccount=default:"+account)
	return account
}

// build is what the googlecompute builder leaves.
func (c *cloud) build(stamp int) packersdk.Artifact {
	name := imageName(stamp)
	c.AddImage(project, &computepb.Image{Name: &name, Family: new("selkies-image-cache"), DiskSizeGb: new(int64(20))})
	return artifact(name)
}

func artifact(image string) packersdk.Artifact {
	return &packersdk.MockArtifact{BuilderIdValue: "packer.googlecompute", IdValue: image, StateValues: map[string]any{"ProjectId": project}}
}

func imageName(stamp int) string { return fmt.Sprintf("selkies-image-cache-%d", 1700000000+stamp) }

func (c *cloud) diskName(zone string, stamp int) string {
	return fmt.Sprintf("%s-%s-%d", c.name, zone, 1700000000+stamp)
}

// ui keeps what is said and can end a run at the nth thing that it does.
type ui struct {
	packersdk.Ui
	lines []string
	said  func(line string)
}

func (u *ui) Say(line string) {
	u.lines = append(u.lines, line)
	if u.said != nil {
		u.said(line)
	}
	u.Ui.Say(line)
}

func (c *cloud) options(kv ...any) map[string]any {
	o := map[string]any{
		"cache_name": c.name, "access_token": c.token, "injector_image": world.injector, "cluster_pattern": "^broker-",
		"custom_endpoints": map[string]string{"compute": c.URL + "/compute/v1/", "container": c.URL},
	}
	for i := 0; i < len(kv); i += 2 {
		o[kv[i].(string)] = kv[i+1]
	}
	return o
}

// process runs the post-processor.
func (c *cloud) process(ctx context.Context, u *ui, a packersdk.Artifact, kv ...any) error {
	c.t.Helper()
	u.Ui = packersdk.TestUi(c.t)
	var p imagecache.PostProcessor
	if err := p.Configure(c.options(kv...)); err != nil {
		c.t.Fatal(err)
	}
	_, keep, force, err := p.PostProcess(ctx, u, a)
	if !keep || !force {
		c.t.Error("the image is not kept")
	}
	if err != nil && strings.Contains(err.Error(), "\n") {
		c.t.Errorf("error has several lines: %v", err)
	}
	return err
}

// must runs the post-processor to its end.
func (c *cloud) must(a packersdk.Artifact, kv ...any) *ui {
	c.t.Helper()
	u := &ui{}
	if err := c.process(c.t.Context(), u, a, kv...); err != nil {
		c.t.Fatal(err)
	}
	return u
}

// changes are the calls so far that change something.
func (c *cloud) changes() []string {
	return slices.DeleteFunc(c.Calls(), func(call string) bool {
		method, _, _ := strings.Cut(call, " ")
		return !slices.Contains([]string{"insert", "delete", "setLabels"}, method[strings.LastIndex(method, ".")+1:])
	})
}

// addNode makes a node in a zone, as autoscaling would, with a label app.broker/tier if
// one is given.
func addNode(t *testing.T, name, zone string, tier ...string) {
	t.Helper()
	capacity := corev1.ResourceList{
		corev1.ResourceCPU: resource.MustParse("4"), corev1.ResourceMemory: resource.MustParse("8Gi"), corev1.ResourcePods: resource.MustParse("110"),
	}
	node := &corev1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: name, Labels: map[string]string{
			zoneLabel: zone, "topology.gke.io/zone": zone, "kubernetes.io/hostname": name, "kubernetes.io/os": "linux",
		}},
		Status: corev1.NodeStatus{Capacity: capacity, Allocatable: capacity, Conditions: []corev1.NodeCondition{{Type: corev1.NodeReady, Status: corev1.ConditionTrue}}},
	}
	for _, value := range tier {
		node.Labels["app.broker/tier"] = value
	}
	if _, err := world.Client.CoreV1().Nodes().Create(t.Context(), node, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { removeNode(t, name) })
}

// removeNode removes a node and its pods, which on a real one kubelet ends.
func removeNode(t *testing.T, name string) {
	t.Helper()
	ctx := context.Background() // also at a test's end
	if err := world.Client.CoreV1().Nodes().Delete(ctx, name, metav1.DeleteOptions{}); err != nil && !apierrors.IsNotFound(err) {
		t.Error(err)
	}
	pods, err := world.Client.CoreV1().Pods(namespace).List(ctx, metav1.ListOptions{FieldSelector: "spec.nodeName=" + name})
	if err != nil {
		t.Error(err)
		return
	}
	for _, p := range pods.Items {
		endPod(t, p.Name)
	}
}

// endPod is what kubelet does with a pod that is to end.
func endPod(t *testing.T, name string) {
	t.Helper()
	err := world.Client.CoreV1().Pods(namespace).Delete(context.Background(), name, metav1.DeleteOptions{GracePeriodSeconds: new(int64(0))})
	if err != nil && !apierrors.IsNotFound(err) {
		t.Error(err)
	}
}

// agents, with the name of a cache, finds its agents' pods, without those of its gate.
const agents = "app.kubernetes.io/name=selkies-image-injector,app.kubernetes.io/instance="

// generations are the disks whose agents nodes have, by node. There must be one
// agent on each node, and none that waits for a node.
func generations(ctx context.Context, prefix string) (map[string]string, error) {
	pods, err := world.Client.CoreV1().Pods(namespace).List(ctx, metav1.ListOptions{LabelSelector: agents + prefix})
	if err != nil {
		return nil, err
	}
	got := map[string]string{}
	for _, p := range pods.Items {
		switch {
		case p.DeletionTimestamp != nil:
			continue
		case p.Spec.NodeName == "":
			return nil, fmt.Errorf("pod %s of disk %s has no node", p.Name, p.Labels[diskLabel])
		case got[p.Spec.NodeName] != "":
			return nil, fmt.Errorf("node %s has %s and %s", p.Spec.NodeName, got[p.Spec.NodeName], p.Labels[diskLabel])
		}
		got[p.Spec.NodeName] = p.Labels[diskLabel]
	}
	return got, nil
}

// waitGenerations waits until every node has an agent with the right disk.
func (c *cloud) waitGenerations(want map[string]string) {
	c.t.Helper()
	cluster.Wait(c.t, "the agents to be where they should", func(ctx context.Context) error {
		got, err := generations(ctx, c.name)
		if err != nil {
			return err
		}
		if !maps.Equal(got, want) {
			return fmt.Errorf("nodes have %v, want %v", got, want)
		}
		return nil
	})
}

// objects are the names of all objects that the cache has in the cluster for its disks,
// sorted, with the versions of their specifications if wanted.
func (c *cloud) objects(versions bool) []string {
	c.t.Helper()
	template := `{{range .items}}{{.kind}}/{{.metadata.name}}{{if .metadata.deletionTimestamp}} ending{{end}}{{"\n"}}{{end}}`
	if versions {
		template = `{{range .items}}{{.kind}}/{{.metadata.name}} {{.metadata.resourceVersion}}{{"\n"}}{{end}}`
	}
	out := world.Output(c.t, "get", "daemonsets,persistentvolumes,persistentvolumeclaims", "-n", namespace,
		"-l", "selkies.io/zone,app.kubernetes.io/instance="+c.name, "-o", "go-template="+template)
	return slices.Sorted(slices.Values(strings.Fields(strings.ReplaceAll(out, " ", "@"))))
}

// waitObjects waits until exactly these objects are there: deletion takes the
// controllers a moment.
func (c *cloud) waitObjects(want ...string) {
	c.t.Helper()
	slices.Sort(want)
	cluster.Wait(c.t, "the objects of the cache", func(context.Context) error {
		if got := c.objects(false); !slices.Equal(got, want) {
			return fmt.Errorf("got %q, want %q", got, want)
		}
		return nil
	})
}

// three are the names of a generation's objects in a zone.
func (c *cloud) three(zone string, stamp int) []string {
	name := c.diskName(zone, stamp)
	return append(c.two(zone, stamp), "DaemonSet/"+name)
}

// two are those without the DaemonSet.
func (c *cloud) two(zone string, stamp int) []string {
	name := c.diskName(zone, stamp)
	return []string{"PersistentVolume/" + name, "PersistentVolumeClaim/" + name}
}

// working fails unless in each zone some generation takes new nodes, and has its disk.
func (c *cloud) working() error {
	sets, err := world.Client.AppsV1().DaemonSets(namespace).List(c.t.Context(), metav1.ListOptions{LabelSelector: "selkies.io/zone,app.kubernetes.io/instance=" + c.name})
	if err != nil {
		return err
	}
	open := map[string]int{}
	for _, ds := range sets.Items {
		if len(ds.Spec.Template.Spec.Affinity.NodeAffinity.RequiredDuringSchedulingIgnoredDuringExecution.NodeSelectorTerms) > 1 {
			claim, err := world.Client.CoreV1().PersistentVolumeClaims(namespace).Get(c.t.Context(), ds.Name, metav1.GetOptions{})
			if err != nil || claim.Status.Phase != corev1.ClaimBound {
				return fmt.Errorf("claim of %s is not usable: %w", ds.Name, errors.Join(err, errors.New(string(claim.Status.Phase))))
			}
			volume, err := world.Client.CoreV1().PersistentVolumes().Get(c.t.Context(), claim.Spec.VolumeName, metav1.GetOptions{})
			if err != nil || !slices.Contains(c.Resources(), volume.Spec.CSI.VolumeHandle) {
				return fmt.Errorf("the disk of %s is gone: %w", ds.Name, errors.Join(err, errors.New(claim.Spec.VolumeName)))
			}
			open[ds.Labels["selkies.io/zone"]]++
		}
	}
	for _, zone := range []string{zoneA, zoneB} {
		if open[zone] == 0 {
			return fmt.Errorf("no generation takes new nodes in %s", zone)
		}
	}
	return nil
}

// tidy removes what a test leaves in the cluster.
func (c *cloud) tidy() {
	c.t.Cleanup(func() {
		ctx := context.Background()
		for _, kind := range []string{"daemonsets", "persistentvolumeclaims", "persistentvolumes"} {
			if out, err := world.Kubectl(ctx, "delete", kind, "-n", namespace, "-l", "app.kubernetes.io/instance="+c.name, "--wait=false"); err != nil {
				c.t.Error(out, err)
			}
		}
		if out, err := world.Kubectl(ctx, "delete", "pods", "-n", namespace, "--all", "--force", "--grace-period=0"); err != nil {
			c.t.Error(out, err)
		}
	})
}
