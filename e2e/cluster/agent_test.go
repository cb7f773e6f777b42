//go:build e2e

package cluster_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/selkies-project/packer-plugin-selkies/e2e/cluster"
	"github.com/selkies-project/packer-plugin-selkies/e2e/host"
	"github.com/selkies-project/packer-plugin-selkies/e2e/machine"
)

const (
	agentNamespace = "selkies-image-cache"
	agentCondition = corev1.NodeConditionType("SelkiesImageCacheReady")
	// agentPods selects the agent's pods; the gate's are in the same namespace.
	agentPods = "app.kubernetes.io/name=selkies-image-injector"
	// firstDevice and secondDevice are the names that the cache disks are attached by.
	firstDevice, secondDevice = "first", "second"
)

// deploy applies the agent's manifests, with the injector's image by default, and deletes
// the DaemonSet at the test's end.
func deploy(t testing.TB, a cluster.Agent) {
	t.Helper()
	if a.Image == "" {
		a.Image = ref(injector)
	}
	if err := world.cluster.ApplyAgent(t.Context(), a); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx := context.Background()
		if t.Failed() {
			log, _ := world.cluster.Kubectl(ctx, "logs", "-n", agentNamespace, "daemonset/selkies-image-injector", "--all-containers", "--tail=60")
			pods, _ := world.cluster.Kubectl(ctx, "describe", "pods", "-n", agentNamespace)
			t.Logf("the agent's log:\n%s\nits pods:\n%s", log, pods)
		}
		removeAgent(ctx, t)
	})
}

// removeAgent deletes the DaemonSet and waits for its pods to be gone.
func removeAgent(ctx context.Context, t testing.TB) {
	t.Helper()
	_, err := world.cluster.Kubectl(ctx, "delete", "daemonset", "-n", agentNamespace, "--all", "--cascade=foreground", "--timeout=2m")
	if err != nil {
		t.Error(err)
	}
}

// waitEvent waits for an event that the agent, or the gate, records about a node.
func waitEvent(t *testing.T, n *cluster.Node, reason string) {
	t.Helper()
	cluster.Wait(t, n.Name+" to have the event "+reason, func(ctx context.Context) error {
		list, err := world.cluster.Client.CoreV1().Events(metav1.NamespaceDefault).List(ctx, metav1.ListOptions{
			FieldSelector: "involvedObject.kind=Node,involvedObject.name=" + n.Name + ",source=selkies-image-injector,reason=" + reason,
		})
		if err == nil && len(list.Items) == 0 {
			err = errors.New("there is none")
		}
		return err
	})
}

// inAgent runs the injector in the agent's pod on a node.
func inAgent(t *testing.T, n *cluster.Node, args ...string) string {
	t.Helper()
	return world.cluster.Output(t, append([]string{"exec", "-n", agentNamespace, onlyAgent(t, n).Name, "--", "selkies-image-injector"}, args...)...)
}

// documented runs the block of commands of a document that begins so, with other words in
// the place of some, and returns what they print.
func documented(t *testing.T, page, begin string, replace ...string) string {
	t.Helper()
	out, err := host.Output(documentedCommand(t, page, begin, replace...))
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// documentedCommand is such a block.
func documentedCommand(t *testing.T, page, begin string, replace ...string) *exec.Cmd {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(world.source, page))
	if err != nil {
		t.Fatal(err)
	}
	_, rest, ok := strings.Cut(string(text), "\n    "+begin+"\n")
	if !ok {
		t.Fatalf("%s has no commands that begin with %q", page, begin)
	}
	block, _, _ := strings.Cut("\n"+rest, "\n\n")
	tools, err := host.Tool(t.Context(), "kubernetes")
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), "bash", "-ceu", "-o", "pipefail", strings.NewReplacer(replace...).Replace(begin+block))
	cmd.Env = append(os.Environ(), "PATH="+tools+":"+os.Getenv("PATH"), "KUBECONFIG="+world.cluster.Kubeconfig)
	return cmd
}

// blobsOf are the digests of what a pull of the images fetches as blobs.
func blobsOf(t *testing.T, images ...string) []string {
	t.Helper()
	var digests []string
	for _, image := range images {
		r, err := name.ParseReference(ref(image))
		if err != nil {
			t.Fatal(err)
		}
		img, err := remote.Image(r, remote.WithContext(t.Context()))
		if err != nil {
			t.Fatal(err)
		}
		manifest, err := img.Manifest()
		if err != nil {
			t.Fatal(err)
		}
		digests = append(digests, manifest.Config.Digest.String())
		for _, l := range manifest.Layers {
			digests = append(digests, l.Digest.String())
		}
	}
	return digests
}

// byDigest is an image's reference by the digest that its tag has now.
func byDigest(t *testing.T, image string) string {
	t.Helper()
	r, err := name.ParseReference(ref(image))
	if err != nil {
		t.Fatal(err)
	}
	desc, err := remote.Head(r, remote.WithContext(t.Context()))
	if err != nil {
		t.Fatal(err)
	}
	return r.Context().Digest(desc.Digest.String()).String()
}

// expectPulls fails the test if blobs of other images were fetched since the last
// Reset of the registry.
func expectPulls(t *testing.T, images ...string) {
	t.Helper()
	count := world.reg.Count()
	allowed := blobsOf(t, images...)
	for _, b := range count.Blobs {
		if !slices.Contains(allowed, b) {
			t.Errorf("blob %s was fetched, which none of %v has; all of it: %+v", b, images, count)
		}
	}
}

