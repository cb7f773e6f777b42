//go:build e2e

package rollout_test

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/yaml"

	"github.com/selkies-project/packer-plugin-selkies/version"
)

// applyText has kubectl apply manifests.
func applyText(t *testing.T, text string) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "manifests.yaml")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	world.Output(t, "apply", "-f", file)
}

// TestLeastRoles rolls out twice with no more rights than docs/iam.md lists: the
// Kubernetes role that stands there, and the permissions of its table.
func TestLeastRoles(t *testing.T) {
	doc, err := os.ReadFile("../../docs/iam.md")
	if err != nil {
		t.Fatal(err)
	}
	role := regexp.MustCompile("(?s)```yaml\n(apiVersion: rbac.*?)```").FindSubmatch(doc)
	if role == nil {
		t.Fatal("docs/iam.md has no role")
	}
	world.Output(t, "create", "serviceaccount", "-n", "default", "least")
	applyText(t, strings.ReplaceAll(string(role[1]), "image-cache@my-project.iam.gserviceaccount.com", "system:serviceaccount:default:least"))

	c := newCloud(t, "least", "least")
	c.tidy()
	addNode(t, "la", zoneA)
	for stamp := 1; stamp <= 4; stamp++ {
		c.must(c.build(stamp))
		c.waitGenerations(map[string]string{"la": c.diskName(zoneA, 1)})
	}
	for _, permission := range c.Needed() {
		_, action, _ := strings.Cut(permission, ".") // "images.list"
		if !strings.Contains(string(doc), permission) {
			// The table names a resource once and its other permissions by their verbs.
			service, verb, _ := strings.Cut(action, ".")
			if !regexp.MustCompile(`compute\.` + service + "\\.[a-zA-Z`, ]*`" + verb + "`").Match(doc) {
				t.Errorf("docs/iam.md does not list %s", permission)
			}
		}
	}
}

// TestSameAsKustomize compares what the post-processor applies with what
// example/kustomize gives for the same disk.
func TestSameAsKustomize(t *testing.T) {
	c := newCloud(t, "same", administrator(t))
	dir := t.TempDir()
	c.must(c.build(1), "output_dir", dir, "node_selector", map[string]string{"selkies.io/image-cache": "true"})
	written, err := os.ReadFile(filepath.Join(dir, "us-central1-broker-us-central1.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	rendered := world.Output(t, "kustomize", "../../example/kustomize/pvc")

	ours, theirs := parse(t, string(written)), parse(t, rendered)
	disk := c.diskName(zoneA, 1)
	// What differs by intention: names, the image's digest, and that two generations are
	// kept apart.
	replace := strings.NewReplacer(disk, "DISK", "image-cache-us-central1-a", "DISK", "image-cache-1", "DISK", "projects/p/", "projects/my-project/",
		world.pinned, "us-docker.pkg.dev/my-project/tools/selkies-image-injector:"+version.Version)
	ourPod, theirPod := ours.sets[disk].Spec.Template.Spec, theirs.sets["selkies-image-injector-us-central1-a"].Spec.Template.Spec
	ourPod.Affinity.PodAntiAffinity = nil
	if diff := cmp.Diff(replace.Replace(marshal(t, theirPod)), replace.Replace(marshal(t, ourPod))); diff != "" {
		t.Errorf("pods: %s", diff)
	}
	if diff := cmp.Diff(theirs.sets["selkies-image-injector-us-central1-a"].Spec.UpdateStrategy, ours.sets[disk].Spec.UpdateStrategy); diff != "" {
		t.Errorf("update strategy: %s", diff)
	}
	ourGate, theirGate := ours.sets["same-gate"].Spec, theirs.sets["selkies-image-gate"].Spec
	// A cluster may have several caches.
	for _, labels := range []map[string]string{ourGate.Selector.MatchLabels, ourGate.Template.Labels} {
		if labels["app.kubernetes.io/instance"] != "same" {
			t.Errorf("the gate's labels are %v", labels)
		}
		delete(labels, "app.kubernetes.io/instance")
	}
	if diff := cmp.Diff(replace.Replace(marshal(t, theirGate)), replace.Replace(marshal(t, ourGate))); diff != "" {
		t.Errorf("gate: %s", diff)
	}
	ourVolume, theirVolume := ours.volumes[disk].Spec, theirs.volumes["image-cache-us-central1-a"].Spec
	theirVolume.Capacity = ourVolume.Capacity // that of the disk
	if diff := cmp.Diff(replace.Replace(marshal(t, theirVolume)), replace.Replace(marshal(t, ourVolume))); diff != "" {
		t.Errorf("volume: %s", diff)
	}
	if diff := cmp.Diff(theirs.others, ours.others); diff != "" {
		t.Errorf("other objects: %s", diff)
	}
}

type manifests struct {
	sets    map[string]appsv1.DaemonSet
	volumes map[string]corev1.PersistentVolume
	others  map[string]string
}

func parse(t *testing.T, text string) manifests {
	t.Helper()
	m := manifests{map[string]appsv1.DaemonSet{}, map[string]corev1.PersistentVolume{}, map[string]string{}}
	for doc := range strings.SplitSeq("\n"+text, "\n---\n") {
		if strings.TrimSpace(doc) == "" {
			continue
		}
		var o struct {
			Kind     string
			Metadata struct{ Name, Namespace string }
		}
		var set appsv1.DaemonSet
		var volume corev1.PersistentVolume
		unmarshal(t, doc, &o)
		switch o.Kind {
		case "DaemonSet":
			unmarshal(t, doc, &set)
			m.sets[o.Metadata.Name] = set
		case "PersistentVolume":
			unmarshal(t, doc, &volume)
			m.volumes[o.Metadata.Name] = volume
		case "PersistentVolumeClaim": // named after the volume
		default:
			var content map[string]any
			unmarshal(t, doc, &content)
			m.others[o.Kind+"/"+o.Metadata.Namespace+"/"+o.Metadata.Name] = marshal(t, content)
		}
	}
	return m
}

func unmarshal(t *testing.T, doc string, into any) {
	t.Helper()
	if err := yaml.Unmarshal([]byte(doc), into); err != nil {
		t.Fatalf("%v in:\n%s", err, doc)
	}
}

func marshal(t *testing.T, v any) string {
	t.Helper()
	data, err := yaml.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}
