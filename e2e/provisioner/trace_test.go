//go:build e2e

package provisioner_test

import (
	"bytes"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/selkies-project/packer-plugin-selkies/e2e/buildvm"
	"github.com/selkies-project/packer-plugin-selkies/e2e/host"
	"github.com/selkies-project/packer-plugin-selkies/e2e/images"
	"github.com/selkies-project/packer-plugin-selkies/e2e/registry"
	"github.com/selkies-project/packer-plugin-selkies/injector/cachedisk"
	"github.com/selkies-project/packer-plugin-selkies/injector/readahead"
	"github.com/selkies-project/packer-plugin-selkies/manifest"
	"github.com/selkies-project/packer-plugin-selkies/trace"
)

// traced is an image with busybox and a file of 8 MiB.
func traced(t *testing.T) v1.Image {
	t.Helper()
	catalogue, err := images.Catalogue(world.busybox)
	if err != nil {
		t.Fatal(err)
	}
	big := layer(t, map[string]int{"big": 8 << 20})
	l, err := tarball.LayerFromOpener(func() (io.ReadCloser, error) { return io.NopCloser(bytes.NewReader(big)), nil }, tarball.WithMediaType(types.OCILayer))
	if err != nil {
		t.Fatal(err)
	}
	image, err := mutate.Append(catalogue[0].Image, mutate.Addendum{Layer: l, MediaType: types.OCILayer})
	if err != nil {
		t.Fatal(err)
	}
	return image
}

// traceBlock is a trace block of a template.
func traceBlock(ref string, seconds int, command ...string) string {
	quoted := make([]string, len(command))
	for i, c := range command {
		quoted[i] = fmt.Sprintf("%q", c)
	}
	return fmt.Sprintf("injector = %q\ntrace {\n image = %q\n seconds = %d\n command = [%s]\n}\n", world.injector, ref, seconds, strings.Join(quoted, ", "))
}

// readTrace is the trace that a build has left on the disk, nil for none.
func readTrace(t *testing.T, d *buildvm.Disk) (tr *trace.Trace) {
	t.Helper()
	d.Mount(t, func(dir string) {
		files, err := filepath.Glob(filepath.Join(dir, trace.Dir, "*"))
		if err != nil || len(files) > 1 {
			t.Fatalf("the traces are %v (%v)", files, err)
		}
		for _, f := range files {
			data, err := os.ReadFile(f)
			if err != nil {
				t.Fatal(err)
			}
			if tr, err = trace.Decode(data); err != nil {
				t.Fatal(err)
			}
			if rel, err := filepath.Rel(dir, f); err != nil || rel != trace.Path(tr.Image) {
				t.Errorf("the trace of %s is in %s (%v)", tr.Image, rel, err)
			}
		}
	})
	return tr
}

// readAhead is how much the kernel reads ahead from the disk, in units of 512 bytes.
func readAhead(t *testing.T, v *vm, d *buildvm.Disk) string {
	t.Helper()
	return strings.TrimSpace(v.Output(t, "blockdev", "--getra", d.Device))
}

// TestTrace traces a container that reads a part of a file, and reads that ahead.
func TestTrace(t *testing.T) {
	v := debian(t)
	reg := registry.New(t, registry.Config{})
	ref := pushed(t, reg, "app:1", traced(t))
	d := newDisk(t, v, 256)
	ahead := readAhead(t, v, d)
	before := v.State(t) + v.Network(t)
	dd := []string{"/bin/busybox", "dd", "if=/big", "of=/dev/null", "bs=4096", "skip=1024", "count=1"}
	v.MustBuild(t, buildvm.Images(ref), d.Block(), traceBlock(ref, 60, dd...))
	if diff := cmp.Diff(before, v.State(t)+v.Network(t)); diff != "" {
		t.Errorf("the build changed the VM: %s", diff)
	}
	d.CheckStore(t, 2)
	if now := readAhead(t, v, d); now != ahead {
		t.Errorf("the build changed how much is read ahead from %s to %s", ahead, now)
	}
	tr := readTrace(t, d)
	if tr == nil {
		t.Fatal("there is no trace")
	}
	busybox := slices.Index(tr.Files, trace.File{Layer: 0, Path: "bin/busybox"})
	big := slices.Index(tr.Files, trace.File{Layer: 1, Path: "big"})
	if busybox < 0 || big < 0 || !slices.Equal(tr.Command, dd) || tr.Seconds != 60 {
		t.Fatalf("the trace is %+v", tr)
	}
	const read = 1024 * 4096
	if !slices.ContainsFunc(tr.Ranges, func(r trace.Range) bool {
		return r.File == big && r.Offset <= read && r.Offset+r.Length > read && r.Length <= 64<<10
	}) {
		t.Errorf("the trace does not have what was read: %+v", tr.Ranges)
	}

	d.Mount(t, func(dir string) { // anew, so nothing of it is in the page cache
		cache, err := cachedisk.Open(dir)
		if err != nil {
			t.Fatal(err)
		}
		resident := func() (n int64) {
			for _, r := range tr.Ranges {
				chain, err := cache.Manifest.Images[0].ChainIDs()
				if err != nil {
					t.Fatal(err)
				}
				f := tr.Files[r.File]
				i := slices.IndexFunc(cache.Manifest.Layers, func(l manifest.Layer) bool { return l.ChainID == chain[f.Layer] })
				there, err := host.Resident(filepath.Join(cache.LayerDir(cache.Manifest.Layers[i]), f.Path), r.Offset, r.Length)
				if err != nil {
					t.Fatal(err)
				}
				n += min(there, r.Length) // the last page of a file is less
			}
			return n
		}
		if n := resident(); n > 0 {
			t.Errorf("%d bytes are in the page cache before", n)
		}
		err = readahead.Disk(t.Context(), cache, readahead.Options{}, func(img readahead.Image, err error) {
			if err != nil || img.Bytes != tr.Bytes() || img.Left > 0 {
				t.Errorf("read %+v of %d bytes, %v", img, tr.Bytes(), err)
			}
		})
		if n := resident(); n != tr.Bytes() || err != nil {
			t.Errorf("%d of %d bytes are in the page cache after: %v", n, tr.Bytes(), err)
		}
	})

	out := v.MustBuild(t, buildvm.Images(ref), d.Block(), traceBlock(ref, 60, dd...))
	if !strings.Contains(out, "kept the access trace of") {
		t.Errorf("traced again:\n%s", out)
	}
	if diff := cmp.Diff(tr, readTrace(t, d)); diff != "" {
		t.Errorf("the trace has changed: %s", diff)
	}
	v.MustBuild(t, buildvm.Images(ref), d.Block())
	if readTrace(t, d) != nil {
		t.Error("the trace is there without a block for it")
	}
}

