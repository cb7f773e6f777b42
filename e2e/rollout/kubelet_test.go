//go:build e2e

package rollout_test

import (
	"context"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// kubelet says of the agents' and gates' pods what kubelets of their nodes would say.
type kubelet struct {
	mu     sync.Mutex
	broken func(*corev1.Pod) bool
}

// failing has pods that match not start from now on, nil for none.
func (k *kubelet) failing(match func(*corev1.Pod) bool) {
	k.mu.Lock()
	defer k.mu.Unlock()
	k.broken = match
}

func (k *kubelet) run(ctx context.Context) {
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for ctx.Err() == nil {
		// What goes wrong does so because the tests are at their end or because a pod has
		// changed meanwhile; the next look is the next try.
		_ = k.look(ctx)
		select {
		case <-tick.C:
		case <-ctx.Done():
		}
	}
}

func (k *kubelet) look(ctx context.Context) error {
	pods := world.Client.CoreV1().Pods(namespace)
	list, err := pods.List(ctx, metav1.ListOptions{})
	if err != nil {
		return err
	}
	for _, p := range list.Items {
		if p.Spec.NodeName == "" {
			continue
		}
		if p.DeletionTimestamp != nil {
			err = pods.Delete(ctx, p.Name, metav1.DeleteOptions{GracePeriodSeconds: new(int64(0))})
		} else if k.state(&p) {
			_, err = pods.UpdateStatus(ctx, &p, metav1.UpdateOptions{})
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// state brings a pod's status up to date and tells whether that is a change.
func (k *kubelet) state(p *corev1.Pod) bool {
	k.mu.Lock()
	broken := k.broken != nil && k.broken(p)
	k.mu.Unlock()
	status := corev1.ContainerStatus{Name: p.Spec.Containers[0].Name, Image: p.Spec.Containers[0].Image}
	ready := corev1.ConditionTrue
	if broken {
		ready, p.Status.Phase = corev1.ConditionFalse, corev1.PodPending
		status.State.Waiting = &corev1.ContainerStateWaiting{Reason: "ErrImagePull", Message: "refused by the test"}
	} else {
		p.Status.Phase, status.Ready = corev1.PodRunning, true
		status.State.Running = &corev1.ContainerStateRunning{StartedAt: metav1.Now()}
	}
	for i, c := range p.Status.Conditions {
		if c.Type == corev1.PodReady && c.Status == ready && len(p.Status.ContainerStatuses) > 0 {
			return false
		}
		if c.Type == corev1.PodReady {
			p.Status.Conditions[i].Status = ready
			p.Status.ContainerStatuses = []corev1.ContainerStatus{status}
			return true
		}
	}
	p.Status.Conditions = append(p.Status.Conditions, corev1.PodCondition{Type: corev1.PodReady, Status: ready})
	p.Status.ContainerStatuses = []corev1.ContainerStatus{status}
	return true
}
