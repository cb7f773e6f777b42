//go:build e2e

package pipeline_test

import (
	"slices"
	"strings"
	"testing"

	"cloud.google.com/go/compute/apiv1/computepb"
	"github.com/google/go-cmp/cmp"

	"github.com/selkies-project/packer-plugin-selkies/e2e/gcp"
)

// TestSourceOfImage pins down what of the googlecompute builder docs/incremental.md
// rests on: which disk an image is made from, and what the disk is made from.
func TestSourceOfImage(t *testing.T) {
	t.Parallel()
	attachment := func(more string) string {
		return `
  disk_attachment {
    create_image = true
    volume_type  = "pd-balanced"
    volume_size  = 30
    disk_name    = "data"
    ` + more + `
  }`
	}
	const last = "projects/broker/global/images/last"
	tests := []struct {
		name    string
		options string
		disk    string // of which the image is made
		kept    string // the image that a disk which is kept was made from
	}{
		{"boot disk", "", "boot", "-"},
		{"boot disk from the last image", `source_image = "last"`, "boot", "-"},
		{"blank disk", attachment(`source_image = ""`), "data", "-"},
		{"blank disk that is kept", attachment(`keep_device = true`), "data", ""},
		{"disk from the last image", attachment(`source_image = "` + last + `"`), "data", "-"},
		{"disk from the last image that is kept", attachment("keep_device = true\nsource_image = \"" + last + `"`), "data", last},
		// The trap: the image is made from the boot disk.
		{"source_volume", `disk_attachment {
			source_volume = "projects/broker/zones/us-central1-a/disks/seed"
			create_image  = true
		}`, "boot", "-"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c := newRecords(t)
			google := c.Clients(t)
			op, err := google.Disks.Insert(t.Context(), &computepb.InsertDiskRequest{Project: project, Zone: zone, DiskResource: &computepb.Disk{Name: new("seed"), SizeGb: new(int64(20))}})
			gcp.Wait(t, op, err)
			op, err = google.Images.Insert(t.Context(), &computepb.InsertImageRequest{Project: project, ImageResource: &computepb.Image{Name: new("last"), SourceDisk: new("zones/" + zone + "/disks/seed")}})
			gcp.Wait(t, op, err)
			want := append(c.Resources(), "projects/broker/global/images/new")

			c.mustBuild(t, "communicator = \"none\"\ndisk_name = \"boot\"\nimage_name = \"new\"\n"+tt.options, "")

			image, err := google.Images.Get(t.Context(), &computepb.GetImageRequest{Project: project, Image: "new"})
			if err != nil {
				t.Fatal(err)
			}
			if got := image.GetSourceDisk(); !strings.HasSuffix(got, "/disks/"+tt.disk) {
				t.Errorf("the image is made from %s", got)
			}
			if tt.kept != "-" {
				want = append(want, "projects/broker/zones/us-central1-a/disks/data")
				disk, err := google.Disks.Get(t.Context(), &computepb.GetDiskRequest{Project: project, Zone: zone, Disk: "data"})
				if err != nil || !strings.HasSuffix(disk.GetSourceImage(), tt.kept) || disk.GetSizeGb() != 30 {
					t.Errorf("the kept disk is %v: %v", disk, err)
				}
			}
			slices.Sort(want)
			if diff := cmp.Diff(want, c.Resources()); diff != "" {
				t.Errorf("left over (-want +got):\n%s", diff)
			}
		})
	}
}
