//go:build e2e

package rollout_test

import (
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

	// The way back of one is not that of the other.
	b.must(artifact(imageName(5)))
	b.wantResources(append(images, b.disk(zoneA, 1), b.disk(zoneB, 1), b.disk(zoneA, 5), b.disk(zoneB, 5))...)

	// What both have rolled out goes when both have given it up.
	b.must(b.build(6), "keep", 1)
	b.wantResources(append(images, image(6), b.disk(zoneA, 6), b.disk(zoneB, 6))...)
	a.must(artifact(imageName(5)))
	a.wantResources(image(2), image(3), image(5), image(6), a.disk(zoneA, 5), a.disk(zoneB, 5))
}
