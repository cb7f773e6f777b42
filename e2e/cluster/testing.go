package cluster

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// waitTimeout is for anything that a node does, ten times what it takes on two slow
// cores.
const waitTimeout = 3 * time.Minute

// Wait asks f until it gives no error, and fails the test where that takes too long.
func Wait(t testing.TB, what string, f func(ctx context.Context) error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), waitTimeout)
	defer cancel()
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	last := fmt.Errorf("never asked")
	for {
		// A question that the end of the wait cut off has no answer to show.
		if err := f(ctx); err == nil {
			return
		} else if ctx.Err() == nil {
			last = err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			t.Fatalf("waiting for %s: %v", what, last)
		}
	}
}

// Node makes a node for a test, waits until it is ready and removes it at the test's
// end. The log of a failed test has what there is to know of it.
func (c *Cluster) Node(t testing.TB, config NodeConfig) *Node {
	t.Helper()
	return c.Nodes(t, config)[0]
}

// Nodes makes several nodes at once.
func (c *Cluster) Nodes(t testing.TB, configs ...NodeConfig) []*Node {
	t.Helper()
	nodes, errs := make([]*Node, len(configs)), make([]error, len(configs))
	var wg sync.WaitGroup
	for i, config := range configs {
		wg.Go(func() { nodes[i], errs[i] = c.NewNode(t.Context(), config) })
	}
	wg.Wait()
	for _, n := range nodes {
		if n != nil {
			t.Cleanup(func() { n.end(t) })
		}
	}
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
	for _, n := range nodes {
		n.WaitReady(t)
	}
	return nodes
}

// end removes the node at the test's end.
func (n *Node) end(t testing.TB) {
	// The test's own context has ended.
	ctx := context.Background()
	if t.Failed() {
		node, _ := n.cluster.Kubectl(ctx, "describe", "node", n.Name)
		t.Logf("%s\nends of its journal:\n%s\n%s", node, n.Journal(ctx, 60, "kubelet"), n.Journal(ctx, 40, "containerd"))
	}
	if err := n.Close(ctx); err != nil {
		t.Error(err)
	}
}

// WaitReady waits for the node to be ready, after a boot too: a node that has gone
// keeps its conditions for a while.
func (n *Node) WaitReady(t testing.TB) {
	t.Helper()
	boot := strings.TrimSpace(n.Output(t, "cat", "/proc/sys/kernel/random/boot_id"))
	n.Wait(t, "be ready", func(node *corev1.Node) error {
		if node.Status.NodeInfo.BootID != boot {
			return fmt.Errorf("kubelet has not been heard of since the boot")
		}
		return hasCondition(node.Status.Conditions, corev1.NodeReady)
	})
}

// Wait waits until what is asked of the Node object gives no error.
func (n *Node) Wait(t testing.TB, what string, f func(node *corev1.Node) error) {
	t.Helper()
	Wait(t, n.Name+" to "+what, func(ctx context.Context) error {
		node, err := n.cluster.Client.CoreV1().Nodes().Get(ctx, n.Name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		return f(node)
	})
}

// WaitTaint waits for a taint to be there, or to be gone.
func (n *Node) WaitTaint(t testing.TB, key string, present bool) {
	t.Helper()
	what := "lose the taint " + key
	if present {
		what = "have the taint " + key
	}
	n.Wait(t, what, func(node *corev1.Node) error {
		if slices.ContainsFunc(node.Spec.Taints, func(taint corev1.Taint) bool { return taint.Key == key }) != present {
			return fmt.Errorf("its taints are %v", node.Spec.Taints)
		}
		return nil
	})
}

// WaitCondition waits for a condition of the node to be true.
func (n *Node) WaitCondition(t testing.TB, condition corev1.NodeConditionType) {
	t.Helper()
	n.Wait(t, "be "+string(condition), func(node *corev1.Node) error {
		return hasCondition(node.Status.Conditions, condition)
	})
}

func hasCondition(conditions []corev1.NodeCondition, condition corev1.NodeConditionType) error {
	for _, c := range conditions {
		if c.Type == condition && c.Status == corev1.ConditionTrue {
			return nil
		}
		if c.Type == condition {
			return fmt.Errorf("%s is %s: %s: %s", c.Type, c.Status, c.Reason, c.Message)
		}
	}
	return fmt.Errorf("it has no condition %s", condition)
}

// Namespace makes a namespace for a test and deletes it at the test's end. The log of
// a failed test describes its pods.
func (c *Cluster) Namespace(t testing.TB) string {
	t.Helper()
	namespaces := c.Client.CoreV1().Namespaces()
	ns, err := namespaces.Create(t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{GenerateName: "test-"}}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx := context.Background()
		if t.Failed() {
			pods, _ := c.Kubectl(ctx, "describe", "pods", "-n", ns.Name)
			t.Logf("pods in %s:\n%s", ns.Name, pods)
		}
		if err := namespaces.Delete(ctx, ns.Name, metav1.DeleteOptions{}); err != nil {
			t.Error(err)
		}
	})
	// Pods are refused before its service account is there.
	Wait(t, "the service account of "+ns.Name, func(ctx context.Context) error {
		_, err := c.Client.CoreV1().ServiceAccounts(ns.Name).Get(ctx, "default", metav1.GetOptions{})
		return err
	})
	return ns.Name
}

