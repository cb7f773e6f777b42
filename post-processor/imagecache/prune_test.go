package imagecache

import (
	"bytes"
	"testing"
	"time"

	"cloud.google.com/go/compute/apiv1/computepb"
	packersdk "github.com/hashicorp/packer-plugin-sdk/packer"
	corev1 "k8s.io/api/core/v1"

	"github.com/selkies-project/packer-plugin-selkies/gcp"
)

// TestPrunable has a disk of a former generation, in us-central1-a, and clusters that may
// need it.
func TestPrunable(t *testing.T) {
	const former = "cache-us-central1-a-1700000000"
	now := time.Now()
	in := func(location string) *cluster {
		return &cluster{Cluster: &gcp.Cluster{Name: "c", Location: location}, surveyed: true}
	}
	with := func(k *cluster, handle string) *cluster {
		k.volumes = map[string]*corev1.PersistentVolume{"v": {Spec: corev1.PersistentVolumeSpec{PersistentVolumeSource: corev1.PersistentVolumeSource{
			CSI: &corev1.CSIPersistentVolumeSource{VolumeHandle: handle},
		}}}}
		k.noteDisks()
		return k
	}
	silent := func(k *cluster) *cluster {
		k.surveyed = false
		return k
	}
	pruned := func(k *cluster) *cluster { // its volume
		k.volumes = nil
		return k
	}
	const handle = "projects/p/zones/us-central1-a/disks/" + former
	tests := []struct {
		name string
		run  *run
		want bool
	}{
		{"nobody's", &run{clusters: []*cluster{in("us-central1")}}, true},
		{"a cluster's", &run{clusters: []*cluster{with(in("us-central1"), handle)}}, false},
		{"of the same name in another zone", &run{clusters: []*cluster{with(in("us-central1"), "projects/p/zones/us-central1-b/disks/"+former)}}, true},
		{"perhaps a silent cluster's", &run{clusters: []*cluster{in("us-central1")}, absent: []*cluster{silent(in("us-central1"))}}, false},
		{"not that of a silent cluster elsewhere", &run{clusters: []*cluster{in("us-central1")}, absent: []*cluster{silent(in("europe-west4"))}}, true},
		{"another cluster's", &run{clusters: []*cluster{in("us-central1")}, others: []*cluster{with(in("us-central1"), handle)}}, false},
		{"perhaps another cluster's", &run{clusters: []*cluster{in("us-central1")}, others: []*cluster{silent(in("us-central1-f"))}}, false},
		{"not another cluster's", &run{clusters: []*cluster{in("us-central1")}, others: []*cluster{in("us-central1"), silent(in("europe-west4"))}}, true},
		{"in an excluded region", &run{clusters: []*cluster{in("us-central1")}, config: &Config{ExcludeRegions: []string{"us-central1"}}}, false},
		{"kubeconfig, never its cluster's", &run{clusters: []*cluster{in("")}, config: &Config{Kubeconfig: "k", Zones: []string{"us-central1-a"}}}, false},
		{"kubeconfig, its cluster's", &run{clusters: []*cluster{with(in(""), handle)}, config: &Config{Kubeconfig: "k", Zones: []string{"us-central1-a"}}}, false},
		{"kubeconfig, its cluster's until now", &run{clusters: []*cluster{pruned(with(in(""), handle))}, config: &Config{Kubeconfig: "k", Zones: []string{"us-central1-a"}}}, true},
		{"kubeconfig, in no zone of it", &run{clusters: []*cluster{pruned(with(in(""), handle))}, config: &Config{Kubeconfig: "k", Zones: []string{"us-central1-b"}}}, false},
	}
	disk := &computepb.Disk{
		Name: new(former), Zone: new("https://www.googleapis.com/compute/v1/projects/p/zones/us-central1-a"),
		CreationTimestamp: new(now.Add(-time.Hour).Format(time.RFC3339)), Labels: map[string]string{labelName: "cache", labelImage: "former"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			r := tt.run
			if r.config == nil {
				r.config = &Config{}
			}
			r.config.CacheName, r.generation = "cache", &generation{created: now}
			got, err := r.prunable(disk, map[string]bool{"now": true})
			if err != nil || got != tt.want {
				t.Errorf("got %v, %v, want %v", got, err, tt.want)
			}
		})
	}
}

// TestBoots has the ways in which a node pool names the image of its secondary boot
// disks.
func TestBoots(t *testing.T) {
	g := &generation{image: &computepb.Image{Name: new("cache-1")}, project: "p"}
	for image, want := range map[string]bool{
		"global/images/cache-1":            true,
		"projects/p/global/images/cache-1": true,
		"https://www.googleapis.com/compute/v1/projects/p/global/images/cache-1":  true,
		"projects/q/global/images/cache-1":                                        false,
		"global/images/cache-12":                                                  false,
		"global/images/my-cache-1":                                                false,
		"https://www.googleapis.com/compute/v1/projects/p/global/images/cache-12": false,
	} {
		r := &run{config: &Config{ProjectID: "p"}, bootImages: []string{image}}
		if got := r.boots(g); got != want {
			t.Errorf("%s: got %v, want %v", image, got, want)
		}
	}
}

// TestTellOfBuilder has a VM with two disks of the builder.
func TestTellOfBuilder(t *testing.T) {
	var out bytes.Buffer
	r := &run{config: &Config{ProjectID: "p"}, ui: &packersdk.BasicUi{Writer: &out}}
	for _, name := range []string{"build-1", "build-1-data"} {
		r.tellOfBuilder(&computepb.Disk{
			Name: &name, Zone: new("https://www.googleapis.com/compute/v1/projects/p/zones/us-central1-a"), LastAttachTimestamp: new("2026-01-01T00:00:00Z"),
			Users: []string{"https://www.googleapis.com/compute/v1/projects/p/zones/us-central1-a/instances/vm"},
		})
	}
	const want = "VM vm has had disk build-1 of the builder since 2026-01-01T00:00:00Z: another build goes on, or was killed. " +
		"If none goes on, delete it: gcloud compute instances delete vm --project=p --zone=us-central1-a --delete-disks=all\n"
	if out.String() != want {
		t.Errorf("it says\n%swant\n%s", &out, want)
	}
}
