//go:build e2e

package agent_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/selkies-project/packer-plugin-selkies/e2e/cluster"
	"github.com/selkies-project/packer-plugin-selkies/e2e/machine"
)

const (
	nodeName     = "node-1"
	startupTaint = "startup-taint.cluster-autoscaler.kubernetes.io/selkies-image-cache"
	initialized  = "app.broker/image-load-initialized"
	cachePD      = "app.broker/cache-pd"
)

// access is what the agent's package comment says that it needs.
const access = `
apiVersion: v1
kind: ServiceAccount
metadata: {name: agent, namespace: default}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: agent}
rules:
- {apiGroups: [""], resources: [nodes], verbs: [list, watch, patch]}
- {apiGroups: [""], resources: [nodes/status], verbs: [patch]}
- {apiGroups: [""], resources: [pods], verbs: [list]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: agent}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: agent}
subjects: [{kind: ServiceAccount, name: agent, namespace: default}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: Role
metadata: {name: agent, namespace: default}
rules:
- {apiGroups: [""], resources: [events], verbs: [create, patch]}
---
apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: agent, namespace: default}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: Role, name: agent}
subjects: [{kind: ServiceAccount, name: agent, namespace: default}]
`

// kubeconfig is one with the rights of access, written into the node.
func (n *node) kubeconfig(t testing.TB, c *cluster.Cluster) string {
	t.Helper()
	file := t.TempDir() + "/access.yaml"
	if err := os.WriteFile(file, []byte(access), 0o600); err != nil {
		t.Fatal(err)
	}
	c.Output(t, "apply", "-f", file)
	config := file + ".kubeconfig"
	admin, err := os.ReadFile(c.Kubeconfig)
	if err == nil {
		err = os.WriteFile(config, admin, 0o600)
	}
	if err != nil {
		t.Fatal(err)
	}
	token := strings.TrimSpace(c.Output(t, "create", "token", "agent"))
	c.Output(t, "config", "set-credentials", "agent", "--token="+token, "--kubeconfig="+config)
	c.Output(t, "config", "set-context", "--current", "--user=agent", "--kubeconfig="+config)
	text := c.Output(t, "config", "view", "--raw", "--flatten", "--minify", "--kubeconfig="+config)
	if err := n.WriteFile("/etc/agent.kubeconfig", []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	return "/etc/agent.kubeconfig"
}

func condition(node *corev1.Node) corev1.NodeCondition {
	for _, c := range node.Status.Conditions {
		if c.Type == "SelkiesImageCacheReady" {
			return c
		}
	}
	return corev1.NodeCondition{}
}

func tainted(node *corev1.Node, key string) bool {
	return slices.ContainsFunc(node.Spec.Taints, func(t corev1.Taint) bool { return t.Key == key })
}

// TestKubernetes has the agent keep its node at a real API server, with no more
// rights than it asks for.
func TestKubernetes(t *testing.T) {
	c, err := cluster.Start(t.Context(), cluster.Config{Dir: t.TempDir(), Sandbox: world.pause})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Stop()
	nodes := c.Client.CoreV1().Nodes()
	n := newNode(t, machine.Upstream)
	kubeconfig := n.kubeconfig(t, c)
	_, err = nodes.Create(t.Context(), &corev1.Node{
		ObjectMeta: metav1.ObjectMeta{Name: nodeName},
		Spec: corev1.NodeSpec{Taints: []corev1.Taint{
			{Key: startupTaint, Value: "true", Effect: corev1.TaintEffectNoSchedule},
			{Key: "example.com/other", Effect: corev1.TaintEffectNoSchedule},
		}},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	// The image that a pod waits for would be the last otherwise.
	wanted := world.refs[chains-1]
	pod := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: "waits"},
		Spec:       corev1.PodSpec{NodeName: nodeName, Containers: []corev1.Container{{Name: "main", Image: wanted}}},
	}
	wait(t, "the pod, which needs the service account of its namespace", func() error {
		_, err := c.Client.CoreV1().Pods("default").Create(t.Context(), pod, metav1.CreateOptions{})
		return err
	})
	until := func(what string, f func(node *corev1.Node) error) {
		t.Helper()
		wait(t, what, func() error {
			node, err := nodes.Get(t.Context(), nodeName, metav1.GetOptions{})
			if err != nil {
				return err
			}
			if err := f(node); err != nil {
				return fmt.Errorf("%w: labels %v, taints %v, condition %+v", err, node.Labels, node.Spec.Taints, condition(node))
			}
			return nil
		})
	}
	patch := func(text string) {
		t.Helper()
		if _, err := nodes.Patch(t.Context(), nodeName, types.MergePatchType, []byte(text), metav1.PatchOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	is := func(node *corev1.Node, gate bool, label, reason string) error {
		switch {
		case tainted(node, startupTaint) == gate:
			return errors.New("the startup taint is not as it should be")
		case !tainted(node, "example.com/other"):
			return errors.New("another's taint was lost")
		case node.Labels[initialized] != label:
			return errors.New("the label is not as it should be")
		case condition(node).Reason != reason:
			return errors.New("the condition is not as it should be")
		}
		return nil
	}

	args := []string{"--kubernetes", "--node-name=" + nodeName, "--kubeconfig=" + kubeconfig, "--cache-pd=disk-1"}
	a := n.start(t, append(args, "--gate-deadline=5s")...)
	until("the condition without a disk", func(node *corev1.Node) error { return is(node, false, "", "NoCacheDisk") })
	until("the gate's deadline", func(node *corev1.Node) error { return is(node, true, "", "NoCacheDisk") })
	a.stop(t)

	patch(`{"spec":{"taints":[{"key":"` + startupTaint + `","effect":"NoSchedule"},{"key":"example.com/other","effect":"NoSchedule"}]}}`)
	n.attach(t)
	a = n.start(t, append(args, "--gate-deadline=10m")...)
	until("the gate to open", func(node *corev1.Node) error { return is(node, true, "true", "Registered") })
	n.waitReady(t)
	node, err := nodes.Get(t.Context(), nodeName, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if node.Labels[cachePD] != "disk-1" || condition(node).Status != corev1.ConditionTrue {
		t.Errorf("labels %v, condition %+v", node.Labels, condition(node))
	}
	if order := registered(a.log.String()); slices.Index(order, wanted) >= 4 {
		t.Errorf("%s, which a pod waits for, was not among the first: %v", wanted, order)
	}
	waitEvent(t, c, "Registered")
	waitEvent(t, c, "NoCacheDisk")

	// What an upgrade of the node resets comes back at once.
	patch(`{"metadata":{"labels":{"` + initialized + `":"false","` + cachePD + `":null}}}`)
	until("the labels to come back", func(node *corev1.Node) error { return is(node, true, "true", "Registered") })
	// Others' taints come and go while the agent removes its own.
	for i := range 10 {
		other := "example.com/taint-" + strconv.Itoa(i)
		patch(`{"spec":{"taints":[{"key":"` + startupTaint + `","effect":"NoSchedule"},{"key":"example.com/other","effect":"NoSchedule"},{"key":"` + other + `","effect":"NoSchedule"}]}}`)
		until("the taint to go again", func(node *corev1.Node) error {
			if !tainted(node, other) {
				t.Fatalf("taint %s was lost: %v", other, node.Spec.Taints)
			}
			return is(node, true, "true", "Registered")
		})
	}

	n.ctr(t, "images", "label", world.refs[0], "io.cri-containerd.pinned=")
	waitEvent(t, c, "Healed")
	n.remove(t, world.refs[0])
	waitEvent(t, c, "ImageRemoved")

	// The node is made anew.
	if err := nodes.Delete(t.Context(), nodeName, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	fresh := &corev1.Node{ObjectMeta: metav1.ObjectMeta{Name: nodeName}}
	fresh.Spec.Taints = []corev1.Taint{{Key: startupTaint, Effect: corev1.TaintEffectNoSchedule}, {Key: "example.com/other", Effect: corev1.TaintEffectNoSchedule}}
	if _, err := nodes.Create(t.Context(), fresh, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	until("the new node", func(node *corev1.Node) error { return is(node, true, "true", "Registered") })
	a.stop(t)

	// Idle, with the watch of the node.
	a = n.start(t, append(args, "--check-interval=1m")...)
	n.waitReady(t)
	a.idle(t, time.Minute)

	// Without the API server it registers all the same.
	a.stop(t)
	if err := c.Stop(); err != nil {
		t.Fatal(err)
	}
	n.Output(t, program, "eject", "--runtime=containerd")
	a = n.start(t, args...)
	n.waitReady(t)
	n.runs(t, world.refs[0])
	a.stop(t)
}

// registered are the images in the order in which the log has them.
func registered(log string) []string {
	var refs []string
	for line := range strings.Lines(log) {
		for _, ref := range world.refs {
			if strings.Contains(line, ref+": ") {
				refs = append(refs, ref)
			}
		}
	}
	return refs
}

// waitEvent waits for an event about the node.
func waitEvent(t testing.TB, c *cluster.Cluster, reason string) {
	t.Helper()
	wait(t, "the event "+reason, func() error {
		list, err := c.Client.CoreV1().Events("default").List(context.Background(), metav1.ListOptions{
			FieldSelector: "involvedObject.kind=Node,involvedObject.name=" + nodeName + ",reason=" + reason,
		})
		if err == nil && len(list.Items) == 0 {
			err = errors.New("there is none")
		}
		return err
	})
}
