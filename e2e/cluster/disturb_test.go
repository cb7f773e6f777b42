//go:build e2e

package cluster_test

import (
	"context"
	"fmt"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"

	"github.com/selkies-project/packer-plugin-selkies/e2e/cluster"
)

// readyNode is a node with the first cache disk as a claim, whose images are registered.
func readyNode(t *testing.T, config cluster.NodeConfig) *cluster.Node {
	t.Helper()
	disk := cluster.Disk{Name: firstDevice, Image: world.first}
	config.Disks = []cluster.Disk{disk}
	n := world.cluster.Node(t, config)
	world.cluster.Claim(t, agentNamespace, "image-cache", disk, n)
	deploy(t, agentConfig{component: "pvc"})
	n.WaitCondition(t, agentCondition)
	return n
}

// containers are the IDs of a pod's running containers.
func containers(pod *corev1.Pod) string {
	var ids []string
	for _, s := range pod.Status.ContainerStatuses {
		ids = append(ids, s.ContainerID)
	}
	return strings.Join(ids, " ")
}

// waitRestarted waits for a pod to be ready in another container than before.
func waitRestarted(t *testing.T, before *corev1.Pod) *corev1.Pod {
	t.Helper()
	return world.cluster.WaitPod(t, before.Namespace, before.Name, "be ready in a new container", func(pod *corev1.Pod) error {
		s := pod.Status.ContainerStatuses
		if len(s) != 1 || !s[0].Ready || s[0].ContainerID == before.Status.ContainerStatuses[0].ContainerID {
			return fmt.Errorf("its containers are %+v", s)
		}
		return nil
	})
}

// mounted are the lines of the node's mount table that have all of the words, with
// their mount IDs.
func mounted(t *testing.T, n *cluster.Node, words ...string) []string {
	t.Helper()
	var found []string
lines:
	for line := range strings.Lines(n.Output(t, "cat", "/proc/1/mountinfo")) {
		for _, w := range words {
			if !strings.Contains(line, w) {
				continue lines
			}
		}
		found = append(found, strings.TrimSpace(line))
	}
	return found
}

const (
	// anchors and volumes are below where the cache disk is mounted for containerd and
	// by kubelet.
	anchors = "io.containerd.snapshotter.v1.overlayfs/snapshots/"
	volumes = "/kubernetes.io/local-volume/mounts/"
)

// TestReboot reboots a node: pods of cached images come back with the agent, also if
// it comes long after them.
func TestReboot(t *testing.T) {
	c := world.cluster
	n := readyNode(t, cluster.NodeConfig{})
	ns := c.Namespace(t)
	pod := podOn(n, ns, "pod", ref(app))
	pod.Spec.Containers[0].ImagePullPolicy = corev1.PullNever
	c.Run(t, pod)
	before := c.WaitPodReady(t, ns, "pod")
	world.reg.Reset()

	if err := n.Reboot(t.Context()); err != nil {
		t.Fatal(err)
	}
	n.WaitReady(t)
	before = waitRestarted(t, before)
	if got := mounted(t, n, anchors, " ro,", "/fs "); len(got) != 1 {
		t.Errorf("the cache disk is mounted for containerd as %q", got)
	}

	// Now the pod has no agent to wait for.
	removeAgent(t.Context(), t)
	if err := n.Reboot(t.Context()); err != nil {
		t.Fatal(err)
	}
	n.WaitReady(t)
	c.WaitPod(t, ns, "pod", "fail to start", func(pod *corev1.Pod) error {
		s := pod.Status.ContainerStatuses
		if len(s) == 1 && s[0].State.Waiting != nil && strings.Contains(s[0].State.Waiting.Message, "no such file or directory") {
			return nil
		}
		return fmt.Errorf("its containers are %+v", s)
	})
	deploy(t, agentConfig{component: "pvc"})
	waitRestarted(t, before)
	expectPulls(t)
}

// TestKillAgent ends the agent by SIGKILL again and again, a little later each time,
// while it registers images and after.
func TestKillAgent(t *testing.T) {
	c := world.cluster
	disk := cluster.Disk{Name: firstDevice, Image: world.first}
	n := c.Node(t, cluster.NodeConfig{
		Taints: []corev1.Taint{startupTaint},
		Disks:  []cluster.Disk{disk},
		// Not ten seconds and more before it starts the agent again.
		Kubelet: map[string]any{"crashLoopBackOff": map[string]string{"maxContainerRestartPeriod": "1s"}},
	})
	c.Claim(t, agentNamespace, "image-cache", disk, n)
	ns := c.Namespace(t)
	pod := podOn(n, ns, "pod", ref(app))
	pod.Spec.Containers[0].ImagePullPolicy = corev1.PullNever
	c.Run(t, pod)
	deploy(t, agentConfig{component: "pvc"})
	const kill = `
for delay in 0 0.01 0.02 0.03 0.05 0.1 0.2 0.4 0.8; do
	pid=
	until [ -n "$pid" ]; do
		for p in /proc/[0-9]*; do
			case $(readlink "$p/exe") in /usr/local/bin/selkies-image-injector) pid=${p#/proc/};; esac
		done
	done
	sleep $delay
	kill -KILL $pid
	while [ -e /proc/$pid ]; do sleep 0.01; done
done`
	n.Output(t, "sh", "-c", kill)

	n.WaitCondition(t, agentCondition)
	n.WaitTaint(t, startupTaint.Key, false)
	c.WaitPodReady(t, ns, "pod")
	// containerd has one for each sandbox.
	if out := n.Output(t, "ctr", "-n", "k8s.io", "leases", "list"); strings.Contains(out, "selkies.io/") {
		t.Errorf("leases are left:\n%s", out)
	}
	if got := mounted(t, n, anchors, "/fs "); len(got) != 1 {
		t.Errorf("the cache disk is mounted for containerd as %q", got)
	}
}

