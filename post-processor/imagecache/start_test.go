package imagecache

import (
	"testing"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

func pod(image, template string, statuses ...corev1.ContainerStatus) *corev1.Pod {
	return &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Name: "gate-x", Labels: map[string]string{labelTemplate: template}},
		Spec:       corev1.PodSpec{NodeName: "n", Containers: []corev1.Container{{Image: image}}},
		Status:     corev1.PodStatus{ContainerStatuses: statuses},
	}
}

func TestIsNew(t *testing.T) {
	k := &cluster{run: &run{config: &Config{InjectorImage: "registry.example/injector@sha256:new"}}}
	ds := &appsv1.DaemonSet{ObjectMeta: metav1.ObjectMeta{Annotations: map[string]string{appsv1.DeprecatedTemplateGeneration: "2"}}}
	for _, tt := range []struct {
		name string
		pod  *corev1.Pod
		want bool
	}{
		{"replaced", pod("registry.example/injector@sha256:old", "1"), false},
		{"new", pod("registry.example/injector@sha256:new", "2"), true},
		{"image from a mirror", pod("mirror.example/injector@sha256:new", "2"), true},
		{"template with other nodes", pod("registry.example/injector@sha256:new", "1"), true},
	} {
		if got := k.isNew(tt.pod, ds); got != tt.want {
			t.Errorf("%s: %v", tt.name, got)
		}
	}
}

func TestLacksOf(t *testing.T) {
	waiting := corev1.ContainerStatus{State: corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: "ErrImagePull", Message: "no such\nimage"}}}
	ended := corev1.ContainerStatus{
		State:                corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: "CrashLoopBackOff", Message: "back-off"}},
		LastTerminationState: corev1.ContainerState{Terminated: &corev1.ContainerStateTerminated{ExitCode: 2}},
	}
	running := corev1.ContainerStatus{State: corev1.ContainerState{Running: &corev1.ContainerStateRunning{}}}
	for _, tt := range []struct {
		pod  *corev1.Pod
		want string
	}{
		{pod("i", "1"), `pod gate-x on node "n": it has not started; see kubectl -n selkies-image-cache describe pod gate-x`},
		{pod("i", "1", waiting), `pod gate-x on node "n": ErrImagePull: no such image`},
		{pod("i", "1", ended), `pod gate-x on node "n": it ended with status 2; see kubectl -n selkies-image-cache logs gate-x`},
		{pod("i", "1", running), `pod gate-x on node "n": it runs and is not ready; see kubectl -n selkies-image-cache logs gate-x`},
	} {
		if got := lacksOf(tt.pod); got != tt.want {
			t.Errorf("it says %q, want %q", got, tt.want)
		}
	}
}