// TestAgent has nodes with a cache disk join, one with each containerd: pods of cached
// images wait for the agent and then start without a pull.
func TestAgent(t *testing.T) {
	c := world.cluster
	disk := cluster.Disk{Name: firstDevice, Image: world.first}
	world.reg.Reset()
	var configs []cluster.NodeConfig
	for _, release := range []machine.Release{machine.Upstream, machine.Debian} {
		configs = append(configs, cluster.NodeConfig{Release: release, Taints: []corev1.Taint{cluster.StartupTaint}, Disks: []cluster.Disk{disk}})
	}
	nodes := c.Nodes(t, configs...)
	c.Claim(t, agentNamespace, "image-cache", disk, nodes...)
	ns := c.Namespace(t)
	var pods []string
	run := func(n *cluster.Node, form, image string, policy corev1.PullPolicy) {
		t.Helper()
		name := strings.ToLower(fmt.Sprintf("%s-%s-%s", n.Name, form, policy))
		pod := podOn(n, ns, name, image)
		pod.Spec.Containers[0].ImagePullPolicy = policy
		c.Run(t, pod)
		pods = append(pods, name)
	}
	for _, n := range nodes {
		for form, image := range map[string]string{
			"tag": ref(app), "digest": byDigest(t, app), "index": ref(indexed), "index-digest": byDigest(t, indexed),
		} {
			for _, policy := range []corev1.PullPolicy{corev1.PullIfNotPresent, corev1.PullNever, corev1.PullAlways} {
				run(n, form, image, policy)
			}
		}
	}
	for _, pod := range pods {
		c.WaitPodUnschedulable(t, ns, pod)
	}

	// The gate opens because images are registered.
	deploy(t, cluster.Agent{Component: "pvc", Env: map[string]string{"SELKIES_CACHE_PD": "cache-1", "SELKIES_GATE_DEADLINE": "1h"}})
	for _, n := range nodes {
		n.WaitTaint(t, cluster.StartupTaint.Key, false)
		n.WaitCondition(t, agentCondition)
		n.Wait(t, "have the broker's labels", func(node *corev1.Node) error {
			if node.Labels["app.broker/image-load-initialized"] != "true" || node.Labels["app.broker/cache-pd"] != "cache-1" {
				return fmt.Errorf("its labels are %v", node.Labels)
			}
			return nil
		})
	}
	for _, pod := range pods {
		c.WaitPodReady(t, ns, pod)
	}
	expectPulls(t, sandbox, injector)
	for _, n := range nodes {
		waitEvent(t, n, "Registered")
	}
	for _, n := range nodes {
		if out := c.Output(t, "exec", "-n", ns, n.Name+"-tag-never", "--", "/bin/busybox", "ls", "/"); !strings.Contains(out, "bin") {
			t.Errorf("the root of a pod has %q", out)
		}
		// A pod that pulls always takes the labels from the tag, until the agent has seen it.
		cluster.Wait(t, "status in the agent's pod to list the tag", func(context.Context) error {
			if out := inAgent(t, n, "status"); !strings.Contains(out, ref(app)) {
				return fmt.Errorf("it says %q", out)
			}
			return nil
		})
		for _, page := range []string{"docs/agent.md", "docs/troubleshooting.md"} {
			out := documented(t, page, "NODE=name-of-the-node", "name-of-the-node", n.Name, "registry.example.com/desktop:1.4", ref(app))
			if !regexp.MustCompile(regexp.QuoteMeta(ref(app)) + ` .*\bhit\b`).MatchString(out) {
				t.Errorf("the commands of %s print %q", page, out)
			}
		}
		out := documented(t, "docs/operations.md", "kubectl describe node NODE", "NODE", n.Name)
		for _, want := range []string{string(agentCondition), "selkies-image-injector", " Registered ", "node/" + n.Name} {
			if !strings.Contains(out, want) {
				t.Errorf("the commands of docs/operations.md do not print %q: %s", want, out)
			}
		}
	}
	for begin, want := range map[string]string{
		"kubectl get nodes -L app.broker/cache-pd,app.broker/image-load-initialized":                              "cache-1",
		"kubectl logs -n selkies-image-cache -l app.kubernetes.io/name=selkies-image-injector --tail=-1 --prefix": ref(app) + ": ",
	} {
		if out := documented(t, "docs/operations.md", begin); strings.Count(out, want) < len(nodes) {
			t.Errorf("%s does not print %q for each node: %s", begin, want, out)
		}
	}

	for _, n := range nodes {
		checkAgentProcess(t, n)
	}
	checkPrometheus(t, nodes)

	// Without a registry, all but Always.
	digest := byDigest(t, app)
	if err := world.reg.Stop(); err != nil {
		t.Fatal(err)
	}
	defer world.reg.Start()
	pods = nil
	for _, n := range nodes {
		for form, image := range map[string]string{"offline": ref(app), "offline-digest": digest} {
			run(n, form, image, corev1.PullIfNotPresent)
			run(n, form, image, corev1.PullNever)
		}
	}
	for _, pod := range pods {
		c.WaitPodReady(t, ns, pod)
	}
}
