package readahead

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	testdisk "github.com/selkies-project/packer-plugin-selkies/e2e/cachedisk"
	"github.com/selkies-project/packer-plugin-selkies/injector/cachedisk"
	"github.com/selkies-project/packer-plugin-selkies/manifest"
	"github.com/selkies-project/packer-plugin-selkies/trace"
)

// newDisk is a directory that looks like a cache disk. The base layer of its second image
// has a file of 300,000 bytes, and the layer on it one of 10,000.
func newDisk(t *testing.T) (*cachedisk.Disk, *trace.Trace) {
	t.Helper()
	dir := t.TempDir()
	m := testdisk.Example(t, dir)
	for _, l := range m.Layers {
		if err := os.Mkdir(filepath.Join(dir, m.LayerPath(l), "bin"), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for n, size := range []int{300_000, 10_000} {
		file := filepath.Join(dir, m.LayerPath(m.Layers[n]), "bin", fmt.Sprint("file", n))
		if err := os.WriteFile(file, make([]byte, size), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	d, err := cachedisk.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	return d, &trace.Trace{
		SchemaVersion: trace.SchemaVersion,
		Image:         m.Images[1].Config.Digest,
		Files:         []trace.File{{Layer: 0, Path: "bin/file0"}, {Layer: 1, Path: "bin/file1"}},
		Ranges:        []trace.Range{{File: 0, Offset: 0, Length: 200_000}, {File: 1, Offset: 4096, Length: 5904}, {File: 0, Offset: 200_704, Length: 99_296}},
	}
}

func write(t *testing.T, d *cachedisk.Disk, image digest.Digest, data []byte) {
	t.Helper()
	file := filepath.Join(d.Dir, trace.Path(image))
	if err := errors.Join(os.MkdirAll(filepath.Dir(file), 0o755), os.WriteFile(file, data, 0o644)); err != nil {
		t.Fatal(err)
	}
}

func encode(t *testing.T, tr *trace.Trace) []byte {
	t.Helper()
	data, err := tr.Encode()
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// readDisk is what Disk tells of each image, and the errors.
func readDisk(t *testing.T, d *cachedisk.Disk, opt Options) (images []Image, errs []error) {
	t.Helper()
	err := Disk(t.Context(), d, opt, func(img Image, err error) {
		images, errs = append(images, img), append(errs, err)
	})
	if err != nil {
		t.Fatal(err)
	}
	return images, errs
}

func TestDisk(t *testing.T) {
	d, tr := newDisk(t)
	if images, _ := readDisk(t, d, Options{}); len(images) > 0 {
		t.Errorf("without a trace: %v", images)
	}
	write(t, d, tr.Image, encode(t, tr))
	names := d.Manifest.Images[1].Names
	for name, c := range map[string]struct {
		opt  Options
		want Image
	}{
		"all":     {Options{}, Image{Names: names, Bytes: 305_200, Files: 2}},
		"limited": {Options{Bytes: 210_000}, Image{Names: names, Bytes: 205_904, Files: 2, Left: 99_296}},
		"rate":    {Options{Rate: 100e6}, Image{Names: names, Bytes: 305_200, Files: 2}},
	} {
		t.Run(name, func(t *testing.T) {
			images, errs := readDisk(t, d, c.opt)
			if len(images) != 1 || errs[0] != nil {
				t.Fatalf("%v, %v", images, errs)
			}
			if diff := cmp.Diff(c.want, images[0], cmpopts.IgnoreFields(Image{}, "Took")); diff != "" {
				t.Error(diff)
			}
		})
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := Disk(ctx, d, Options{}, func(Image, error) {}); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

// TestRefused has traces that cannot be used: each gives one line, and harms nothing.
func TestRefused(t *testing.T) {
	layer := func(d *cachedisk.Disk, n int) string {
		return filepath.Join(d.Dir, d.Manifest.LayerPath(d.Manifest.Layers[n]))
	}
	for name, c := range map[string]struct {
		spoil func(t *testing.T, d *cachedisk.Disk, tr *trace.Trace) error
		want  string
	}{
		"not a trace": {func(t *testing.T, d *cachedisk.Disk, tr *trace.Trace) error {
			write(t, d, tr.Image, []byte("\x1b[31m\n"))
			return nil
		}, "not an access trace"},
		"too large": {func(_ *testing.T, d *cachedisk.Disk, tr *trace.Trace) error {
			return os.Truncate(filepath.Join(d.Dir, trace.Path(tr.Image)), trace.MaxSize+1)
		}, "more than"},
		"of another image": {func(t *testing.T, d *cachedisk.Disk, tr *trace.Trace) error {
			other := *tr
			other.Image = d.Manifest.Images[0].Config.Digest
			write(t, d, tr.Image, encode(t, &other))
			return nil
		}, "it is that of image sha256:"},
		"a link": {func(_ *testing.T, d *cachedisk.Disk, tr *trace.Trace) error {
			file := filepath.Join(d.Dir, trace.Path(tr.Image))
			return errors.Join(os.Rename(file, file+".json"), os.Symlink(file+".json", file))
		}, "not a regular file"},
		"a pipe": {func(_ *testing.T, d *cachedisk.Disk, tr *trace.Trace) error {
			file := filepath.Join(d.Dir, trace.Path(tr.Image))
			return errors.Join(os.Remove(file), unix.Mkfifo(file, 0o644))
		}, "not a regular file"},
		"no such layer": {func(t *testing.T, d *cachedisk.Disk, tr *trace.Trace) error {
			tr.Files[0].Layer = 7
			write(t, d, tr.Image, encode(t, tr))
			return nil
		}, "files[0] is of layer 7"},
		"no such file": {func(_ *testing.T, d *cachedisk.Disk, _ *trace.Trace) error {
			return os.Remove(filepath.Join(layer(d, 0), "bin/file0"))
		}, "no such file"},
		"a file that is a link": {func(_ *testing.T, d *cachedisk.Disk, _ *trace.Trace) error {
			file := filepath.Join(layer(d, 0), "bin/file0")
			return errors.Join(os.Remove(file), os.Symlink("/etc/shadow", file))
		}, "not a regular file"},
		"a directory that is a link": {func(_ *testing.T, d *cachedisk.Disk, _ *trace.Trace) error {
			dir := filepath.Join(layer(d, 1), "bin")
			return errors.Join(os.RemoveAll(dir), os.Symlink(filepath.Join(layer(d, 0), "bin"), dir))
		}, "a symbolic link leads there"},
		"a file that is a pipe": {func(_ *testing.T, d *cachedisk.Disk, _ *trace.Trace) error {
			file := filepath.Join(layer(d, 1), "bin/file1")
			return errors.Join(os.Remove(file), unix.Mkfifo(file, 0o644))
		}, "not a regular file"},
	} {
		t.Run(name, func(t *testing.T) {
			d, tr := newDisk(t)
			write(t, d, tr.Image, encode(t, tr))
			if err := c.spoil(t, d, tr); err != nil {
				t.Fatal(err)
			}
			_, errs := readDisk(t, d, Options{})
			if len(errs) != 1 || errs[0] == nil || !strings.Contains(errs[0].Error(), c.want) {
				t.Fatalf("errors are %v, want %q", errs, c.want)
			}
			if msg := errs[0].Error(); strings.ContainsAny(msg, "\n\x1b") || !strings.Contains(msg, trace.Path(tr.Image)) || !strings.HasSuffix(msg, "build the disk again") {
				t.Errorf("the error is %q", msg)
			}
		})
	}
}

// TestShort reads ranges that a file does not have.
func TestShort(t *testing.T) {
	d, tr := newDisk(t)
	tr.Ranges = append(tr.Ranges, trace.Range{File: 1, Offset: 1 << 60, Length: 1 << 60})
	write(t, d, tr.Image, encode(t, tr))
	images, errs := readDisk(t, d, Options{Bytes: 10 << 20})
	if len(images) != 1 || errs[0] != nil || images[0].Bytes != 305_200 {
		t.Errorf("%v, %v", images, errs)
	}
}

// TestPages has ranges of one byte and of two, for each of which the kernel reads pages.
func TestPages(t *testing.T) {
	const limit = 16
	d, tr := newDisk(t)
	tr.Ranges = nil
	for i := range int64(64) {
		tr.Ranges = append(tr.Ranges, trace.Range{Offset: i * pageSize, Length: 1}, trace.Range{Offset: (i+1)*pageSize - 1, Length: 2})
	}
	write(t, d, tr.Image, encode(t, tr))
	// Rounds of a page and of two.
	images, errs := readDisk(t, d, Options{Bytes: limit*pageSize + 100})
	if want := int64(limit/3)*3 + 1; len(images) != 1 || errs[0] != nil || images[0].Bytes != want || images[0].Left != 3*64-want {
		t.Errorf("%+v, %v, want %d bytes", images, errs, want)
	}
}

func TestInOrder(t *testing.T) {
	named := func(names ...string) manifest.Image { return manifest.Image{Names: names} }
	digested := "docker.io/library/c@sha256:" + strings.Repeat("0", 64)
	images := []manifest.Image{named("docker.io/library/a:latest"), named("docker.io/library/b:1", "docker.io/library/b:2"), named(digested)}
	got := inOrder(images, []string{"c:9@sha256:" + strings.Repeat("0", 64), "Not A Reference", "b:2"})
	want := []manifest.Image{images[2], images[1], images[0]}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func TestMemory(t *testing.T) {
	if n, err := availableMemory("MemTotal:  100 kB\nMemAvailable:   16384 kB\n"); n != 16<<20 || err != nil {
		t.Errorf("%d, %v", n, err)
	}
	if _, err := availableMemory("MemTotal:  100 kB\n"); err == nil {
		t.Error("no error without MemAvailable")
	}
	if n, err := DefaultBytes(); n <= 0 || err != nil {
		t.Errorf("%d, %v", n, err)
	}
}

// TestNoTrace is of disks that were built without one.
func TestNoTrace(t *testing.T) {
	d, _ := newDisk(t)
	root, err := cachedisk.OpenRoot(d.Dir)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	if _, err := readTrace(root, d.Manifest.Images[0]); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("error is %v", err)
	}
}
