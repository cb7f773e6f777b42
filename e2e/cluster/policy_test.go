//go:build e2e

package cluster_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"testing"

	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/selkies-project/packer-plugin-selkies/e2e/cluster"
)

const agentAccount, gateAccount = "selkies-image-injector", "selkies-image-gate"

// TestPolicy asks the API server, with the token of a pod of the agent, for what the
// agent does and for what it must not be able to do.
func TestPolicy(t *testing.T) {
	c := world.cluster
	own, foreign := nodeObject(t), nodeObject(t)
	agent := clientOf(t, token(t, agentAccount, own))
	anywhere := clientOf(t, token(t, agentAccount, ""))
	gate := clientOf(t, token(t, gateAccount, own))

	patch := func(as kubernetes.Interface, typ types.PatchType, node, body string, sub ...string) error {
		_, err := as.CoreV1().Nodes().Patch(t.Context(), node, typ, []byte(body), metav1.PatchOptions{}, sub...)
		return err
	}
	merge := func(node, body string, sub ...string) error {
		return patch(agent, types.MergePatchType, node, body, sub...)
	}
	strategic := func(node, body string, sub ...string) error {
		return patch(agent, types.StrategicMergePatchType, node, body, sub...)
	}
	condition := func(typ string) string {
		return fmt.Sprintf(`{"status":{"conditions":[{"type":%q,"status":"True","reason":"Test"}]}}`, typ)
	}
	event := func(as kubernetes.Interface, in string, about corev1.ObjectReference) (name string, err error) {
		e, err := as.CoreV1().Events(in).Create(t.Context(), &corev1.Event{
			ObjectMeta:     metav1.ObjectMeta{GenerateName: "test-"},
			InvolvedObject: about,
		}, metav1.CreateOptions{})
		return e.GetName(), err
	}
	about := func(node string) corev1.ObjectReference { return corev1.ObjectReference{Kind: "Node", Name: node} }
	// change patches an event that someone has written about a node.
	change := func(by kubernetes.Interface, node, body string) error {
		name, err := event(by, metav1.NamespaceDefault, about(node))
		if err != nil {
			return err
		}
		_, err = agent.CoreV1().Events(metav1.NamespaceDefault).Patch(t.Context(), name, types.StrategicMergePatchType, []byte(body), metav1.PatchOptions{})
		return err
	}
	// The API server takes a while to know a new policy.
	cluster.Wait(t, "the policies to be in force", func(context.Context) error {
		if err := merge(foreign, `{"metadata":{"labels":{"app.broker/test":"1"}}}`); err == nil {
			return errors.New("nothing is refused")
		}
		if _, err := event(agent, metav1.NamespaceDefault, about(foreign)); err == nil {
			return errors.New("no event is refused")
		}
		return nil
	})

	for _, tt := range []struct {
		name    string
		refused string // in the error; empty for what is allowed
		ask     func() error
	}{
		{"label of the broker", "", func() error {
			return merge(own, `{"metadata":{"labels":{"app.broker/image-load-initialized":"true","app.broker/cache-pd":"a"}}}`)
		}},
		{"changed label", "", func() error { return strategic(own, `{"metadata":{"labels":{"app.broker/cache-pd":"b"}}}`) }},
		{"label taken back", "", func() error { return merge(own, `{"metadata":{"labels":{"app.broker/cache-pd":null}}}`) }},
		{"condition", "", func() error { return strategic(own, condition("SelkiesImageCacheReady"), "status") }},
		{"condition again", "", func() error { return strategic(own, condition("SelkiesImageCacheReady"), "status") }},
		{"event", "", func() error { _, err := event(agent, metav1.NamespaceDefault, about(own)); return err }},
		{"event again", "", func() error { return change(agent, own, `{"count":2}`) }},
		{"nodes", "", func() error {
			_, err := agent.CoreV1().Nodes().List(t.Context(), metav1.ListOptions{FieldSelector: "metadata.name=" + own})
			return err
		}},
		{"pods", "", func() error {
			_, err := agent.CoreV1().Pods("").List(t.Context(), metav1.ListOptions{FieldSelector: "spec.nodeName=" + own})
			return err
		}},
		{"taint added", "changes no other", func() error { return changeTaints(t, agent, own, `[{"key":"new","effect":"NoSchedule"}]`, "") }},
		{"other taint removed", "changes no other", func() error { return changeTaints(t, agent, own, `[]`, "other") }},
		{"gate: startup taint removed", "", func() error { return changeTaints(t, gate, own, `[]`, cluster.StartupTaint.Key) }},
		{"gate: startup taint of another node", "may not change node " + foreign, func() error { return changeTaints(t, gate, foreign, `[]`, cluster.StartupTaint.Key) }},
		{"gate: other taint", "changes no other", func() error { return changeTaints(t, gate, own, `[]`, "other") }},
		{"gate: event", "", func() error { _, err := event(gate, metav1.NamespaceDefault, about(own)); return err }},
		{"gate: event of another node", "its own node only", func() error { _, err := event(gate, metav1.NamespaceDefault, about(foreign)); return err }},
		{"gate: condition", "cannot patch resource", func() error {
			return patch(gate, types.StrategicMergePatchType, own, condition("SelkiesImageCacheReady"), "status")
		}},
		{"gate: pods", "cannot list resource", func() error {
			_, err := gate.CoreV1().Pods("").List(t.Context(), metav1.ListOptions{})
			return err
		}},
		{"startup taint added", "", func() error {
			return changeTaints(t, c.Client, own, fmt.Sprintf(`[{"key":%q,"effect":"NoSchedule"}]`, cluster.StartupTaint.Key), "")
		}},
		{"startup taint removed", "", func() error { return changeTaints(t, agent, own, `[]`, cluster.StartupTaint.Key) }},

		{"other node's label", "may not change node " + foreign, func() error { return merge(foreign, `{"metadata":{"labels":{"app.broker/test":"1"}}}`) }},
		{"other node's condition", "may not change node " + foreign, func() error { return strategic(foreign, condition("SelkiesImageCacheReady"), "status") }},
		{"other node's taint", "may not change node " + foreign, func() error { return changeTaints(t, agent, foreign, `[]`, cluster.StartupTaint.Key) }},
		{"token without a node", "does not say which node", func() error {
			return patch(anywhere, types.MergePatchType, own, `{"metadata":{"labels":{"app.broker/test":"1"}}}`)
		}},
		{"label added", "below app.broker/ only", func() error {
			return merge(own, `{"metadata":{"labels":{"node-role.kubernetes.io/control-plane":""}}}`)
		}},
		{"label changed", "below app.broker/ only", func() error { return merge(own, `{"metadata":{"labels":{"keep":"other"}}}`) }},
		{"label removed", "below app.broker/ only", func() error { return merge(own, `{"metadata":{"labels":{"keep":null}}}`) }},
		{"label by way of status", "below app.broker/ only", func() error { return merge(own, `{"metadata":{"labels":{"keep":null}}}`, "status") }},
		{"annotation", "labels only", func() error { return merge(own, `{"metadata":{"annotations":{"a":"b"}}}`) }},
		{"finalizer", "labels only", func() error { return merge(own, `{"metadata":{"finalizers":["selkies.io/stay"]}}`) }},
		{"unschedulable", "taints only", func() error { return merge(own, `{"spec":{"unschedulable":true}}`) }},
		{"provider ID", "taints only", func() error { return merge(own, `{"spec":{"providerID":"other://"}}`) }},
		{"other condition", "SelkiesImageCacheReady only", func() error { return strategic(own, condition("Other"), "status") }},
		{"changed condition", "SelkiesImageCacheReady only", func() error { return strategic(own, condition("MemoryPressure"), "status") }},
		{"conditions removed", "SelkiesImageCacheReady only", func() error { return merge(own, `{"status":{"conditions":null}}`, "status") }},
		{"condition in place of another", "SelkiesImageCacheReady only", func() error {
			n, err := world.cluster.Client.CoreV1().Nodes().Get(t.Context(), own, metav1.GetOptions{})
			if err != nil {
				return err
			}
			n.Status.Conditions[1] = n.Status.Conditions[0]
			body, err := json.Marshal(map[string]any{"status": map[string]any{"conditions": n.Status.Conditions}})
			if err != nil {
				return err
			}
			return merge(own, string(body), "status")
		}},
		{"capacity", "conditions only", func() error { return merge(own, `{"status":{"capacity":{"selkies.io/free":"1"}}}`, "status") }},
		{"event of another node", "its own node only", func() error { _, err := event(agent, metav1.NamespaceDefault, about(foreign)); return err }},
		{"event of a pod", "its own node only", func() error {
			_, err := event(agent, metav1.NamespaceDefault, corev1.ObjectReference{Kind: "Pod", Name: own, Namespace: metav1.NamespaceDefault})
			return err
		}},
		{"event without a node in the token", "its own node only", func() error {
			_, err := event(anywhere, metav1.NamespaceDefault, about(own))
			return err
		}},
		{"event of another node changed", "its own node only", func() error { return change(c.Client, foreign, `{"count":2}`) }},
		{"event taken from another node", "its own node only", func() error {
			return change(c.Client, foreign, fmt.Sprintf(`{"involvedObject":{"name":%q}}`, own))
		}},
		{"event elsewhere", "cannot create resource", func() error {
			_, err := event(agent, agentNamespace, corev1.ObjectReference{Kind: "Node", Name: own, Namespace: agentNamespace})
			return err
		}},
		{"node deleted", "cannot delete resource", func() error {
			return agent.CoreV1().Nodes().Delete(t.Context(), own, metav1.DeleteOptions{})
		}},
		{"pod of others", "cannot delete resource", func() error {
			return agent.CoreV1().Pods(agentNamespace).Delete(t.Context(), "any", metav1.DeleteOptions{})
		}},
		{"secrets", "cannot list resource", func() error {
			_, err := agent.CoreV1().Secrets("").List(t.Context(), metav1.ListOptions{})
			return err
		}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			err := tt.ask()
			switch {
			case tt.refused == "" && err != nil:
				t.Error(err)
			case tt.refused != "" && err == nil:
				t.Error("it is allowed")
			case tt.refused != "" && !strings.Contains(err.Error(), tt.refused):
				t.Errorf("refused by %q, want %q", err, tt.refused)
			}
		})
	}
	// Others are not the policy's concern.
	if err := patch(c.Client, types.MergePatchType, foreign, `{"metadata":{"labels":{"keep":"other"}}}`); err != nil {
		t.Error(err)
	}
}