// TestRollOut takes the agent to a new version and then away: the volume stays in use
// for as long as there is an agent, and running pods notice nothing.
func TestRollOut(t *testing.T) {
	c := world.cluster
	n := readyNode(t, cluster.NodeConfig{})
	ns := c.Namespace(t)
	pod := podOn(n, ns, "pod", ref(app))
	pod.Spec.Containers[0].ImagePullPolicy = corev1.PullNever
	c.Run(t, pod)
	before := c.WaitPodReady(t, ns, "pod")
	// A mount that went and came back would have another ID.
	anchor, volume := mounted(t, n, anchors, "/fs "), mounted(t, n, volumes)
	if len(anchor) != 1 || len(volume) != 1 {
		t.Fatalf("the disk is mounted as %q and %q", anchor, volume)
	}

	deploy(t, agentConfig{component: "pvc", image: injectorV2})
	c.Output(t, "rollout", "status", "daemonset/selkies-image-injector", "-n", agentNamespace, "--timeout=3m")
	if got := mounted(t, n, anchors, "/fs "); strings.Join(got, "\n") != anchor[0] {
		t.Errorf("after the roll-out the anchor is %q, before %q", got, anchor)
	}
	if got := mounted(t, n, volumes); strings.Join(got, "\n") != volume[0] {
		t.Errorf("after the roll-out the volume is %q, before %q", got, volume)
	}

	// kubelet does not unmount a device that is mounted elsewhere too: as long as the
	// anchor is, the disk stays in use and attached, also without an agent.
	removeAgent(t.Context(), t)
	if got := mounted(t, n, anchors, "/fs "); strings.Join(got, "\n") != anchor[0] {
		t.Errorf("without the agent the anchor is %q, before %q", got, anchor)
	}
	if got := mounted(t, n, volumes); strings.Join(got, "\n") != volume[0] {
		t.Errorf("without the agent the volume is %q, before %q", got, volume)
	}
	// What is registered outlives the agent.
	later := podOn(n, ns, "later", ref(app))
	later.Spec.Containers[0].ImagePullPolicy = corev1.PullNever
	c.Run(t, later)
	c.WaitPodReady(t, ns, "later")
	if got := containers(c.WaitPodReady(t, ns, "pod")); got != containers(before) {
		t.Errorf("the pod's container is %s, before it was %s", got, containers(before))
	}
}

// TestImageGCKeepsCached has kubelet collect all images that it may.
func TestImageGCKeepsCached(t *testing.T) {
	c := world.cluster
	n := readyNode(t, cluster.NodeConfig{})
	ns := c.Namespace(t)
	n.Output(t, "ctr", "-n", "k8s.io", "images", "pull", "--plain-http", ref(other))
	if err := n.SetKubelet(t.Context(), cluster.EagerImageGC()); err != nil {
		t.Fatal(err)
	}
	images := func() string { return n.Output(t, "ctr", "-n", "k8s.io", "images", "list", "-q") }
	cluster.Wait(t, "kubelet to collect an image", func(context.Context) error {
		if got := images(); strings.Contains(got, ref(other)) {
			return fmt.Errorf("there are:\n%s", got)
		}
		return nil
	})
	for _, image := range cached["first"] {
		if got := images(); !strings.Contains(got, ref(image)) {
			t.Errorf("%s is gone; there are:\n%s", image, got)
		}
		name := strings.ReplaceAll(image, ":", "-")
		pod := podOn(n, ns, name, ref(image))
		pod.Spec.Containers[0].ImagePullPolicy = corev1.PullNever
		c.Run(t, pod)
		c.WaitPodReady(t, ns, name)
	}
	if log := n.Journal(t.Context(), 1000, "kubelet"); strings.Contains(log, "errors in image deletion") {
		t.Errorf("kubelet could not remove an image:\n%s", log)
	}
}

// TestTwoDisks has two disks with an image in common, as secondary boot disks.
func TestTwoDisks(t *testing.T) {
	c := world.cluster
	disks := []cluster.Disk{{Name: firstDevice, Image: world.first}, {Name: secondDevice, Image: world.second}}
	n := c.Node(t, cluster.NodeConfig{Taints: []corev1.Taint{startupTaint}, Disks: disks})
	for _, d := range disks {
		mountSecondary(t, n, d)
	}
	ns := c.Namespace(t)
	world.reg.Reset()
	deploy(t, agentConfig{component: "secondary-boot-disk"})
	n.WaitTaint(t, startupTaint.Key, false)
	n.WaitCondition(t, agentCondition)
	for _, image := range []string{app, appNext, indexed} {
		name := strings.ReplaceAll(image, ":", "-")
		pod := podOn(n, ns, name, ref(image))
		pod.Spec.Containers[0].ImagePullPolicy = corev1.PullNever
		c.Run(t, pod)
		c.WaitPodReady(t, ns, name)
	}
	expectPulls(t, sandbox, injector)
}
