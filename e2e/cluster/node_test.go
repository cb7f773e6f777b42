//go:build e2e

package cluster_test

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/selkies-project/packer-plugin-selkies/e2e/cluster"
	"github.com/selkies-project/packer-plugin-selkies/e2e/host"
	"github.com/selkies-project/packer-plugin-selkies/e2e/machine"
)

// podOn is a pod that has to run on one node and stays until it is deleted.
func podOn(n *cluster.Node, namespace, name, image string) *corev1.Pod {
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name},
		Spec: corev1.PodSpec{
			NodeSelector:                  map[string]string{corev1.LabelHostname: n.Name},
			TerminationGracePeriodSeconds: new(int64),
			Containers: []corev1.Container{{
				Name: "main", Image: image, ImagePullPolicy: corev1.PullIfNotPresent,
				// A process with ID 1 that ignores SIGTERM holds up a reboot.
				Command: []string{"/bin/sh", "-c", "trap exit TERM; sleep 86400 & wait"},
			}},
		},
	}
}

// TestStartupTaint has a node join with the startup taint: a pod that tolerates it
// runs, another one only once it is gone.
func TestStartupTaint(t *testing.T) {
	t.Parallel()
	c := world.cluster
	n := c.Node(t, cluster.NodeConfig{Taints: []corev1.Taint{cluster.StartupTaint}})
	ns := c.Namespace(t)
	tolerant := podOn(n, ns, "tolerant", ref(plain))
	tolerant.Spec.Tolerations = []corev1.Toleration{{Key: cluster.StartupTaint.Key, Operator: corev1.TolerationOpExists}}
	c.Run(t, tolerant)
	c.Run(t, podOn(n, ns, "other", ref(plain)))

	pod := c.WaitPodReady(t, ns, "tolerant")
	if pod.Status.PodIP == n.IP {
		t.Error("the pod has the node's address, not one of its own")
	}
	// Through the API server to kubelet and containerd, and back to the API server where
	// clients in pods look for it.
	c.Output(t, "exec", "-n", ns, "tolerant", "--", "/bin/sh", "-c",
		`nc -w 10 "$KUBERNETES_SERVICE_HOST" "$KUBERNETES_SERVICE_PORT" </dev/null`)

	c.WaitPodUnschedulable(t, ns, "other")
	c.Output(t, "taint", "node", n.Name, cluster.StartupTaint.Key+"-")
	n.WaitTaint(t, cluster.StartupTaint.Key, false)
	c.WaitPodReady(t, ns, "other")
}

// TestClaim mounts a disk through a claim: kubelet mounts the device for the pod and
// unmounts it when the pod goes.
func TestClaim(t *testing.T) {
	t.Parallel()
	c := world.cluster
	disk := cluster.Disk{Name: "data", Image: filepath.Join(t.TempDir(), "disk")}
	if err := host.NewDisk(disk.Image, 64<<20); err != nil {
		t.Fatal(err)
	}
	contents := t.TempDir()
	if err := os.WriteFile(filepath.Join(contents, "file"), []byte("on the disk"), 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := host.Output(exec.Command("mkfs.ext4", "-q", "-F", "-d", contents, disk.Image)); err != nil {
		t.Fatal(err)
	}
	n := c.Node(t, cluster.NodeConfig{Disks: []cluster.Disk{disk}})
	ns := c.Namespace(t)
	c.Claim(t, ns, "data", disk, n)
	pod := podOn(n, ns, "reader", ref(plain))
	pod.Spec.Volumes = []corev1.Volume{{Name: "data", VolumeSource: corev1.VolumeSource{
		PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: "data", ReadOnly: true},
	}}}
	pod.Spec.Containers[0].VolumeMounts = []corev1.VolumeMount{{Name: "data", MountPath: "/data", ReadOnly: true}}
	c.Run(t, pod)
	c.WaitPodReady(t, ns, "reader")
	if out := c.Output(t, "exec", "-n", ns, "reader", "--", "/bin/sh", "-c", "cat /data/file"); out != "on the disk" {
		t.Errorf("the pod reads %q", out)
	}
	// It outlives a reboot, with the disk there before kubelet.
	if err := n.Reboot(t.Context()); err != nil {
		t.Fatal(err)
	}
	n.WaitReady(t)
	cluster.Wait(t, "the pod to read again", func(ctx context.Context) error {
		_, err := c.Kubectl(ctx, "exec", "-n", ns, "reader", "--", "/bin/sh", "-c", "cat /data/file")
		return err
	})

	mounts := func() string {
		t.Helper()
		out := n.Output(t, "cat", "/proc/self/mountinfo")
		var found []string
		for line := range strings.Lines(out) {
			if strings.Contains(line, "/local-volume/mounts/") || strings.Contains(line, "kubernetes.io~local-volume") {
				found = append(found, line)
			}
		}
		return strings.Join(found, "")
	}
	if got := mounts(); strings.Count(got, "\n") != 2 || !strings.Contains(got, " ro,") {
		t.Errorf("kubelet has mounted the device and the pod's volume as:\n%s", got)
	}
	if err := c.Client.CoreV1().Pods(ns).Delete(t.Context(), "reader", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	cluster.Wait(t, "kubelet to unmount the disk", func(context.Context) error {
		if got := mounts(); got != "" {
			return fmt.Errorf("mounted:\n%s", got)
		}
		return nil
	})
}

// TestKillContainerd ends containerd under a running pod, which goes on.
func TestKillContainerd(t *testing.T) {
	t.Parallel()
	c := world.cluster
	n := c.Node(t, cluster.NodeConfig{Release: machine.Debian})
	ns := c.Namespace(t)
	c.Run(t, podOn(n, ns, "pod", ref(plain)))
	before := c.WaitPodReady(t, ns, "pod")
	if err := n.KillContainerd(t.Context()); err != nil {
		t.Fatal(err)
	}
	c.Run(t, podOn(n, ns, "later", ref(plain)))
	c.WaitPodReady(t, ns, "later")
	after := c.WaitPodReady(t, ns, "pod")
	if before.Status.ContainerStatuses[0].ContainerID != after.Status.ContainerStatuses[0].ContainerID {
		t.Errorf("the container was started again: %+v", after.Status.ContainerStatuses)
	}
}
