package imagecache

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"cloud.google.com/go/compute/apiv1/computepb"
	"cloud.google.com/go/container/apiv1/containerpb"
	"github.com/google/go-cmp/cmp"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"sigs.k8s.io/yaml"

	"github.com/selkies-project/packer-plugin-selkies/e2e/gcp"
)

// TestManifests writes manifests for two clusters that cannot be reached.
func TestManifests(t *testing.T) {
	s := google(t, gcp.Config{})
	for _, region := range []string{"us-central1", "europe-west4"} {
		s.AddCluster(project, &containerpb.Cluster{
			Name: "broker-" + region, Location: region, Endpoint: "127.0.0.1:1",
			NodePools: []*containerpb.NodePool{{Locations: []string{region + "-a"}}, {Locations: []string{region + "-b", region + "-a"}}},
		})
	}
	s.AddCluster(project, &containerpb.Cluster{Name: "other", Location: "us-central1", Locations: []string{"us-central1-f"}})
	s.AddCluster(project, &containerpb.Cluster{Name: "broker-ending", Location: "us-central1", Locations: []string{"us-central1-f"}, Status: containerpb.Cluster_STOPPING})
	dir := filepath.Join(t.TempDir(), "manifests")
	repository := newRegistry(t)
	digest := push(t, repository+":1", index(t, "linux/amd64"))
	c := options(s, "cluster_pattern", "^broker-", "injector_image", repository+":1", "output_dir", dir, "node_selector", map[string]string{"tier": "gpu"})
	if _, err := postProcess(t, t.Context(), c, builderArtifact(built)); err != nil {
		t.Fatal(err)
	}
	wantResources(t, s, []string{
		"projects/p/global/images/selkies-image-cache-1700000000",
		"projects/p/zones/europe-west4-a/disks/selkies-image-cache-europe-west4-a-1700000000",
		"projects/p/zones/europe-west4-b/disks/selkies-image-cache-europe-west4-b-1700000000",
		"projects/p/zones/us-central1-a/disks/selkies-image-cache-us-central1-a-1700000000",
		"projects/p/zones/us-central1-b/disks/selkies-image-cache-us-central1-b-1700000000",
	})
	files, err := os.ReadDir(dir)
	if err != nil || len(files) != 2 || files[0].Name() != "europe-west4-broker-europe-west4.yaml" {
		t.Fatalf("files are %v, %v", files, err)
	}
	data, err := os.ReadFile(filepath.Join(dir, files[0].Name()))
	if err != nil {
		t.Fatal(err)
	}
	objects, err := decode(data)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	var set appsv1.DaemonSet
	var volume corev1.PersistentVolume
	for _, o := range objects {
		got = append(got, o.GetKind()+" "+o.GetName())
		var err error
		switch o.GetKind() {
		case "DaemonSet":
			set = appsv1.DaemonSet{}
			err = convert(o, &set)
		case "PersistentVolume":
			volume = corev1.PersistentVolume{}
			err = convert(o, &volume)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	const disk = "selkies-image-cache-europe-west4-b-1700000000"
	for _, want := range []string{"Namespace selkies-image-cache", "ServiceAccount selkies-image-injector", "ServiceAccount selkies-image-gate", "DaemonSet selkies-image-cache-gate", "PersistentVolumeClaim " + disk, "DaemonSet " + disk} {
		if !slices.Contains(got, want) {
			t.Errorf("there is no %s among %q", want, got)
		}
	}
	pod := set.Spec.Template.Spec
	if pod.Containers[0].Image != repository+"@"+digest || pod.NodeSelector["tier"] != "gpu" || pod.NodeSelector["kubernetes.io/os"] != "linux" {
		t.Errorf("pod is %v", pod)
	}
	if volume.Spec.CSI.VolumeHandle != "projects/p/zones/europe-west4-b/disks/"+disk || volume.Spec.ClaimRef.Name != disk || volume.Spec.Capacity.Storage().String() != "20Gi" {
		t.Errorf("volume is %v", volume.Spec)
	}
	want := `
- matchExpressions:
  - {key: topology.kubernetes.io/zone, operator: In, values: [europe-west4-b]}
  - {key: app.broker/cache-pd, operator: In, values: [selkies-image-cache-europe-west4-b-1700000000]}
- matchExpressions:
  - {key: topology.kubernetes.io/zone, operator: In, values: [europe-west4-b]}
  - {key: app.broker/cache-pd, operator: DoesNotExist}
`
	var terms []corev1.NodeSelectorTerm
	if err := yaml.UnmarshalStrict([]byte(want), &terms); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(terms, pod.Affinity.NodeAffinity.RequiredDuringSchedulingIgnoredDuringExecution.NodeSelectorTerms); diff != "" {
		t.Errorf("nodes: %s", diff)
	}
}

func TestKept(t *testing.T) {
	// Each generation by the time of its last rollout, in the order in which they
	// were made, the current one last if not said otherwise.
	tests := []struct {
		name      string
		rolledOut []int64
		current   int
		n         int
		want      map[string]bool
	}{
		{"newest", []int64{1, 2, 3, 0}, 3, 2, map[string]bool{"3": true, "2": true}},
		{"failed ones do not count", []int64{1, 2, 0, 0}, 3, 2, map[string]bool{"3": true, "1": true}},
		{"current once more", []int64{1, 2, 3}, 2, 2, map[string]bool{"2": true, "1": true}},
		{"a rollback", []int64{1, 2, 3}, 0, 2, map[string]bool{"0": true, "2": true}},
		{"after a rollback", []int64{4, 2, 3, 0}, 3, 2, map[string]bool{"3": true, "0": true}},
		{"one", []int64{1, 2}, 1, 1, map[string]bool{"1": true}},
		{"more than there are", []int64{0, 2}, 1, 5, map[string]bool{"1": true}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var all []*generation
			for i, r := range tt.rolledOut {
				all = append(all, &generation{image: &computepb.Image{Name: new(fmt.Sprint(i))}, created: time.Unix(int64(i), 0), rolledOut: r})
			}
			if diff := cmp.Diff(tt.want, kept(all, all[tt.current], tt.n)); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestStamp(t *testing.T) {
	for name, want := range map[string]string{
		"selkies-image-cache-1700000000": "1700000000",
		"selkies-image-cache-v2":         "1793880000",
		"cache-20261105":                 "1793880000",
	} {
		g, err := newGeneration(&computepb.Image{Name: &name, CreationTimestamp: new("2026-11-05T04:00:00.000-08:00")}, project, "cache")
		if err != nil {
			t.Fatal(err)
		}
		if g.stamp != want {
			t.Errorf("stamp of %s is %s, want %s", name, g.stamp, want)
		}
	}
}
