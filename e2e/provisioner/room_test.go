//go:build e2e

package provisioner_test

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/selkies-project/packer-plugin-selkies/e2e/buildvm"
	"github.com/selkies-project/packer-plugin-selkies/e2e/registry"
)

// TestMakeRoom has disks with room for the images of one list or the other, but not for
// both.
func TestMakeRoom(t *testing.T) {
	t.Parallel()
	v := debian(t)
	reg := registry.New(t, registry.Config{})
	base := layer(t, map[string]int{"base": 1 << 20})
	keptImage, oldImage := newImage(t, layer(t, map[string]int{"kept": 1000})), newImage(t, base, layer(t, map[string]int{"old": 20 << 20}))
	kept, old := pushed(t, reg, "kept:1", keptImage), pushed(t, reg, "old:1", oldImage)
	largeImage := newImage(t, layer(t, map[string]int{"large": 20 << 20}))
	large := pushed(t, reg, "large:1", largeImage)
	// What becomes too large only when it is unpacked, and a layer of the old image.
	swelling := pushed(t, reg, "swelling:1", newImage(t, base, zeros(t, 32<<20)))
	build := func(t *testing.T) *buildvm.Disk {
		t.Helper()
		d := newDisk(t, v, 64)
		v.MustBuild(t, buildvm.Images(kept, old), d.Block(), "keep_blobs = true")
		reg.Reset()
		return d
	}
	tags := func(t *testing.T, d *buildvm.Disk) []string {
		t.Helper()
		m, data := d.Manifest(t)
		checkSchema(t, data)
		d.Mount(t, func(dir string) {
			for _, l := range m.Layers {
				if _, err := os.Stat(filepath.Join(dir, m.LayerPath(l))); err != nil {
					t.Error(err)
				}
			}
			checkBlobs(t, dir, m)
		})
		return slices.DeleteFunc(names(m), func(n string) bool { return strings.Contains(n, "@") })
	}

	t.Run("too large", func(t *testing.T) {
		d := build(t)
		out := v.MustBuild(t, buildvm.Images(large, kept), d.Block())
		if !strings.Contains(out, "making room: 1 images are no longer listed\n") {
			t.Errorf("does not say that it makes room:\n%s", out)
		}
		if blobs := layerBlobs(t, reg, keptImage); len(blobs) > 0 {
			t.Errorf("pulled %v again", blobs)
		}
		d.CheckStore(t, 2)
	})
	t.Run("too large when unpacked", func(t *testing.T) {
		d := build(t)
		v.MustBuild(t, buildvm.Images(swelling, kept), d.Block(), "keep_blobs = true")
		if blobs := layerBlobs(t, reg, keptImage); len(blobs) > 0 {
			t.Errorf("pulled %v again", blobs)
		}
		if diff := cmp.Diff([]string{kept, swelling}, tags(t, d)); diff != "" {
			t.Error(diff)
		}
		d.CheckStore(t, 3)
	})
	t.Run("prune = false", func(t *testing.T) {
		d := build(t)
		_, before := d.Manifest(t)
		out, err := v.Build(t, buildvm.Images(large, kept), d.Block(), "prune = false")
		if err == nil || !strings.Contains(errorLine(t, out), "use a larger disk, or list fewer images") {
			t.Errorf("packer build: %v\n%s", err, out)
		}
		if _, after := d.Manifest(t); !slices.Equal(before, after) {
			t.Error("the layer manifest changed")
		}
	})
	t.Run("killed", func(t *testing.T) {
		d := build(t)
		slow := newStalling(t, reg, layerDescriptor(t, largeImage, 0).Digest)
		v.cancel(t, endings[2], slow.hasStalled, buildvm.Images(slow.addr+"/large:1", kept), d.Block())
		if diff := cmp.Diff([]string{kept}, tags(t, d)); diff != "" {
			t.Errorf("the layer manifest names %s", diff)
		}
		v.MustBuild(t, buildvm.Images(large, kept), d.Block())
		d.CheckStore(t, 2)
	})
}
