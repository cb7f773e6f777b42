//go:build e2e

package pipeline_test

import (
	"fmt"
	"io"
	"path/filepath"
	"slices"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"golang.org/x/sys/unix"

	"github.com/selkies-project/packer-plugin-selkies/e2e/host"
	"github.com/selkies-project/packer-plugin-selkies/e2e/images"
	"github.com/selkies-project/packer-plugin-selkies/e2e/registry"
	"github.com/selkies-project/packer-plugin-selkies/manifest"
)

// TestIncremental builds twice, with one image changed in between, for both kinds of
// cache disk. The second build pulls the changed layer and nothing else.
func TestIncremental(t *testing.T) {
	t.Parallel()
	tests := []struct {
		name string
		// options of the source by the image that it starts from, "" for the first.
		options func(last string) string
		disk    string
	}{
		{"data disk", dataDisk, cacheDisk},
		{"boot disk", func(last string) string { return fmt.Sprintf("source_image = %q", last) }, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			c := newCloud(t, "ya29.incremental")
			reg := registry.New(t, registry.Config{})
			base := newLayer(t)
			stable := push(t, reg, "stable:1", base, newLayer(t))
			app := push(t, reg, "app:1", base, newLayer(t))
			provisioner := fmt.Sprintf("provisioner \"selkies-image-cache\" {\nimages = %s\n%s\n}", hclList(reg.Addr+"/stable:1", reg.Addr+"/app:1"), tt.disk)

			reg.Reset()
			c.mustBuild(t, "image_name = \"cache-1\"\n"+tt.options(""), provisioner)
			first := reg.Reset()
			checkFetched(t, first, stable, app)
			checkImage(t, c, "cache-1", stable, app)

			changed := push(t, reg, "app:1", base, newLayer(t))
			reg.Reset()
			c.mustBuild(t, "image_name = \"cache-2\"\n"+tt.options("cache-1"), provisioner)
			second := reg.Reset()
			checkFetched(t, second, layersOf(t, changed)[1])
			checkImage(t, c, "cache-2", stable, changed)
			checkImage(t, c, "cache-1", stable, app)
			t.Logf("the first build fetched %d bytes of blobs, the second %d", first.BlobBytes, second.BlobBytes)
		})
	}
}

// dataDisk is a source's data disk, from an image of the project or blank.
func dataDisk(image string) string {
	if image != "" {
		image = "projects/broker/global/images/" + image
	}
	return fmt.Sprintf(`
  disk_attachment {
    source_image = %q
    create_image = true
    volume_type  = "pd-balanced"
    volume_size  = 20
    device_name  = "selkies-image-cache"
  }`, image)
}

// cacheDisk is the provisioner's block for it.
const cacheDisk = `disk { device = "/dev/disk/by-id/google-selkies-image-cache" }`

// layerSize is that of every layer of the test images, in bytes.
const layerSize = 4 << 20

// newLayer is the tar stream of a layer unlike any other.
func newLayer(t *testing.T) []byte {
	t.Helper()
	l, err := random.Layer(layerSize, types.OCILayer)
	if err != nil {
		t.Fatal(err)
	}
	data, err := stream(l)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// stream is the tar stream of a layer.
func stream(l v1.Layer) ([]byte, error) {
	r, err := l.Uncompressed()
	if err != nil {
		return nil, err
	}
	defer r.Close()
	return io.ReadAll(r)
}

// push pushes an image for linux/amd64.
func push(t *testing.T, reg *registry.Registry, ref string, layers ...[]byte) v1.Image {
	t.Helper()
	image, err := images.New(images.OCI, layers...)
	if err != nil {
		t.Fatal(err)
	}
	r, err := name.ParseReference(reg.Addr + "/" + ref)
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(r, image); err != nil {
		t.Fatal(err)
	}
	return image
}

// layersOf are the digests of an image's layers.
func layersOf(t *testing.T, image v1.Image) []string {
	t.Helper()
	m, err := image.Manifest()
	if err != nil {
		t.Fatal(err)
	}
	var all []string
	for _, l := range m.Layers {
		all = append(all, l.Digest.String())
	}
	return all
}

// checkFetched compares the layers that were fetched with the ones given, as
// digests or as all those of images. Other blobs are configurations, a few hundred
// bytes each.
func checkFetched(t *testing.T, count registry.Count, want ...any) {
	t.Helper()
	var digests []string
	for _, w := range want {
		switch w := w.(type) {
		case string:
			digests = append(digests, w)
		case v1.Image:
			digests = append(digests, layersOf(t, w)...)
		}
	}
	slices.Sort(digests)
	digests = slices.Compact(digests)
	for _, d := range digests {
		if !slices.Contains(count.Blobs, d) {
			t.Errorf("layer %s was not fetched", d)
		}
	}
	if limit := int64(len(digests)*layerSize + len(digests)*64<<10); count.BlobBytes > limit {
		t.Errorf("fetched %d bytes, %d layers have %d", count.BlobBytes, len(digests), limit)
	}
}

// checkImage reads the layer manifest of a disk image and finds the images and all
// of their layers.
func checkImage(t *testing.T, c *cloud, image string, want ...v1.Image) {
	t.Helper()
	loop, err := host.AttachLoop(c.hardware.File("projects/broker/global/images/"+image), true)
	if err != nil {
		t.Fatal(err)
	}
	defer loop.Close()
	dir := t.TempDir()
	if err := unix.Mount(loop.Path, dir, "ext4", unix.MS_RDONLY, "noload"); err != nil {
		t.Fatalf("mounting image %s: %v", image, err)
	}
	defer unix.Unmount(dir, unix.MNT_DETACH)
	m, err := manifest.Read(dir)
	if err != nil {
		t.Fatal(err)
	}
	if len(m.Images) != len(want) {
		t.Errorf("image %s has %d container images, not %d", image, len(m.Images), len(want))
	}
	for _, w := range want {
		digest, err := w.Digest()
		if err != nil {
			t.Fatal(err)
		}
		if !slices.ContainsFunc(m.Images, func(i manifest.Image) bool { return string(i.Manifest.Digest) == digest.String() }) {
			t.Errorf("image %s lacks %s", image, digest)
		}
	}
	for _, l := range m.Layers {
		var st unix.Stat_t
		if err := unix.Stat(filepath.Join(dir, m.LayerPath(l)), &st); err != nil {
			t.Errorf("layer %s: %v", l.ChainID, err)
		}
	}
}
