//go:build e2e

// Package readahead_test reads ahead from a disk that is as slow as a network disk.
package readahead_test

import (
	"context"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	testdisk "github.com/selkies-project/packer-plugin-selkies/e2e/cachedisk"
	"github.com/selkies-project/packer-plugin-selkies/e2e/host"
	"github.com/selkies-project/packer-plugin-selkies/injector/cachedisk"
	"github.com/selkies-project/packer-plugin-selkies/injector/readahead"
	"github.com/selkies-project/packer-plugin-selkies/trace"
)

// size is that of the file that the trace has, whole: a second and a half of reading.
const size = 30 << 20

// TestYield reads ahead while another process reads from the disk, for longer than the
// reading takes alone: it is not over before the other has ended.
func TestYield(t *testing.T) {
	d, device := attach(t)
	other := exec.CommandContext(t.Context(), "timeout", "3", "sh", "-c",
		`while dd if="$0" of=/dev/null bs=128k count=16 iflag=direct skip=$(((n += 16) % 256)) status=none; do :; done`, device)
	if err := other.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		_ = other.Wait() // the status of what has run out of time
	}()
	err := readahead.Disk(t.Context(), d, readahead.Options{}, func(img readahead.Image, err error) {
		if err != nil || img.Bytes != size {
			t.Errorf("read %+v, %v", img, err)
		}
	})
	if err != nil {
		t.Error(err)
	}
	select {
	case <-ended:
	default:
		t.Error("it has not waited for the other")
		<-ended
	}
}

// attach makes a cache disk of 20 MB/s whose second image has a trace.
func attach(t *testing.T) (_ *cachedisk.Disk, device string) {
	t.Helper()
	dir := t.TempDir()
	m := testdisk.Example(t, dir)
	img := m.Images[1]
	file := filepath.Join(m.LayerPath(m.Layers[0]), "file")
	data, err := (&trace.Trace{
		SchemaVersion: trace.SchemaVersion,
		Image:         img.Config.Digest,
		Files:         []trace.File{{Layer: 0, Path: "file"}},
		Ranges:        []trace.Range{{Length: size}},
	}).Encode()
	if err != nil {
		t.Fatal(err)
	}
	contents := make([]byte, size) // and no holes
	if _, err := rand.NewChaCha8([32]byte{}).Read(contents); err != nil {
		t.Fatal(err)
	}
	for name, data := range map[string][]byte{file: contents, trace.Path(img.Config.Digest): data} {
		name = filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, data, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	image := filepath.Join(t.TempDir(), "disk")
	if err := host.NewDisk(image, 64<<20); err != nil {
		t.Fatal(err)
	}
	if _, err := host.Output(exec.CommandContext(t.Context(), "mkfs.ext4", "-q", "-d", dir, image)); err != nil {
		t.Fatal(err)
	}
	slow, err := host.AttachSlow(context.WithoutCancel(t.Context()), image, host.Profile{Delay: time.Millisecond, Rate: 20e6}, true)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := slow.Close(); err != nil {
			t.Error(err)
		}
	})
	mounted := t.TempDir()
	if err := unix.Mount(slow.Path, mounted, "ext4", unix.MS_RDONLY, "noload"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(mounted, 0); err != nil {
			t.Error(err)
		}
	})
	d, err := cachedisk.Open(mounted)
	if err != nil {
		t.Fatal(err)
	}
	return d, slow.Path
}
