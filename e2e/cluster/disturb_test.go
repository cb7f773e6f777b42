//go:build e2e

package cluster_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/watch"

	"github.com/selkies-project/packer-plugin-selkies/e2e/cluster"
)

// readyNode is a node with the first cache disk as a claim, whose images an agent has
// registered.
func readyNode(t testing.TB, config cluster.NodeConfig, agent cluster.Agent) *cluster.Node {
	t.Helper()
	disk := cluster.Disk{Name: firstDevice, Image: world.first}
	config.Disks = []cluster.Disk{disk}
	n := world.cluster.Node(t, config)
	world.cluster.Claim(t, agentNamespace, "image-cache", disk, n)
	agent.Component = "pvc"
	deploy(t, agent)
	n.WaitCondition(t, agentCondition)
	return n
}

// quickRestarts has kubelet wait a second before it starts a container again, not ten
// and more.
var quickRestarts = map[string]any{"crashLoopBackOff": map[string]string{"maxContainerRestartPeriod": "1s"}}

// rolledOut waits until the agent's pods are all of the last version, and ready.
func rolledOut(t *testing.T) {
	t.Helper()
	world.cluster.Output(t, "rollout", "status", "daemonset/selkies-image-injector", "-n", agentNamespace, "--timeout=3m")
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

// eject removes what is registered on a node without an agent. kubelet removes
// containers of pods that are gone when they have ended, some of them not before a minute
// has passed.
func eject(t *testing.T, n *cluster.Node) {
	t.Helper()
	spec := daemonSets(t, "secondary-boot-disk")[0].Spec.Template.Spec
	cluster.Wait(t, "eject to succeed", func(context.Context) error {
		ok, said := runOnce(t, n, spec, nil, "eject")
		if !ok && !strings.Contains(said, "remove the container first") {
			t.Fatal(said)
		}
		if !ok {
			return errors.New(said)
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

	stateDir  = "/var/lib/containerd"
	snapshots = stateDir + "/" + anchors
)

// TestReboot reboots a node: pods of cached images come back with the agent, also if
// it comes long after them.
func TestReboot(t *testing.T) {
	c := world.cluster
	n := readyNode(t, cluster.NodeConfig{Kubelet: quickRestarts}, cluster.Agent{})
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
	deploy(t, cluster.Agent{Component: "pvc"})
	waitRestarted(t, before)
	expectPulls(t)
}

// killWhen ends the agent by SIGKILL as soon as a condition holds on the node, in the
// shell's own words: a program takes longer than a layer. It prints how many layers
// are linked then.
const killWhen = `
links() {
	n=0
	for fs in ` + snapshots + `/*/fs; do [ -L "$fs" ] && n=$((n+1)); done
	echo $n
}
mounted() { set -- ` + snapshots + `/*/fs/selkies-image-cache; [ -e "$1" ]; }
pid=
until [ -n "$pid" ]; do
	for p in /proc/[0-9]*; do
		read -r name <$p/comm || continue
		# The gate has a user of its own.
		[ "$name" != selkies-image-i ] || [ ! -O $p ] || pid=${p#/proc/}
	done
done 2>/dev/null
until %s; do :; done
kill -KILL $pid
while [ -e /proc/$pid ]; do :; done
links`

// TestKillAgent ends the agent by SIGKILL in every phase of its work, and each time
// another one goes on from there.
func TestKillAgent(t *testing.T) {
	c := world.cluster
	disk := cluster.Disk{Name: firstDevice, Image: world.first}
	n := c.Node(t, cluster.NodeConfig{
		Taints:  []corev1.Taint{cluster.StartupTaint},
		Disks:   []cluster.Disk{disk},
		Kubelet: quickRestarts,
	})
	c.Claim(t, agentNamespace, "image-cache", disk, n)
	ns := c.Namespace(t)
	pod := podOn(n, ns, "pod", ref(app))
	pod.Spec.Containers[0].ImagePullPolicy = corev1.PullNever
	c.Run(t, pod)
	config := strings.TrimPrefix(blobsOf(t, indexed)[0], "sha256:")
	deploy(t, cluster.Agent{Component: "pvc", Env: map[string]string{"SELKIES_GATE_DEADLINE": "1h"}, Eager: true})
	kill := func(phase, condition string) (layers int) {
		t.Helper()
		layers, err := strconv.Atoi(strings.TrimSpace(n.Output(t, "sh", "-c", fmt.Sprintf(killWhen, condition))))
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("killed when %s: %d layers", phase, layers)
		return layers
	}
	kill("it starts", "true")
	kill("the disk is mounted", "mounted")
	const all = 4 // of the disk's layers
	atWork := false
	for layers := 1; layers < all; layers++ {
		// Before the signal comes the next layers may be linked too.
		got := kill(fmt.Sprintf("layer %d is linked", layers), fmt.Sprintf("[ $(links) -ge %d ]", layers))
		atWork = atWork || got > 0 && got < all
	}
	if !atWork {
		t.Error("the agent was never killed while it was at work on the layers")
	}
	kill("all layers are linked", fmt.Sprintf("[ $(links) -ge %d ]", all))
	kill("an image's content is there", "[ -e "+stateDir+"/io.containerd.content.v1.content/blobs/sha256/"+config+" ]")
	n.WaitTaint(t, cluster.StartupTaint.Key, false)
	kill("the gate is open", "true")
	n.WaitCondition(t, agentCondition)
	c.WaitPodReady(t, ns, "pod")
	if got := kill("all is done", "true"); got != all {
		t.Errorf("%d layers are linked in the end, want %d", got, all)
	}

	rolledOut(t)
	if got := c.WaitPodReady(t, ns, "pod").Status.ContainerStatuses[0]; got.RestartCount != 0 {
		t.Errorf("the pod was started again: %+v", got)
	}
	// containerd has one for each sandbox.
	if out := n.Output(t, "ctr", "-n", "k8s.io", "leases", "list"); strings.Contains(out, "selkies.io/") {
		t.Errorf("leases are left:\n%s", out)
	}
	if got := mounted(t, n, anchors, "/fs "); len(got) != 1 {
		t.Errorf("the cache disk is mounted for containerd as %q", got)
	}
}

// mountIDs are the IDs of the node's mounts whose lines have all of the words. Another
// mount in the same place has another ID, before Linux 6.8 not always.
func mountIDs(t *testing.T, n *cluster.Node, words ...string) []uint64 {
	t.Helper()
	var ids []uint64
	for _, line := range mounted(t, n, words...) {
		var st unix.Statx_t
		if err := unix.Statx(unix.AT_FDCWD, n.Path(strings.Fields(line)[4]), 0, unix.STATX_MNT_ID|unix.STATX_MNT_ID_UNIQUE, &st); err != nil {
			t.Fatal(err)
		}
		ids = append(ids, st.Mnt_id)
	}
	return ids
}

// watchAgents follows the agent's pods, and fails the test if at any time none is
// ready. stop ends that.
func watchAgents(t *testing.T) (stop func()) {
	t.Helper()
	pods := world.cluster.Client.CoreV1().Pods(agentNamespace)
	list, err := pods.List(t.Context(), metav1.ListOptions{LabelSelector: agentPods})
	if err != nil {
		t.Fatal(err)
	}
	ready := map[string]bool{}
	for _, p := range list.Items {
		ready[p.Name] = isReady(&p)
	}
	w, err := pods.Watch(t.Context(), metav1.ListOptions{LabelSelector: agentPods, ResourceVersion: list.ResourceVersion})
	if err != nil {
		t.Fatal(err)
	}
	stopping, done := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(done)
		for e := range w.ResultChan() {
			p, ok := e.Object.(*corev1.Pod)
			if !ok {
				select {
				case <-stopping: // which it takes for an error
					return
				default:
				}
				t.Errorf("watching the agent's pods: %v", e.Object)
				return
			}
			ready[p.Name] = e.Type != watch.Deleted && isReady(p)
			if !slices.Contains(slices.Collect(maps.Values(ready)), true) {
				t.Errorf("no agent is ready: %s is %s", p.Name, e.Type)
			}
		}
	}()
	return func() {
		close(stopping)
		w.Stop()
		<-done
		if len(ready) < 2 {
			t.Errorf("there was no other pod of the agent: %v", ready)
		}
	}
}

func isReady(pod *corev1.Pod) bool {
	return slices.ContainsFunc(pod.Status.Conditions, func(c corev1.PodCondition) bool {
		return c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue
	})
}

// TestRollOut takes the agent to a new version and then away: there is always a pod
// that uses the volume for as long as there is an agent, and running pods notice
// nothing.
func TestRollOut(t *testing.T) {
	c := world.cluster
	n := readyNode(t, cluster.NodeConfig{}, cluster.Agent{Eager: true})
	rolledOut(t)
	ns := c.Namespace(t)
	pod := podOn(n, ns, "pod", ref(app))
	pod.Spec.Containers[0].ImagePullPolicy = corev1.PullNever
	// It ends when it cannot read its image.
	pod.Spec.Containers[0].Command = []string{"/bin/sh", "-c", "trap exit TERM; while cat /bin/busybox >/dev/null; do sleep 0.1; done"}
	c.Run(t, pod)
	before := c.WaitPodReady(t, ns, "pod")
	anchor, volume := mountIDs(t, n, anchors, "/fs "), mountIDs(t, n, volumes)
	if len(anchor) != 1 || len(volume) != 1 {
		t.Fatalf("the disk is mounted as %d and %d", anchor, volume)
	}
	undisturbed := func(when string) {
		t.Helper()
		if got := mountIDs(t, n, anchors, "/fs "); !slices.Equal(got, anchor) {
			t.Errorf("%s the anchor is mount %d, before %d", when, got, anchor)
		}
		if got := mountIDs(t, n, volumes); !slices.Equal(got, volume) {
			t.Errorf("%s the volume is mount %d, before %d", when, got, volume)
		}
		if got := containers(c.WaitPodReady(t, ns, "pod")); got != containers(before) {
			t.Errorf("%s the pod's container is %s, before %s", when, got, containers(before))
		}
	}

	stop := watchAgents(t)
	deploy(t, cluster.Agent{Component: "pvc", Image: ref(injectorV2), Eager: true})
	rolledOut(t)
	stop()
	undisturbed("after the rollout")

	// kubelet does not unmount a device that is mounted elsewhere too: as long as the
	// anchor is, the disk stays in use and attached, also without an agent.
	removeAgent(t.Context(), t)
	undisturbed("without the agent")
	// What is registered outlives the agent.
	later := podOn(n, ns, "later", ref(app))
	later.Spec.Containers[0].ImagePullPolicy = corev1.PullNever
	c.Run(t, later)
	c.WaitPodReady(t, ns, "later")
	undisturbed("after another pod's start")

	for _, name := range []string{"pod", "later"} {
		if err := c.Client.CoreV1().Pods(ns).Delete(t.Context(), name, metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
		c.WaitPodGone(t, ns, name)
	}
	eject(t, n)
	cluster.Wait(t, "kubelet to let go of the volume", func(context.Context) error {
		if got := mounted(t, n, volumes); len(got) != 0 {
			return fmt.Errorf("it is mounted as %q", got)
		}
		return nil
	})
}

// TestImageGCKeepsCached has kubelet collect all images that it may, for want of room
// on the disk.
func TestImageGCKeepsCached(t *testing.T) {
	c := world.cluster
	n := readyNode(t, cluster.NodeConfig{}, cluster.Agent{})
	ns := c.Namespace(t)
	agent := containers(onlyAgent(t, n))
	n.Output(t, "ctr", "-n", "k8s.io", "images", "pull", "--plain-http", ref(other))
	images := func() string { return n.Output(t, "ctr", "-n", "k8s.io", "images", "list", "-q") }
	cluster.Wait(t, "the CRI to know the image", func(context.Context) error {
		// kubelet sees what the CRI has taken note of.
		if got := n.Output(t, "ctr", "-n", "k8s.io", "images", "list", "name=="+ref(other)); !strings.Contains(got, "io.cri-containerd.image=managed") {
			return fmt.Errorf("there is %s", got)
		}
		return nil
	})
	if err := n.SetKubelet(t.Context(), cluster.DiskPressure()); err != nil {
		t.Fatal(err)
	}
	n.WaitCondition(t, corev1.NodeDiskPressure)
	cluster.Wait(t, "kubelet to collect an image", func(context.Context) error {
		if got := images(); strings.Contains(got, ref(other)) {
			return fmt.Errorf("there are:\n%s", got)
		}
		return nil
	})
	log := n.Journal(t.Context(), 1000, "kubelet")
	if !strings.Contains(log, "Attempting to delete unused images") {
		t.Errorf("kubelet has collected %s for another reason:\n%s", other, log)
	}
	for _, failure := range []string{"errors in image deletion", "Failed to remove image", "error when attempting to reduce resource pressure"} {
		if strings.Contains(log, failure) {
			t.Errorf("kubelet could not remove an image:\n%s", log)
		}
	}
	got := images()
	for _, image := range cached["first"] {
		if !strings.Contains(got, ref(image)) {
			t.Errorf("%s is gone; there are:\n%s", image, got)
		}
	}
	if now := containers(onlyAgent(t, n)); now != agent {
		t.Errorf("the agent's container is %s, before the pressure %s", now, agent)
	}

	if err := n.SetKubelet(t.Context(), map[string]any{"evictionHard": map[string]string{}}); err != nil {
		t.Fatal(err)
	}
	n.WaitTaint(t, corev1.TaintNodeDiskPressure, false)
	for _, image := range cached["first"] {
		name := strings.ReplaceAll(image, ":", "-")
		pod := podOn(n, ns, name, ref(image))
		pod.Spec.Containers[0].ImagePullPolicy = corev1.PullNever
		c.Run(t, pod)
		c.WaitPodReady(t, ns, name)
	}
}

// onlyAgent is the agent's one pod on a node.
func onlyAgent(t *testing.T, n *cluster.Node) *corev1.Pod {
	t.Helper()
	pods, err := world.cluster.Client.CoreV1().Pods(agentNamespace).List(t.Context(), metav1.ListOptions{
		LabelSelector: agentPods,
		FieldSelector: "spec.nodeName=" + n.Name,
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(pods.Items) != 1 {
		t.Fatalf("%s has %d pods of the agent", n.Name, len(pods.Items))
	}
	return &pods.Items[0]
}

// TestTwoDisks has two disks with an image in common, as secondary boot disks. Then there
// is one more, which is broken, and one of the two goes away.
func TestTwoDisks(t *testing.T) {
	c := world.cluster
	disks := []cluster.Disk{{Name: firstDevice, Image: world.first}, {Name: secondDevice, Image: world.second}}
	n := c.Node(t, cluster.NodeConfig{Taints: []corev1.Taint{cluster.StartupTaint}, Disks: disks})
	for _, d := range disks {
		mountSecondary(t, n, d)
	}
	ns := c.Namespace(t)
	world.reg.Reset()
	deploy(t, cluster.Agent{Component: "secondary-boot-disk", Env: map[string]string{
		"SELKIES_GATE_DEADLINE": "1h", "SELKIES_CHECK_INTERVAL": "2s", "SELKIES_GONE_AFTER": "3s",
	}})
	n.WaitTaint(t, cluster.StartupTaint.Key, false)
	n.WaitCondition(t, agentCondition)
	for _, image := range []string{app, appNext} {
		name := strings.ReplaceAll(image, ":", "-")
		pod := podOn(n, ns, name, ref(image))
		pod.Spec.Containers[0].ImagePullPolicy = corev1.PullNever
		c.Run(t, pod)
		c.WaitPodReady(t, ns, name)
	}
	ctr := func(args ...string) string { return n.Output(t, append([]string{"ctr", "-n", "k8s.io"}, args...)...) }
	ctr("run", "--rm", ref(indexed), "test", "/bin/busybox", "true") // an image of the first disk alone
	expectPulls(t, sandbox, injector)

	if err := n.WriteFile(cluster.SecondaryDisks+"broken/selkies-image-cache/manifest.json", []byte("{"), 0o644); err != nil {
		t.Fatal(err)
	}
	waitEvent(t, n, "Partial")
	n.Output(t, "umount", "--lazy", "--all-targets", disks[0].Device())
	waitEvent(t, n, "Ejected")
	// No container uses this one any more.
	if out := ctr("images", "list", "-q", "name=="+ref(indexed)); out != "" {
		t.Errorf("%s is there without its disk", ref(indexed))
	}
}

// TestEjectGone has a node whose disk is gone and whose agent cannot start without it: the
// agent without a disk removes what is registered, and pods pull.
func TestEjectGone(t *testing.T) {
	c := world.cluster
	n := readyNode(t, cluster.NodeConfig{}, cluster.Agent{})
	removeAgent(t.Context(), t)
	n.Output(t, "umount", "--lazy", "--all-targets", cluster.Disk{Name: firstDevice}.Device())

	repository, tag, _ := strings.Cut(injector, ":")
	err := c.ApplyKustomization(t.Context(), fmt.Sprintf(`resources:
- EXAMPLES/eject
images:
- {name: us-docker.pkg.dev/my-project/tools/selkies-image-injector, newName: %s, newTag: %q}
patches:
- target: {kind: DaemonSet}
  patch: |-
    - {op: replace, path: /spec/template/spec/nodeSelector/kubernetes.io~1hostname, value: %s}
    - {op: add, path: /spec/template/spec/containers/0/env/-, value: {name: SELKIES_GONE_AFTER, value: 3s}}
`, ref(repository), tag, n.Name))
	if err != nil {
		t.Fatal(err)
	}
	waitEvent(t, n, "Ejected")
	if out := n.Output(t, "ctr", "-n", "k8s.io", "images", "list", "-q", "name=="+ref(app)); out != "" {
		t.Errorf("%s is there without its disk", ref(app))
	}
	ns := c.Namespace(t)
	c.Run(t, podOn(n, ns, "pod", ref(app)))
	c.WaitPodReady(t, ns, "pod")
}
