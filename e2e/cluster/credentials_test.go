//go:build e2e

package cluster_test

import (
	"encoding/base64"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/selkies-project/packer-plugin-selkies/e2e/cachedisk"
	"github.com/selkies-project/packer-plugin-selkies/e2e/cluster"
	"github.com/selkies-project/packer-plugin-selkies/manifest"
)

// private is an image of a repository that asks for credentials, on a cache disk of its
// test alone.
const private = "private:1"

// TestCredentialPolicies has pods with and without credentials use a private image that
// is registered from a cache disk, under each of kubelet's policies. SECURITY.md has the
// same table.
func TestCredentialPolicies(t *testing.T) {
	c := world.cluster
	const user, password = "tenant", "secret"
	if err := tag(t.Context(), app, private); err != nil {
		t.Fatal(err)
	}
	repository, _, _ := strings.Cut(private, ":")
	world.reg.Protect(repository, user, password)
	t.Cleanup(func() { world.reg.Protect("", "", "") })

	disk := cluster.Disk{Name: firstDevice, Image: renamed(t, world.first, app, private)}
	n := c.Node(t, cluster.NodeConfig{Disks: []cluster.Disk{disk}})
	mountSecondary(t, n, disk)
	if ok, said := runOnce(t, n, daemonSets(t, "secondary-boot-disk")[0].Spec.Template.Spec, nil, "inject"); !ok {
		t.Fatal(said)
	}
	ns := c.Namespace(t)
	auth, err := json.Marshal(map[string]any{"auths": map[string]any{world.reg.Addr: map[string]string{
		"auth": base64.StdEncoding.EncodeToString([]byte(user + ":" + password)),
	}}})
	if err != nil {
		t.Fatal(err)
	}
	_, err = c.Client.CoreV1().Secrets(ns).Create(t.Context(), &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Name: "tenant"}, Type: corev1.SecretTypeDockerConfigJson,
		Data: map[string][]byte{corev1.DockerConfigJsonKey: auth},
	}, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}

	const runs, refused, never = "runs", "ErrImagePull", "ErrImageNeverPull"
	type outcome struct{ IfNotPresent, Never string }
	for i, tt := range []struct {
		policy      string
		allowed     []string
		credentials bool
		want        outcome
	}{
		{"NeverVerifyPreloadedImages", nil, false, outcome{runs, runs}},
		{"NeverVerifyPreloadedImages", nil, true, outcome{runs, runs}},
		{"NeverVerify", nil, false, outcome{runs, runs}},
		{"NeverVerifyAllowlistedImages", []string{world.reg.Addr + "/" + repository}, false, outcome{runs, runs}},
		{"NeverVerifyAllowlistedImages", []string{world.reg.Addr + "/other"}, false, outcome{refused, never}},
		{"AlwaysVerify", nil, false, outcome{refused, never}},
		// Their pull is recorded, so the image is not preloaded any more.
		{"AlwaysVerify", nil, true, outcome{runs, runs}},
		{"AlwaysVerify", nil, false, outcome{refused, never}},
		{"NeverVerifyPreloadedImages", nil, false, outcome{refused, never}},
		{"NeverVerifyPreloadedImages", nil, true, outcome{runs, runs}},
		{"NeverVerify", nil, false, outcome{runs, runs}},
	} {
		t.Run(fmt.Sprintf("%d %s, credentials %t", i, tt.policy, tt.credentials), func(t *testing.T) {
			err := n.SetKubelet(t.Context(), map[string]any{
				"imagePullCredentialsVerificationPolicy": tt.policy, "preloadedImagesVerificationAllowlist": tt.allowed,
			})
			if err != nil {
				t.Fatal(err)
			}
			world.reg.Reset()
			// With AlwaysVerify a pod that may not pull needs the other's pull first.
			got := outcome{ended(t, n, ns, corev1.PullIfNotPresent, tt.credentials), ended(t, n, ns, corev1.PullNever, tt.credentials)}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Error(diff)
			}
			if blobs := world.reg.Count().Blobs; len(blobs) > 0 {
				t.Errorf("fetched %q", blobs)
			}
		})
	}
}

// ended is what becomes of a pod of the private image: it runs, or the reason why not.
func ended(t *testing.T, n *cluster.Node, namespace string, pull corev1.PullPolicy, credentials bool) (how string) {
	t.Helper()
	c := world.cluster
	pod := podOn(n, namespace, strings.ToLower(string(pull)), ref(private))
	pod.Spec.Containers[0].ImagePullPolicy = pull
	if credentials {
		pod.Spec.ImagePullSecrets = []corev1.LocalObjectReference{{Name: "tenant"}}
	}
	c.Run(t, pod)
	c.WaitPod(t, namespace, pod.Name, "run, or not", func(p *corev1.Pod) error {
		for _, s := range p.Status.ContainerStatuses {
			switch {
			case s.State.Running != nil:
				how = "runs"
				return nil
			case s.State.Waiting != nil && s.State.Waiting.Reason == "ImagePullBackOff":
				how = "ErrImagePull"
				return nil
			case s.State.Waiting != nil && strings.HasPrefix(s.State.Waiting.Reason, "ErrImage"):
				how = s.State.Waiting.Reason
				return nil
			}
		}
		return fmt.Errorf("it is %s: %+v", p.Status.Phase, p.Status.ContainerStatuses)
	})
	if err := c.Client.CoreV1().Pods(namespace).Delete(t.Context(), pod.Name, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	c.WaitPodGone(t, namespace, pod.Name)
	return how
}

// renamed is a copy of a cache disk on which an image has another name.
func renamed(t *testing.T, disk, image, as string) string {
	t.Helper()
	return cachedisk.Changed(t, disk, func(dir string) error {
		m, err := manifest.Read(dir)
		if err != nil {
			return err
		}
		for i := range m.Images {
			if slices.Contains(m.Images[i].Names, ref(image)) {
				m.Images[i].Names = []string{ref(as)}
			}
		}
		return cachedisk.WriteManifest(dir, m)
	})
}
