//go:build e2e

package cluster_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/selkies-project/packer-plugin-selkies/e2e/cluster"
)

// mountSecondary mounts an attached disk as GKE does.
func mountSecondary(t *testing.T, n *cluster.Node, d cluster.Disk) {
	t.Helper()
	if err := n.MountSecondary(t.Context(), d); err != nil {
		t.Fatal(err)
	}
}

// TestGateOpensAtDeadline has nodes whose images cannot be registered: pods start all
// the same, by a pull, and a rollout of the agent is not held up.
func TestGateOpensAtDeadline(t *testing.T) {
	const deadline = 30 * time.Second
	c := world.cluster
	disk := cluster.Disk{Name: firstDevice, Image: world.first}
	tainted := []corev1.Taint{cluster.StartupTaint}
	nodes := c.Nodes(t, cluster.NodeConfig{Taints: tainted}, cluster.NodeConfig{Taints: tainted},
		cluster.NodeConfig{Taints: tainted, Snapshotter: "native", Disks: []cluster.Disk{disk}})
	noDisk, broken, native := nodes[0], nodes[1], nodes[2]
	if err := broken.WriteFile(cluster.SecondaryDisks+"broken/selkies-image-cache/manifest.json", []byte("{"), 0o644); err != nil {
		t.Fatal(err)
	}
	mountSecondary(t, native, disk)
	ns := c.Namespace(t)
	for _, n := range nodes {
		c.Run(t, podOn(n, ns, n.Name, ref(app)))
	}
	for _, n := range nodes {
		c.WaitPodUnschedulable(t, ns, n.Name)
	}
	world.reg.Reset()
	opened := openings(t)
	config := cluster.Agent{Component: "secondary-boot-disk", Env: map[string]string{"SELKIES_GATE_DEADLINE": deadline.String()}, Eager: true}
	deploy(t, config)
	for n, reason := range map[*cluster.Node]string{
		noDisk: "NoCacheDisk", broken: "BrokenManifest", native: "UnsupportedSnapshotter",
	} {
		n.WaitTaint(t, cluster.StartupTaint.Key, false)
		expectOpenedAt(t, n, opened(n), deadline)
		c.WaitPodReady(t, ns, n.Name)
		n.Wait(t, "say "+reason, func(node *corev1.Node) error {
			for _, c := range node.Status.Conditions {
				if c.Type == agentCondition && c.Status == corev1.ConditionFalse && c.Reason == reason {
					return nil
				}
			}
			return fmt.Errorf("its conditions are %+v", node.Status.Conditions)
		})
		n.Wait(t, "not be called initialized", func(node *corev1.Node) error {
			if got := node.Labels["app.broker/image-load-initialized"]; got == "true" {
				return fmt.Errorf("its labels are %v", node.Labels)
			}
			return nil
		})
	}
	fetched := map[string]int{}
	for _, b := range world.reg.Count().Blobs {
		fetched[b]++
	}
	for _, b := range blobsOf(t, app) {
		if got := fetched[b]; got < len(nodes) && !slices.Contains(blobsOf(t, sandbox), b) {
			t.Errorf("blob %s was fetched %d times by %d nodes", b, got, len(nodes))
		}
	}

	config.Image = ref(injectorV2)
	deploy(t, config)
	rolledOut(t)
}

// TestGateOpenedByHand removes the taint as docs/troubleshooting.md says.
func TestGateOpenedByHand(t *testing.T) {
	node := nodeObject(t)
	documented(t, "docs/troubleshooting.md", "kubectl taint node NODE "+cluster.StartupTaint.Key+"-", "NODE", node)
}

// openings notes when nodes lose the startup taint, from now on.
func openings(t *testing.T) (of func(*cluster.Node) time.Time) {
	t.Helper()
	w, err := world.cluster.Client.CoreV1().Nodes().Watch(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(w.Stop)
	var opened sync.Map
	go func() {
		for e := range w.ResultChan() {
			node, ok := e.Object.(*corev1.Node)
			if ok && !slices.ContainsFunc(node.Spec.Taints, func(taint corev1.Taint) bool { return taint.Key == cluster.StartupTaint.Key }) {
				opened.LoadOrStore(node.Name, time.Now())
			}
		}
	}()
	return func(n *cluster.Node) (at time.Time) {
		t.Helper()
		cluster.Wait(t, "news of the gate of "+n.Name, func(context.Context) error {
			v, ok := opened.Load(n.Name)
			if !ok {
				return errors.New("it is shut")
			}
			at = v.(time.Time)
			return nil
		})
		return at
	}
}

// expectOpenedAt fails the test if the gate opened before the deadline, or sooner after
// the agent's start than it is to: at once.
func expectOpenedAt(t *testing.T, n *cluster.Node, opened time.Time, deadline time.Duration) {
	t.Helper()
	node, err := world.cluster.Client.CoreV1().Nodes().Get(t.Context(), n.Name, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	// Both are cut to whole seconds.
	joined, started := node.CreationTimestamp.Time, onlyAgent(t, n).Status.ContainerStatuses[0].State.Running.StartedAt.Time
	earliest := joined.Add(deadline)
	if late := started.Add(20 * time.Second); late.After(earliest) {
		earliest = late
	}
	if hard := joined.Add(deadline + 30*time.Second); hard.Before(earliest) {
		earliest = hard
	}
	t.Logf("%s: its agent started %v and the gate opened %v after it joined", n.Name, started.Sub(joined), opened.Sub(joined))
	if opened.Before(earliest) {
		t.Errorf("the gate opened before %v", earliest.Sub(joined))
	}
}

// TestGateOpensWithoutAgent has a node whose disk cannot be attached, so that kubelet
// never starts the agent.
func TestGateOpensWithoutAgent(t *testing.T) {
	c := world.cluster
	n := c.Node(t, cluster.NodeConfig{Taints: []corev1.Taint{cluster.StartupTaint}})
	ns := c.Namespace(t)
	c.Run(t, podOn(n, ns, "pod", ref(app)))
	c.WaitPodUnschedulable(t, ns, "pod")
	c.Claim(t, agentNamespace, "image-cache", cluster.Disk{Name: "absent"}, n)
	deploy(t, cluster.Agent{Component: "pvc", Env: map[string]string{"SELKIES_GATE_DEADLINE": "1s"}})
	n.WaitTaint(t, cluster.StartupTaint.Key, false)
	waitEvent(t, n, "GateDeadline")
	c.WaitPodReady(t, ns, "pod")
	if agent := onlyAgent(t, n); agent.Status.Phase != corev1.PodPending {
		t.Errorf("the agent is %s: this shows nothing", agent.Status.Phase)
	}
	// As an upgrade of the node does.
	c.Output(t, "taint", "node", n.Name, cluster.StartupTaint.ToString())
	n.WaitTaint(t, cluster.StartupTaint.Key, false)
}
