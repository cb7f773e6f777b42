//go:build e2e

package rollout_test

import (
	"io"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync/atomic"
	"testing"

	"cloud.google.com/go/compute/apiv1/computepb"
	"cloud.google.com/go/container/apiv1/containerpb"

	"github.com/selkies-project/packer-plugin-selkies/e2e/gcp"
)

// TestSharedFamily has two caches roll out images of one family, of which others make
// disks too.
func TestSharedFamily(t *testing.T) {
	a := newCloud(t, "family-a", administrator(t))
	b := &cloud{Server: a.Server, t: t, name: "family-b", token: a.token}
	a.tidy()
	b.tidy()
	first := a.build(1)
	a.must(first)
	b.must(first)

	a.must(a.build(2))
	op, err := a.Clients(t).Disks.Insert(t.Context(), &computepb.InsertDiskRequest{Project: project, Zone: "europe-west4-a",
		DiskResource: &computepb.Disk{Name: new("someones"), SourceImage: new("projects/p/global/images/" + imageName(2))}})
	gcp.Wait(t, op, err)

	a.must(a.build(3))
	a.AddCluster(project, &containerpb.Cluster{Name: "batch", Location: "europe-west4", NodePools: []*containerpb.NodePool{{
		Locations: []string{"europe-west4-a"},
		Config:    &containerpb.NodeConfig{SecondaryBootDisks: []*containerpb.SecondaryBootDisk{{DiskImage: "global/images/" + imageName(3)}}},
	}}})

	for stamp := 4; stamp <= 5; stamp++ {
		a.must(a.build(stamp), "keep", 1)
	}
	images := []string{image(1), image(2), image(3), image(5)}
	a.wantResources(append(images, a.disk(zoneA, 5), a.disk(zoneB, 5))...)
	b.wantResources(append(images, b.disk(zoneA, 1), b.disk(zoneB, 1))...)

	// What one may roll back to is not what the other may.
	b.must(artifact(imageName(5)))
	b.wantResources(append(images, b.disk(zoneA, 1), b.disk(zoneB, 1), b.disk(zoneA, 5), b.disk(zoneB, 5))...)

	// What both have rolled out goes when both have given it up.
	b.must(b.build(6), "keep", 1)
	b.wantResources(append(images, image(6), b.disk(zoneA, 6), b.disk(zoneB, 6))...)
	a.must(artifact(imageName(5)))
	a.wantResources(image(2), image(3), image(5), image(6), a.disk(zoneA, 5), a.disk(zoneB, 5))
}

// TestCanary rolls out to one of two clusters. The other goes on to need the generation
// that it has, also when it does not say so.
func TestCanary(t *testing.T) {
	c := newCloud(t, "canary", administrator(t))
	c.tidy()
	c.must(c.build(1))

	// There is one real cluster. From here on it is the canary, without anything of the
	// cache, and what it said of its volumes is what the other says.
	volumes := world.Output(t, "get", "--raw", "/api/v1/persistentvolumes")
	for _, kind := range []string{"daemonsets", "persistentvolumeclaims", "persistentvolumes"} {
		world.Output(t, "delete", kind, "-n", namespace, "-l", "app.kubernetes.io/instance="+c.name)
	}
	c.waitObjects()
	var silent atomic.Bool
	other := &front{server: httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if silent.Load() || r.URL.Path != "/api/v1/persistentvolumes" {
			http.Error(w, "refused by the test", http.StatusForbidden)
			return
		}
		w.Header().Set("Content-Type", "application/json")
		_, _ = io.WriteString(w, volumes)
	}))}
	defer other.server.Close()
	c.AddCluster(project, other.cluster(zoneA, zoneB))
	canary := c.cluster
	canary.Name = "broker-canary"
	c.AddCluster(project, canary)

	of := func(stamp int) []string { return []string{image(stamp), c.disk(zoneA, stamp), c.disk(zoneB, stamp)} }
	for stamp := 2; stamp <= 3; stamp++ {
		c.must(c.build(stamp), "cluster_pattern", "^broker-canary$", "keep", 1)
	}
	c.wantResources(slices.Concat(of(1), of(3))...)

	silent.Store(true)
	u := c.must(c.build(4), "cluster_pattern", "^broker-canary$", "keep", 1)
	c.wantResources(slices.Concat(of(1), of(3), of(4))...)
	if want := "no disk of region us-central1 is pruned, since cluster us-central1/broker-us-central1, which cluster_pattern does not match, does not say which ones it needs: listing PersistentVolumes: "; !strings.Contains(strings.Join(u.lines, "\n"), want) {
		t.Errorf("got %q, want a line that begins with %q", u.lines, want)
	}

	silent.Store(false)
	c.must(artifact(imageName(4)), "cluster_pattern", "^broker-canary$", "keep", 1)
	c.wantResources(slices.Concat(of(1), of(4))...)
}

// TestKubeconfig knows of one cluster only. What others may use stays.
func TestKubeconfig(t *testing.T) {
	c := newCloud(t, "kubeconfig", administrator(t))
	c.tidy()
	others := []string{zoneB, "europe-west4-a"}
	c.must(c.build(1), "skip_rollout", true, "zones", others)
	one := []any{"kubeconfig", world.Kubeconfig, "keep", 1, "zones"}
	c.must(artifact(imageName(1)), append(one, []string{zoneA})...)
	for stamp := 2; stamp <= 4; stamp++ {
		c.must(c.build(stamp), append(one, []string{zoneA, zoneB})...)
	}
	c.wantResources(image(1), c.disk(zoneB, 1), c.disk("europe-west4-a", 1), image(4), c.disk(zoneA, 4), c.disk(zoneB, 4))
}