// changeTaints writes the node's taints without the one of key without, and with
// those of the JSON list added.
func changeTaints(t *testing.T, as kubernetes.Interface, name, added, without string) error {
	t.Helper()
	for {
		n, err := world.cluster.Client.CoreV1().Nodes().Get(t.Context(), name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		var kept []string
		for _, taint := range n.Spec.Taints {
			if taint.Key != without {
				kept = append(kept, fmt.Sprintf(`{"key":%q,"effect":%q}`, taint.Key, taint.Effect))
			}
		}
		if added := strings.Trim(added, "[]"); added != "" {
			kept = append(kept, added)
		}
		body := fmt.Sprintf(`{"metadata":{"resourceVersion":%q},"spec":{"taints":[%s]}}`, n.ResourceVersion, strings.Join(kept, ","))
		_, err = as.CoreV1().Nodes().Patch(t.Context(), name, types.MergePatchType, []byte(body), metav1.PatchOptions{})
		if !apierrors.IsConflict(err) {
			return err
		}
	}
}

// nodeObject makes a Node object that no kubelet cares for.
func nodeObject(t *testing.T) string {
	t.Helper()
	nodes := world.cluster.Client.CoreV1().Nodes()
	n, err := nodes.Create(t.Context(), &corev1.Node{
		ObjectMeta: metav1.ObjectMeta{GenerateName: "object-", Labels: map[string]string{"keep": "this"}},
		Spec: corev1.NodeSpec{Taints: []corev1.Taint{
			{Key: cluster.StartupTaint.Key, Effect: corev1.TaintEffectNoSchedule},
			{Key: "other", Effect: corev1.TaintEffectNoSchedule},
		}},
		Status: corev1.NodeStatus{Conditions: []corev1.NodeCondition{
			{Type: corev1.NodeMemoryPressure, Status: corev1.ConditionFalse, Reason: "Test"},
			{Type: corev1.NodeDiskPressure, Status: corev1.ConditionFalse, Reason: "Test"},
		}},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := nodes.Delete(context.Background(), n.Name, metav1.DeleteOptions{}); err != nil {
			t.Error(err)
		}
	})
	return n.Name
}

// token is one of a service account, as a pod on the node has it, or without a node's name
// bound to nothing.
func token(t *testing.T, account, node string) string {
	t.Helper()
	core := world.cluster.Client.CoreV1()
	cluster.Wait(t, "the account "+account, func(ctx context.Context) error {
		_, err := core.ServiceAccounts(agentNamespace).Get(ctx, account, metav1.GetOptions{})
		return err
	})
	request := &authenticationv1.TokenRequest{}
	if node != "" {
		pod, err := core.Pods(agentNamespace).Create(t.Context(), &corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{GenerateName: "agent-"},
			Spec: corev1.PodSpec{
				NodeName: node, ServiceAccountName: account,
				Tolerations: []corev1.Toleration{{Operator: corev1.TolerationOpExists}},
				Containers:  []corev1.Container{{Name: "agent", Image: "none"}},
			},
		}, metav1.CreateOptions{})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			err := core.Pods(agentNamespace).Delete(context.Background(), pod.Name, metav1.DeleteOptions{GracePeriodSeconds: new(int64)})
			if err != nil && !apierrors.IsNotFound(err) {
				t.Error(err)
			}
		})
		request.Spec.BoundObjectRef = &authenticationv1.BoundObjectReference{APIVersion: "v1", Kind: "Pod", Name: pod.Name, UID: pod.UID}
	}
	made, err := core.ServiceAccounts(agentNamespace).CreateToken(t.Context(), account, request, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return made.Status.Token
}

// clientOf is the client of whoever has the token.
func clientOf(t *testing.T, token string) kubernetes.Interface {
	t.Helper()
	config, err := clientcmd.BuildConfigFromFlags("", world.cluster.Kubeconfig)
	if err != nil {
		t.Fatal(err)
	}
	config = rest.AnonymousClientConfig(config)
	config.BearerToken = token
	c, err := kubernetes.NewForConfig(config)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// TestPolicyTypes has the API server check the policies' expressions against the types
// of nodes and events.
func TestPolicyTypes(t *testing.T) {
	c := world.cluster
	for _, name := range []string{agentAccount, agentAccount + "-events"} {
		cluster.Wait(t, "the policy's check", func(ctx context.Context) error {
			p, err := c.Client.AdmissionregistrationV1().ValidatingAdmissionPolicies().Get(ctx, name, metav1.GetOptions{})
			if err != nil {
				return err
			}
			if p.Status.ObservedGeneration != p.Generation || p.Status.TypeChecking == nil {
				return fmt.Errorf("its status is %+v", p.Status)
			}
			for _, w := range p.Status.TypeChecking.ExpressionWarnings {
				t.Errorf("%s: %s: %s", name, w.FieldRef, w.Warning)
			}
			return nil
		})
	}
}
