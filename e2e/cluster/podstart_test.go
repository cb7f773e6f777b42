//go:build e2e

package cluster_test

import (
	"fmt"
	"regexp"
	"strconv"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"

	"github.com/selkies-project/packer-plugin-selkies/e2e/cluster"
)

// BenchmarkPodStart measures the start of a pod whose image is registered, from when the
// API server has the pod until it tells that it runs, and what of that kubelet waits for
// containerd.
func BenchmarkPodStart(b *testing.B) {
	n := readyNode(b, cluster.NodeConfig{}, cluster.Agent{})
	namespace := world.cluster.Namespace(b)
	startPod(b, n, namespace, "first") // containerd pulls the sandbox's image
	before := runtimeSeconds(b, n)
	pods := 0
	for b.Loop() {
		startPod(b, n, namespace, fmt.Sprintf("pod-%d", pods))
		pods++
	}
	for operation, seconds := range runtimeSeconds(b, n) {
		switch operation {
		case "pull_image":
			if seconds != before[operation] {
				b.Error("an image was pulled")
			}
		case "run_podsandbox", "create_container", "start_container":
			b.ReportMetric((seconds-before[operation])*1e3/float64(pods), "ms/"+operation)
		}
	}
	b.ReportMetric(float64(b.Elapsed().Milliseconds())/float64(pods), "ms/pod")
}

// startPod returns when a pod with a cached image runs.
func startPod(b *testing.B, n *cluster.Node, namespace, name string) {
	b.Helper()
	api := world.cluster.Client.CoreV1().Pods(namespace)
	w, err := api.Watch(b.Context(), metav1.ListOptions{FieldSelector: fields.OneTermEqualSelector("metadata.name", name).String()})
	if err != nil {
		b.Fatal(err)
	}
	defer w.Stop()
	world.cluster.Run(b, podOn(n, namespace, name, ref(app)))
	timeout := time.After(time.Minute)
	for {
		select {
		case e, ok := <-w.ResultChan():
			if !ok {
				b.Fatalf("the watch of pod %s has ended", name)
			}
			if pod, ok := e.Object.(*corev1.Pod); ok && pod.Status.Phase == corev1.PodRunning {
				return
			}
		case <-timeout:
			b.Fatalf("pod %s does not run", name)
		}
	}
}

var runtimeOperation = regexp.MustCompile(`(?m)^kubelet_runtime_operations_duration_seconds_sum\{operation_type="(\w+)"\} (\S+)$`)

// runtimeSeconds is how long kubelet has waited for each kind of call of the CRI.
func runtimeSeconds(b *testing.B, n *cluster.Node) map[string]float64 {
	b.Helper()
	all := map[string]float64{}
	for _, m := range runtimeOperation.FindAllStringSubmatch(world.cluster.Output(b, "get", "--raw", "/api/v1/nodes/"+n.Name+"/proxy/metrics"), -1) {
		seconds, err := strconv.ParseFloat(m[2], 64)
		if err != nil {
			b.Fatal(err)
		}
		all[m[1]] = seconds
	}
	if len(all) == 0 {
		b.Fatal("kubelet's metrics have no calls of the CRI")
	}
	return all
}
