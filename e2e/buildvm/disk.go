package buildvm

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/selkies-project/packer-plugin-selkies/e2e/host"
	"github.com/selkies-project/packer-plugin-selkies/manifest"
)

// Disk is a cache disk, attached to a build VM.
type Disk struct {
	// Image is its file, Device the device by which the VM has it.
	Image, Device string
}

// NewDisk is an empty disk. The test's end detaches it.
func NewDisk(t *testing.T, v *VM, megabytes int64) *Disk {
	t.Helper()
	image := filepath.Join(t.TempDir(), "disk")
	if err := host.NewDisk(image, megabytes<<20); err != nil {
		t.Fatal(err)
	}
	return OpenDisk(t, v, image)
}

// OpenDisk attaches a disk image. The test's end detaches it.
func OpenDisk(t *testing.T, v *VM, image string) *Disk {
	t.Helper()
	loop, err := host.AttachLoop(image, false)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { loop.Close() })
	name := filepath.Base(loop.Path)
	if err := v.AttachDisk(loop.Path, name); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { v.DetachDisk(loop.Path, name) })
	return &Disk{Image: image, Device: loop.Path}
}

// Mount mounts the disk's image read-only on the host, for as long as f runs.
func (d *Disk) Mount(t *testing.T, f func(dir string)) {
	t.Helper()
	loop, err := host.AttachLoop(d.Image, true)
	if err != nil {
		t.Fatal(err)
	}
	defer loop.Close()
	dir := t.TempDir()
	if err := unix.Mount(loop.Path, dir, "ext4", unix.MS_RDONLY, "noload"); err != nil {
		t.Fatalf("mounting the cache disk: %v", err)
	}
	defer unix.Unmount(dir, unix.MNT_DETACH)
	f(dir)
}

// Manifest reads the layer manifest, as the injector does.
func (d *Disk) Manifest(t *testing.T) (m *manifest.Manifest, data []byte) {
	t.Helper()
	d.Mount(t, func(dir string) {
		var err error
		if m, err = manifest.Read(dir); err != nil {
			t.Fatal(err)
		}
		if data, err = os.ReadFile(filepath.Join(dir, manifest.Path)); err != nil {
			t.Fatal(err)
		}
	})
	return m, data
}

// Block is the disk block of a template.
func (d *Disk) Block(options ...string) string {
	return fmt.Sprintf("disk {\n device = %q\n%s\n}\n", d.Device, strings.Join(options, "\n"))
}

// CheckStore finds in the store on the disk the layers that the manifest has, and
// nothing that a build left behind.
func (d *Disk) CheckStore(t *testing.T, layers int) {
	t.Helper()
	m, _ := d.Manifest(t)
	if len(m.Layers) != layers {
		t.Errorf("the build recorded %d layers, not %d", len(m.Layers), layers)
	}
	d.Mount(t, func(dir string) {
		store := filepath.Join(dir, m.Store.Root)
		stored, err := filepath.Glob(filepath.Join(store, manifest.DriverOverlay2, "*/diff"))
		if err != nil || len(stored) != layers {
			t.Errorf("the store has %d layer directories (%v)", len(stored), err)
		}
		for _, pattern := range []string{"tmp/*", "image/overlay2/layerdb/tmp/*"} {
			if parts, err := filepath.Glob(filepath.Join(store, pattern)); err != nil || len(parts) > 0 {
				t.Errorf("the store has left-over parts %v (%v)", parts, err)
			}
		}
	})
}
