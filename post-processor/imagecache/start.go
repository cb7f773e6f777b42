package imagecache

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"github.com/selkies-project/packer-plugin-selkies/gcp"
)

// A claim and the pods of a DaemonSet are looked at soon, since there may be little to wait
// for, and then less and less often.
const (
	firstLook = 50 * time.Millisecond
	longLook  = 2 * time.Second
)

// labelTemplate is by what the controller knows which template a pod is of.
const labelTemplate = "pod-template-generation"

// start applies a DaemonSet and waits until the first of its pods is ready. If none
// gets so far, what there was before is brought back.
func (k *cluster) start(ctx context.Context, ds *unstructured.Unstructured) error {
	if err := k.apply(ctx, ds); err != nil {
		return err
	}
	err := k.waitStarted(ctx, ds.GetName())
	if err == nil || ctx.Err() != nil {
		return err
	}
	left, failed := k.bringBack(ctx, ds)
	if failed != nil {
		return fmt.Errorf("%w; bringing back what there was before: %w", err, failed)
	}
	return fmt.Errorf("%w; %s", err, left)
}

// waitStarted waits for the first ready pod of a DaemonSet, if a node is there for it.
func (k *cluster) waitStarted(ctx context.Context, name string) error {
	if k.run.config.DryRun {
		return nil
	}
	timeout := k.run.config.StartTimeout
	end, told := time.Now().Add(timeout), time.Now()
	for interval := firstLook; ; interval = min(2*interval, longLook) {
		lacks, err := k.lacks(ctx, name)
		if err == nil && lacks == "" {
			return nil
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if apierrors.IsForbidden(err) {
			return explain(err)
		}
		if err != nil { // it may answer in a moment
			lacks = err.Error()
		}
		if time.Now().After(end) {
			return fmt.Errorf("no pod of DaemonSet %s was ready after %s: %s", name, timeout, lacks)
		}
		if time.Since(told) > tellInterval {
			told = time.Now()
			k.run.say("cluster %s: waiting for the first pod of DaemonSet %s: %s", k, name, lacks)
		}
		if err := gcp.Sleep(ctx, interval); err != nil {
			return err
		}
	}
}

// lacks says why no pod of a DaemonSet is ready, "" if one is or if no node is there
// for one: a node that has another generation, or that is down, is not.
func (k *cluster) lacks(ctx context.Context, name string) (string, error) {
	ds, err := k.typed.AppsV1().DaemonSets(namespace).Get(ctx, name, metav1.GetOptions{})
	if err != nil {
		return "", fmt.Errorf("getting DaemonSet %s: %w", name, err)
	}
	if ds.Status.ObservedGeneration < ds.Generation {
		return "the cluster has not looked at it yet", nil
	}
	if ds.Status.DesiredNumberScheduled == 0 {
		return "", nil
	}
	list, err := k.typed.CoreV1().Nodes().List(ctx, metav1.ListOptions{})
	if err != nil {
		return "", fmt.Errorf("listing nodes: %w", err)
	}
	up := map[string]bool{}
	for _, n := range list.Items {
		up[n.Name] = slices.ContainsFunc(n.Status.Conditions, func(c corev1.NodeCondition) bool {
			return c.Type == corev1.NodeReady && c.Status == corev1.ConditionTrue
		})
	}
	pods, err := k.typed.CoreV1().Pods(namespace).List(ctx, metav1.ListOptions{LabelSelector: metav1.FormatLabelSelector(ds.Spec.Selector)})
	if err != nil {
		return "", fmt.Errorf("listing pods: %w", err)
	}
	there, lacks := 0, ""
	for _, p := range pods.Items {
		if p.DeletionTimestamp != nil || !k.isNew(&p, ds) {
			continue
		}
		if podIs(&p, corev1.PodReady, corev1.ConditionTrue) {
			return "", nil
		}
		there++
		if up[p.Spec.NodeName] || p.Spec.NodeName == "" && !podIs(&p, corev1.PodScheduled, corev1.ConditionFalse) {
			lacks = lacksOf(&p)
		}
	}
	if lacks == "" && there < int(ds.Status.DesiredNumberScheduled) {
		lacks = "it has no pod yet"
	}
	return lacks, nil
}

// isNew tells whether a pod runs the injector's image or is of the DaemonSet's latest
// template: an admission webhook may have given the image another name.
func (k *cluster) isNew(p *corev1.Pod, ds *appsv1.DaemonSet) bool {
	return p.Spec.Containers[0].Image == k.run.config.InjectorImage ||
		p.Labels[labelTemplate] == ds.Annotations[appsv1.DeprecatedTemplateGeneration]
}

func podIs(p *corev1.Pod, condition corev1.PodConditionType, status corev1.ConditionStatus) bool {
	return slices.ContainsFunc(p.Status.Conditions, func(c corev1.PodCondition) bool { return c.Type == condition && c.Status == status })
}

// lacksOf says why a pod is not ready.
func lacksOf(p *corev1.Pod) string {
	why := fmt.Sprintf("it has not started; see kubectl -n %s describe pod %s", namespace, p.Name)
	for _, s := range p.Status.ContainerStatuses {
		switch last := s.LastTerminationState.Terminated; {
		case last != nil:
			why = fmt.Sprintf("it ended with status %d; see kubectl -n %s logs %s", last.ExitCode, namespace, p.Name)
		case s.State.Waiting != nil && s.State.Waiting.Message != "":
			why = s.State.Waiting.Reason + ": " + strings.Join(strings.Fields(s.State.Waiting.Message), " ")
		case s.State.Running != nil:
			why = fmt.Sprintf("it runs and is not ready; see kubectl -n %s logs %s", namespace, p.Name)
		}
	}
	return fmt.Sprintf("pod %s on node %q: %s", p.Name, p.Spec.NodeName, why)
}

// bringBack has what there was before take the place of a DaemonSet whose pods do not
// start, and says what that is.
func (k *cluster) bringBack(ctx context.Context, ds *unstructured.Unstructured) (left string, err error) {
	name, zone := ds.GetName(), ds.GetLabels()[labelZone]
	if before := k.daemonSets[name]; before != nil {
		o, err := applied(before)
		if err != nil {
			return "", err
		}
		return "the pods that it had before go on", k.apply(ctx, o)
	}
	for _, former := range slices.Sorted(maps.Keys(k.daemonSets)) {
		d := &zoneDisk{config: k.run.config, name: former, zone: zone}
		if f := k.daemonSets[former]; zone != "" && f.Labels[labelZone] == zone && !d.locked(f) {
			return fmt.Sprintf("%s goes on to take new nodes", former), k.takeBack(ctx, name)
		}
	}
	return "there was none before, so it stays", nil
}

// takeBack deletes the DaemonSet of a new generation. If an agent says that its node
// has the disk, it is locked to such nodes instead.
func (k *cluster) takeBack(ctx context.Context, name string) error {
	var now nodes
	if err := k.lookAtNodes(ctx, &now); err != nil {
		return err
	}
	k.nodes = now
	sets := k.typed.AppsV1().DaemonSets(namespace)
	if slices.Contains(slices.Collect(maps.Values(now.labelled)), name) {
		ds, err := sets.Get(ctx, name, metav1.GetOptions{})
		if err != nil {
			return fmt.Errorf("getting DaemonSet %s: %w", name, explain(err))
		}
		return k.lock(ctx, ds)
	}
	return k.delete(ctx, "DaemonSet", name, sets.Delete)
}
