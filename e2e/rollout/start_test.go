//go:build e2e

package rollout_test

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"testing"

	"cloud.google.com/go/compute/apiv1/computepb"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/selkies-project/packer-plugin-selkies/e2e/cluster"
)

// daemonSet is one of the cache's.
func daemonSet(t *testing.T, name string) *appsv1.DaemonSet {
	t.Helper()
	ds, err := world.Client.AppsV1().DaemonSets(namespace).Get(t.Context(), name, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	return ds
}

// waitGate waits until the gate has as many pods, all of the image and none replaced.
func (c *cloud) waitGate(pods int, image string) {
	c.t.Helper()
	cluster.Wait(c.t, "the gate", func(ctx context.Context) error {
		list, err := world.Client.CoreV1().Pods(namespace).List(ctx, metav1.ListOptions{LabelSelector: "app.kubernetes.io/name=selkies-image-gate,app.kubernetes.io/instance=" + c.name})
		if err != nil {
			return err
		}
		var images []string
		for _, p := range list.Items {
			images = append(images, p.Spec.Containers[0].Image)
		}
		if !slices.Equal(images, slices.Repeat([]string{image}, pods)) {
			return fmt.Errorf("it has %q", images)
		}
		return nil
	})
}

// TestNoStart has an injector's image that nodes cannot start. What was there before
// goes on.
func TestNoStart(t *testing.T) {
	c := newCloud(t, "nostart", administrator(t))
	c.tidy()
	addNode(t, "na", zoneA)
	second, pinned, err := pushInjector(world.registry, "nostart")
	if err != nil {
		t.Fatal(err)
	}
	world.kubelet.failing(func(p *corev1.Pod) bool { return p.Spec.Containers[0].Image == pinned })
	defer world.kubelet.failing(nil)

	// There is nothing yet that could go on.
	err = c.process(t.Context(), &ui{}, c.build(1), "injector_image", second, "start_timeout", "2s")
	if err == nil || !strings.Contains(err.Error(), "no pod of DaemonSet nostart-gate was ready after 2s: pod nostart-gate-") ||
		!strings.Contains(err.Error(), `on node "na": ErrImagePull: refused by the test; there was none before, so it stays`) {
		t.Errorf("error is %v", err)
	}
	c.waitObjects()
	c.must(c.build(2))
	c.waitGenerations(map[string]string{"na": c.diskName(zoneA, 2)})
	c.waitGate(1, world.pinned)

	// The gate runs on all nodes, and fails first.
	err = c.process(t.Context(), &ui{}, c.build(3), "injector_image", second, "start_timeout", "2s")
	if err == nil || !strings.Contains(err.Error(), "DaemonSet nostart-gate was ready after 2s: ") || !strings.Contains(err.Error(), "; the pods that it had before go on") {
		t.Errorf("error is %v", err)
	}
	c.waitGate(1, world.pinned)
	c.waitObjects(slices.Concat(c.three(zoneA, 2), c.three(zoneB, 2))...)
	if err := c.working(); err != nil {
		t.Error(err)
	}
}

// tier is a node selector.
func tier(value string) map[string]string { return map[string]string{"app.broker/tier": value} }

// TestNoAgentStarts has the gate start and no agent of the new generation, as where its
// disk cannot be attached. The former generation goes on.
func TestNoAgentStarts(t *testing.T) {
	c := newCloud(t, "noagent", administrator(t))
	c.tidy()
	c.must(c.build(1), "node_selector", tier("a"))
	addNode(t, "oa", zoneA, "a")
	old := map[string]string{"oa": c.diskName(zoneA, 1)}
	c.waitGenerations(old)

	// A node that the former generation does not take.
	addNode(t, "ob", zoneA, "b")
	next := c.diskName(zoneA, 2)
	world.kubelet.failing(func(p *corev1.Pod) bool { return p.Labels[diskLabel] == next })
	defer world.kubelet.failing(nil)
	run := func() {
		t.Helper()
		err := c.process(t.Context(), &ui{}, artifact(imageName(2)), "node_selector", tier("b"), "start_timeout", "2s")
		if err == nil || !strings.Contains(err.Error(), "zone us-central1-a: no pod of DaemonSet "+next+" was ready after 2s: pod "+next) ||
			!strings.Contains(err.Error(), "refused by the test; "+c.diskName(zoneA, 1)+" goes on to take new nodes") {
			t.Errorf("error is %v", err)
		}
		if err := c.working(); err != nil {
			t.Error(err)
		}
	}
	c.build(2)
	run()
	// The other zone has it: the image is one to go back to.
	got, err := c.Clients(t).Images.Get(t.Context(), &computepb.GetImageRequest{Project: project, Image: imageName(2)})
	if err != nil || got.GetLabels()["noagent-rolled-out"] == "" {
		t.Errorf("the image's labels are %v, error %v", got.GetLabels(), err)
	}
	c.waitGenerations(old)
	others := slices.Concat(c.two(zoneA, 2), c.three(zoneA, 1), c.two(zoneB, 1), c.three(zoneB, 2))
	c.waitObjects(others...)

	// Should an agent say that it has the disk, its node keeps it.
	world.Output(t, "label", "node", "ob", diskLabel+"="+next)
	run()
	c.waitObjects(append(others, "DaemonSet/"+next)...)
	if terms := daemonSet(t, next).Spec.Template.Spec.Affinity.NodeAffinity.RequiredDuringSchedulingIgnoredDuringExecution.NodeSelectorTerms; len(terms) != 1 {
		t.Errorf("the new generation takes %v", terms)
	}

	world.kubelet.failing(nil)
	c.must(artifact(imageName(2)), "node_selector", tier("b"))
	c.waitGenerations(with(old, "ob", next))
}

// TestTwoCaches has two caches for different nodes in one cluster. Each has a gate of
// its own.
func TestTwoCaches(t *testing.T) {
	a, b := newCloud(t, "caches-a", administrator(t)), newCloud(t, "caches-b", "admin-testtwocaches")
	a.tidy()
	b.tidy()
	addNode(t, "ta", zoneA, "a")
	addNode(t, "tb", zoneA, "b")
	second, pinned, err := pushInjector(world.registry, "caches")
	if err != nil {
		t.Fatal(err)
	}
	for stamp := 1; stamp <= 2; stamp++ {
		a.must(a.build(stamp), "node_selector", tier("a"))
		b.must(b.build(stamp), "node_selector", tier("b"), "injector_image", second)
		a.waitGate(1, world.pinned)
		b.waitGate(1, pinned)
		a.waitGenerations(map[string]string{"ta": a.diskName(zoneA, 1)})
		b.waitGenerations(map[string]string{"tb": b.diskName(zoneA, 1)})
	}
}
