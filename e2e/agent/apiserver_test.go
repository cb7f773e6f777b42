//go:build e2e

package agent_test

import (
	"context"
	"encoding/pem"
	"errors"
	"fmt"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"

	"github.com/selkies-project/packer-plugin-selkies/e2e/cluster"
	"github.com/selkies-project/packer-plugin-selkies/e2e/idle"
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

// kubeconfigs are two with the rights of access, written into the node. The second
// leads through a proxy that says which pods there are only when the cache disk is
// mounted for containerd.
func (n *node) kubeconfigs(t testing.TB, c *cluster.Cluster) (direct, proxied string) {
	t.Helper()
	file := t.TempDir() + "/access.yaml"
	if err := os.WriteFile(file, []byte(access), 0o600); err != nil {
		t.Fatal(err)
	}
	c.Output(t, "apply", "-f", file)
	token := strings.TrimSpace(c.Output(t, "create", "token", "agent"))
	admin, err := clientcmd.BuildConfigFromFlags("", c.Kubeconfig)
	if err != nil {
		t.Fatal(err)
	}
	write := func(file string, server *clientcmdapi.Cluster) string {
		t.Helper()
		config := clientcmdapi.NewConfig()
		config.Clusters["e2e"] = server
		config.AuthInfos["agent"] = &clientcmdapi.AuthInfo{Token: token}
		config.Contexts["e2e"] = &clientcmdapi.Context{Cluster: "e2e", AuthInfo: "agent"}
		config.CurrentContext = "e2e"
		text, err := clientcmd.Write(*config)
		if err != nil {
			t.Fatal(err)
		}
		if err := n.WriteFile(file, text, 0o600); err != nil {
			t.Fatal(err)
		}
		return file
	}
	return write("/etc/agent.kubeconfig", &clientcmdapi.Cluster{Server: admin.Host, CertificateAuthorityData: admin.CAData}),
		write("/etc/proxied.kubeconfig", n.podsAfterMount(t, admin))
}

// podsAfterMount is how the proxy is reached.
func (n *node) podsAfterMount(t testing.TB, config *rest.Config) *clientcmdapi.Cluster {
	t.Helper()
	target, err := url.Parse(config.Host)
	if err != nil {
		t.Fatal(err)
	}
	// The rights are those of the token in each request.
	transport, err := rest.TransportFor(rest.AnonymousClientConfig(config))
	if err != nil {
		t.Fatal(err)
	}
	proxy := httputil.NewSingleHostReverseProxy(target)
	proxy.Transport = transport
	proxy.FlushInterval = -1 // a watch is answered bit by bit
	// Without TLS clients send no token.
	server := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		for r.URL.Path == "/api/v1/pods" && n.mounts(t) == 0 {
			select {
			case <-r.Context().Done():
				return
			case <-time.After(50 * time.Millisecond):
			}
		}
		proxy.ServeHTTP(w, r)
	}))
	t.Cleanup(func() {
		server.CloseClientConnections()
		server.Close()
	})
	certificate := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: server.Certificate().Raw})
	return &clientcmdapi.Cluster{Server: server.URL, CertificateAuthorityData: certificate}
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
	t.Parallel()
	c, err := cluster.Start(t.Context(), cluster.Config{Dir: t.TempDir(), Sandbox: world.pause})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Stop()
	nodes := c.Client.CoreV1().Nodes()
	n := newNode(t, machine.Upstream)
	kubeconfig, proxied := n.kubeconfigs(t, c)
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
	a := n.start(t, append(args, "--gate-deadline=15s")...)
	until("the condition without a disk", func(node *corev1.Node) error { return is(node, false, "", "NoCacheDisk") })
	// An agent that ends again and again does not put off the gate's opening for ever.
	gate := n.launch(t, "gate", "--node-name="+nodeName, "--kubeconfig="+kubeconfig, "--gate-deadline=15s")
	for shut := true; shut; {
		a.kill(t)
		a = n.start(t, append(args, "--gate-deadline=15s")...)
		time.Sleep(3 * time.Second) // its life, not a wait
		node, err := nodes.Get(t.Context(), nodeName, metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		age := time.Since(node.CreationTimestamp.Time)
		if shut = tainted(node, startupTaint); shut && age > 90*time.Second {
			t.Fatalf("the gate is shut %v after the node has joined", age)
		} else if !shut && age < 45*time.Second {
			t.Errorf("the gate opened %v after the node has joined, before an agent had the time to", age)
		}
	}
	until("the gate's deadline", func(node *corev1.Node) error { return is(node, true, "", "NoCacheDisk") })
	waitEvent(t, c, "GateDeadline")
	gate.stop(t)
	waitEvent(t, c, "NoCacheDisk")
	a.stop(t)

	patch(`{"spec":{"taints":[{"key":"` + startupTaint + `","effect":"NoSchedule"},{"key":"example.com/other","effect":"NoSchedule"}]}}`)
	n.attach(t)
	// The disk is mounted before the agent asks what pods wait for. The deadline has passed
	// before this agent starts: it has its first pass all the same.
	a = n.start(t, append(args, "--gate-deadline=30s", "--kubeconfig="+proxied)...)
	until("the gate to open", func(node *corev1.Node) error { return is(node, true, "true", "Registered") })
	n.waitReady(t)
	if strings.Contains(a.log.String(), "its deadline has passed") {
		t.Error("the gate opened before the first pass")
	}
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

	// Two agents that want different things, as of two versions during a rollout.
	w, err := nodes.Watch(t.Context(), metav1.ListOptions{FieldSelector: "metadata.name=" + nodeName})
	if err != nil {
		t.Fatal(err)
	}
	other := n.start(t, append(args, "--cache-pd=disk-2", "--cache=/nowhere")...)
	writes, ofOther := 0, 0
	for end := time.After(10 * time.Second); end != nil; {
		select {
		case e := <-w.ResultChan():
			writes++
			if node, ok := e.Object.(*corev1.Node); ok && node.Labels[cachePD] == "disk-2" && condition(node).Reason == "Partial" {
				ofOther++
			}
		case <-end:
			w.Stop()
			end = nil
		}
	}
	other.stop(t)
	t.Logf("two agents that do not agree wrote %d times in ten seconds", writes)
	// Each writes its labels and its condition again after one, two, four ... seconds.
	if writes > 24 || ofOther == 0 {
		t.Errorf("%d writes, of which %d are all of the second agent's", writes, ofOther)
	}
	until("the first agent to have its way", func(node *corev1.Node) error {
		if node.Labels[cachePD] != "disk-1" {
			return errors.New("another disk's label")
		}
		return is(node, true, "true", "Registered")
	})

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

	// Idle, each with a watch of the node.
	a = n.start(t, append(args, "--check-interval=1m")...)
	n.waitReady(t)
	gate = n.launch(t, "gate", "--node-name="+nodeName, "--kubeconfig="+kubeconfig, "--gate-deadline=1s")
	idle.Measure(t, time.Minute, a.proc(), gate.proc())
	gate.stop(t)

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