// TestTraceFails has starts that are not worth recording. What was pulled stays, and the
// layer manifest with it.
func TestTraceFails(t *testing.T) {
	t.Parallel()
	v := debian(t)
	reg := registry.New(t, registry.Config{})
	ref := pushed(t, reg, "app:1", traced(t))
	script := filepath.Join(t.TempDir(), "script")
	if err := os.WriteFile(script, []byte("not a program\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	d := newDisk(t, v, 256)
	before := v.State(t)
	for name, c := range map[string]struct{ block, want string }{
		"no such program":   {traceBlock(ref, 5, "/bin/desktop"), "starting a container: "},
		"it fails":          {traceBlock(ref, 5, "/bin/busybox", "ls", "/none"), "the container ended with status 1: ls: /none: No such file or directory"},
		"no such image":     {traceBlock(reg.Addr+"/app:2", 5), "no image of this build has that name"},
		"no program at all": {strings.Replace(traceBlock(ref, 5), world.injector, script, 1), "running the injector on the build VM: "},
	} {
		out, err := v.Build(t, buildvm.Images(ref), d.Block(), c.block)
		if err == nil || !strings.Contains(errorLine(t, out), c.want) {
			t.Errorf("%s: packer build: %v, want %q\n%s", name, err, c.want, out)
		}
		t.Logf("%s: packer build:\n%s", name, out)
		d.CheckStore(t, 2)
		if readTrace(t, d) != nil {
			t.Errorf("%s: there is a trace", name)
		}
		d.Mount(t, func(dir string) {
			if left, err := filepath.Glob(filepath.Join(dir, manifest.Dir, "*.tmp")); err != nil || len(left) > 0 {
				t.Errorf("%s: left %v (%v)", name, left, err)
			}
		})
	}
	if diff := cmp.Diff(before, v.State(t)); diff != "" {
		t.Errorf("the builds changed the VM: %s", diff)
	}
}

// TestCancelTrace ends a build while it traces, in every way.
func TestCancelTrace(t *testing.T) {
	t.Parallel()
	v := debian(t)
	reg := registry.New(t, registry.Config{})
	ref := pushed(t, reg, "app:1", traced(t))
	d := newDisk(t, v, 256)
	ahead := readAhead(t, v, d)
	for _, e := range endings {
		t.Run(e.name, func(t *testing.T) {
			running := func() bool {
				return readAhead(t, v, d) == "64" && len(v.inStore(t, "containers/*")) > 0 && strings.Contains(v.Output(t, "ps", "-eo", "args"), "/bin/busybox sleep 4711")
			}
			v.cancel(t, e, running, buildvm.Images(ref), d.Block(), traceBlock(ref, 600, "/bin/busybox", "sleep", "4711"))
			if out := v.Output(t, "ps", "-eo", "args"); strings.Contains(out, "sleep 4711") || strings.Contains(out, "trace --cache") {
				t.Errorf("it goes on:\n%s", out)
			}
			v.MustBuild(t, buildvm.Images(ref), d.Block())
			d.CheckStore(t, 2)
			if now := readAhead(t, v, d); now != ahead {
				t.Errorf("how much is read ahead is %s, not %s", now, ahead)
			}
		})
	}
}
