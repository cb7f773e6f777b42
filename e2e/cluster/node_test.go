//go:build e2e

package cluster_test

import (
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/selkies-project/packer-plugin-selkies/e2e/cluster"
)

// startupTaint is the one of nodes that wait for their cache.
var startupTaint = corev1.Taint{
	Key:    "startup-taint.cluster-autoscaler.kubernetes.io/selkies-image-cache",
	Value:  "true",
	Effect: corev1.TaintEffectNoSchedule,
}

// podOn is a pod that has to run on one node and stays until it is deleted.
func podOn(n *cluster.Node, namespace, name, image string) *corev1.Pod {
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name},
		Spec: corev1.PodSpec{
			NodeSelector:                  map[string]string{corev1.LabelHostname: n.Name},
			TerminationGracePeriodSeconds: new(int64),
			Containers: []corev1.Container{{
				Name: "main", Image: image, ImagePullPolicy: corev1.PullIfNotPresent,
				Command: []string{"/bin/sh", "-c", "sleep 86400"},
			}},
		},
	}
}

// TestStartupTaint has a node join with the startup taint: a pod that tolerates it
// runs, another one only once it is gone.
func TestStartupTaint(t *testing.T) {
	c := world.cluster
	n := c.Node(t, cluster.NodeConfig{Taints: []corev1.Taint{startupTaint}})
	ns := c.Namespace(t)
	tolerant := podOn(n, ns, "tolerant", ref("oci:latest"))
	tolerant.Spec.Tolerations = []corev1.Toleration{{Key: startupTaint.Key, Operator: corev1.TolerationOpExists}}
	c.Run(t, tolerant)
	c.Run(t, podOn(n, ns, "other", ref("oci:latest")))

	pod := c.WaitPodReady(t, ns, "tolerant")
	if pod.Status.PodIP == n.IP {
		t.Error("the pod has the node's address, not one of its own")
	}
	// Through the API server to kubelet and from there to containerd, and back to the
	// API server as every client in a pod finds it.
	script := `wget -q -O - --no-check-certificate "https://$KUBERNETES_SERVICE_HOST:$KUBERNETES_SERVICE_PORT/version"`
	if out := c.Output(t, "exec", "-n", ns, "tolerant", "--", "/bin/sh", "-c", script); out == "" {
		t.Error("the API server says nothing to pods")
	}

	c.WaitPodUnschedulable(t, ns, "other")
	c.Output(t, "taint", "node", n.Name, startupTaint.Key+"-")
	n.WaitTaint(t, startupTaint.Key, false)
	c.WaitPodReady(t, ns, "other")
}
