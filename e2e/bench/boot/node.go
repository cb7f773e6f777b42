package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/selkies-project/packer-plugin-selkies/e2e/cluster"
	"github.com/selkies-project/packer-plugin-selkies/e2e/desktop"
	"github.com/selkies-project/packer-plugin-selkies/e2e/host"
	"github.com/selkies-project/packer-plugin-selkies/e2e/registry"
)

// timeout is for one node, ten times what the pull takes on two slow cores.
const timeout = 10 * time.Minute

// boot is what both nodes have in common.
type boot struct {
	cluster *cluster.Cluster
	image   desktop.Image
	// registries have their blobs in memory, as a real one has in that of other machines.
	registries []*registry.Registry
}

// moments are when the API server told of something first, in seconds since the machine
// was made.
type moments map[string]float64

// measure has a node boot, from a cold page cache, and a pod that waits for it run to its end.
func (b *boot) measure(ctx context.Context, pod string, disk *cluster.Disk) (m moments, err error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	if err := b.createPod(ctx, pod); err != nil {
		return nil, err
	}
	if err := host.DropCaches(); err != nil {
		return nil, err
	}
	for _, r := range b.registries {
		if err := r.Warm(); err != nil {
			return nil, err
		}
	}
	m = moments{}
	began, watched := time.Now(), make(chan error, 1)
	go func() { watched <- b.watch(ctx, pod, began, m) }()
	var config cluster.NodeConfig
	if disk != nil {
		config = cluster.NodeConfig{Taints: []corev1.Taint{cluster.StartupTaint}, Disks: []cluster.Disk{*disk}}
	}
	node, err := b.cluster.NewNode(ctx, config)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, node.Close(ctx)) }()
	if disk != nil {
		if err := node.MountSecondary(ctx, *disk); err != nil {
			return nil, err
		}
	}
	if err := <-watched; err != nil {
		events, _ := b.cluster.Kubectl(context.WithoutCancel(ctx), "get", "events", "-A")
		return nil, fmt.Errorf("%w; the cluster's events:\n%s", err, events)
	}
	out, err := b.cluster.Kubectl(ctx, "logs", pod)
	if err == nil && !strings.Contains(out, b.image.Want) {
		err = fmt.Errorf("the pod said %q, not %q", out, b.image.Want)
	}
	return m, err
}

// createPod makes a pod that starts the browser and ends when it has drawn a page.
func (b *boot) createPod(ctx context.Context, name string) error {
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		_, err := b.cluster.Client.CoreV1().Pods(metav1.NamespaceDefault).Create(ctx, &corev1.Pod{
			ObjectMeta: metav1.ObjectMeta{Name: name},
			Spec: corev1.PodSpec{
				RestartPolicy: corev1.RestartPolicyNever,
				Containers: []corev1.Container{{
					Name: "desktop", Image: b.image.Ref, ImagePullPolicy: corev1.PullIfNotPresent, Command: b.image.Command,
				}},
			},
		}, metav1.CreateOptions{})
		// Pods are refused before the namespace's service account is there.
		if !apierrors.IsForbidden(err) {
			return err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return err
		}
	}
}

// watch notes the moments of the only node and of a pod, until the pod has ended.
func (b *boot) watch(ctx context.Context, name string, began time.Time, m moments) error {
	core := b.cluster.Client.CoreV1()
	nodes, err := core.Nodes().Watch(ctx, metav1.ListOptions{})
	if err != nil {
		return err
	}
	defer nodes.Stop()
	pods, err := core.Pods(metav1.NamespaceDefault).Watch(ctx, metav1.ListOptions{FieldSelector: "metadata.name=" + name})
	if err != nil {
		return err
	}
	defer pods.Stop()
	for {
		select {
		case e := <-nodes.ResultChan():
			if node, ok := e.Object.(*corev1.Node); ok {
				m.ofNode(time.Since(began), node)
				continue
			}
			return fmt.Errorf("watching the node: %v", e)
		case e := <-pods.ResultChan():
			pod, ok := e.Object.(*corev1.Pod)
			if !ok {
				return fmt.Errorf("watching the pod: %v", e)
			}
			m.ofPod(time.Since(began), pod)
			switch pod.Status.Phase {
			case corev1.PodSucceeded:
				return nil
			case corev1.PodFailed:
				return fmt.Errorf("the pod failed: %+v", pod.Status.ContainerStatuses)
			}
		case <-ctx.Done():
			return fmt.Errorf("waiting for the pod, having seen %v: %w", m, ctx.Err())
		}
	}
}

// ofNode notes when the node is ready, and when it is without the startup taint, with
// which the other one never joins.
func (m moments) ofNode(at time.Duration, node *corev1.Node) {
	m.note(at, "ready", slices.ContainsFunc(node.Status.Conditions, func(c corev1.NodeCondition) bool {
		return c.Type == corev1.NodeReady && c.Status == corev1.ConditionTrue
	}))
	m.note(at, "registered", !slices.ContainsFunc(node.Spec.Taints, func(t corev1.Taint) bool {
		return t.Key == cluster.StartupTaint.Key
	}))
}

// ofPod notes when the pod's container has started and when it has ended.
func (m moments) ofPod(at time.Duration, pod *corev1.Pod) {
	m.note(at, "started", slices.ContainsFunc(pod.Status.ContainerStatuses, func(s corev1.ContainerStatus) bool {
		return s.State.Waiting == nil
	}))
	m.note(at, "drawn", pod.Status.Phase == corev1.PodSucceeded)
}

func (m moments) note(at time.Duration, what string, is bool) {
	if _, ok := m[what]; is && !ok {
		m[what] = at.Seconds()
	}
}