// Output runs kubectl as the administrator, and fails the test where it fails.
func (c *Cluster) Output(t testing.TB, args ...string) string {
	t.Helper()
	out, err := c.Kubectl(t.Context(), args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// Apply applies a kustomize directory. Its objects stay.
func (c *Cluster) Apply(t testing.TB, dir string) {
	t.Helper()
	c.Output(t, "apply", "-k", dir)
}

// Run makes a pod. Its namespace's end is the pod's.
func (c *Cluster) Run(t testing.TB, pod *corev1.Pod) {
	t.Helper()
	if _, err := c.Client.CoreV1().Pods(pod.Namespace).Create(t.Context(), pod, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
}

// WaitPod waits until what is asked of a pod gives no error, and returns the pod.
func (c *Cluster) WaitPod(t testing.TB, namespace, name, what string, f func(pod *corev1.Pod) error) *corev1.Pod {
	t.Helper()
	var pod *corev1.Pod
	Wait(t, "pod "+name+" to "+what, func(ctx context.Context) error {
		var err error
		if pod, err = c.Client.CoreV1().Pods(namespace).Get(ctx, name, metav1.GetOptions{}); err != nil {
			return err
		}
		return f(pod)
	})
	return pod
}

// WaitPodReady waits for a pod to be ready.
func (c *Cluster) WaitPodReady(t testing.TB, namespace, name string) *corev1.Pod {
	t.Helper()
	return c.WaitPod(t, namespace, name, "be ready", func(pod *corev1.Pod) error {
		return podCondition(pod, corev1.PodReady, corev1.ConditionTrue)
	})
}

// WaitPodUnschedulable waits until the scheduler has found no node for a pod.
func (c *Cluster) WaitPodUnschedulable(t testing.TB, namespace, name string) {
	t.Helper()
	c.WaitPod(t, namespace, name, "be unschedulable", func(pod *corev1.Pod) error {
		return podCondition(pod, corev1.PodScheduled, corev1.ConditionFalse)
	})
}

func podCondition(pod *corev1.Pod, condition corev1.PodConditionType, status corev1.ConditionStatus) error {
	for _, c := range pod.Status.Conditions {
		if c.Type == condition && c.Status == status {
			return nil
		}
	}
	return fmt.Errorf("it is %s: %+v", pod.Status.Phase, pod.Status.ContainerStatuses)
}

// WaitPodGone waits for the end of a pod that was deleted.
func (c *Cluster) WaitPodGone(t testing.TB, namespace, name string) {
	t.Helper()
	Wait(t, "pod "+name+" to be gone", func(ctx context.Context) error {
		_, err := c.Client.CoreV1().Pods(namespace).Get(ctx, name, metav1.GetOptions{})
		if apierrors.IsNotFound(err) {
			return nil
		}
		if err == nil {
			err = fmt.Errorf("it is there")
		}
		return err
	})
}
