package agent

import (
	"context"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
)

// askWanted asks, once, which images the pods of this node need.
func (n *node) askWanted(ctx context.Context) {
	defer close(n.told)
	pods, err := n.client.listPods(ctx, metav1.ListOptions{
		FieldSelector:   fields.OneTermEqualSelector("spec.nodeName", n.name).String(),
		ResourceVersion: "0", // from the API server's memory
	})
	if err != nil {
		n.log.Warn("cannot list the node's pods; their images are not registered before the others", "error", err)
		return
	}
	n.wanted = imagesOf(pods)
}

// wantedImages are the images that pods wait for, if the API server tells soon.
func (n *node) wantedImages(ctx context.Context) []string {
	timer := time.NewTimer(wantedTime)
	defer timer.Stop()
	select {
	case <-n.told:
		return n.wanted
	case <-timer.C:
	case <-ctx.Done():
	}
	return nil
}

// imagesOf are the images of pods that have not ended, first of those that have not
// started, then in order of age.
func imagesOf(pods []corev1.Pod) []string {
	pods = slices.DeleteFunc(slices.Clone(pods), func(p corev1.Pod) bool {
		return p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed
	})
	slices.SortStableFunc(pods, func(a, b corev1.Pod) int {
		if pa, pb := a.Status.Phase == corev1.PodPending, b.Status.Phase == corev1.PodPending; pa != pb {
			if pa {
				return -1
			}
			return 1
		}
		return a.CreationTimestamp.Compare(b.CreationTimestamp.Time)
	})
	var images []string
	add := func(image string) {
		if image = strings.TrimSpace(image); image != "" && !slices.Contains(images, image) {
			images = append(images, image)
		}
	}
	for _, p := range pods {
		for _, c := range slices.Concat(p.Spec.InitContainers, p.Spec.Containers) {
			add(c.Image)
		}
	}
	return images
}
