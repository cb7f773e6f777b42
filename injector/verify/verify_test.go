package verify

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"errors"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"
	"github.com/vbatts/tar-split/tar/asm"
	"github.com/vbatts/tar-split/tar/storage"
	"golang.org/x/sys/unix"

	"github.com/selkies-project/packer-plugin-selkies/injector/cachedisk"
	"github.com/selkies-project/packer-plugin-selkies/manifest"
)

var when = time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)

type entry struct {
	hdr  tar.Header
	body string
}

// files is a layer that can be unpacked without root.
func files() []entry {
	return []entry{
		{tar.Header{Name: "./", Typeflag: tar.TypeDir, Mode: 0o755}, ""},
		{tar.Header{Name: "dir/", Typeflag: tar.TypeDir, Mode: 0o750}, ""},
		{tar.Header{Name: "dir/file", Mode: 0o640}, "contents"},
		{tar.Header{Name: "dir/hard", Typeflag: tar.TypeLink, Linkname: "dir/file", Mode: 0o640}, ""},
		{tar.Header{Name: "empty", Mode: 0o4755}, ""},
		{tar.Header{Name: "link", Typeflag: tar.TypeSymlink, Linkname: "dir", Mode: 0o777}, ""},
		{tar.Header{Name: "link/through", Mode: 0o600}, "by a symbolic link"},
		{tar.Header{Name: "implied/file", Mode: 0o644}, "in a directory that the stream does not have"},
		{tar.Header{Name: "dir/hard too", Typeflag: tar.TypeLink, Linkname: "dir/hard", Mode: 0o640}, ""},
	}
}

// newDisk is a cache disk of one layer, and that layer's directory.
func newDisk(t *testing.T, entries []entry) (*cachedisk.Disk, string) {
	t.Helper()
	var stream bytes.Buffer
	w := tar.NewWriter(&stream)
	for i := range entries {
		hdr := &entries[i].hdr
		hdr.Size, hdr.ModTime, hdr.Uid, hdr.Gid = int64(len(entries[i].body)), when, os.Getuid(), os.Getgid()
		if err := w.WriteHeader(hdr); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, entries[i].body); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	diffID := digest.FromBytes(stream.Bytes())
	d := &cachedisk.Disk{Dir: t.TempDir(), ID: diffID, Manifest: &manifest.Manifest{
		Store:  manifest.Store{Root: "docker"},
		Layers: []manifest.Layer{{ChainID: diffID, DiffID: diffID, Directory: "layer"}},
	}}

	name := filepath.Join(d.Dir, "docker/image/overlay2/layerdb/sha256", diffID.Encoded(), "tar-split.json.gz")
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		t.Fatal(err)
	}
	f, err := os.Create(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z := gzip.NewWriter(f)
	in, err := asm.NewInputTarStream(&stream, storage.NewJSONPacker(z), storage.NewDiscardFilePutter())
	if err == nil {
		_, err = io.Copy(io.Discard, in)
	}
	if err := errors.Join(err, z.Close()); err != nil {
		t.Fatal(err)
	}
	dir := d.LayerDir(d.Manifest.Layers[0])
	unpack(t, dir, entries)
	return d, dir
}

func unpack(t *testing.T, dir string, entries []entry) {
	t.Helper()
	for _, e := range entries {
		name := filepath.Join(dir, e.hdr.Name)
		err := os.MkdirAll(filepath.Dir(name), 0o755)
		if err == nil {
			switch e.hdr.Typeflag {
			case tar.TypeDir:
				err = os.MkdirAll(name, 0o755)
			case tar.TypeLink:
				err = os.Link(filepath.Join(dir, e.hdr.Linkname), name)
			case tar.TypeSymlink:
				err = os.Symlink(e.hdr.Linkname, name)
			default:
				err = os.WriteFile(name, []byte(e.body), 0o600)
			}
		}
		if err != nil {
			t.Fatal(err)
		}
		if e.hdr.Typeflag != tar.TypeSymlink {
			if err := unix.Chmod(name, uint32(e.hdr.Mode)); err != nil {
				t.Fatal(err)
			}
		}
	}
	for _, e := range entries {
		touch(t, filepath.Join(dir, e.hdr.Name), when)
	}
}

func touch(t *testing.T, name string, when time.Time) {
	t.Helper()
	ts := []unix.Timespec{unix.NsecToTimespec(when.UnixNano()), unix.NsecToTimespec(when.UnixNano())}
	if err := unix.UtimesNanoAt(unix.AT_FDCWD, strings.TrimSuffix(name, "/"), ts, unix.AT_SYMLINK_NOFOLLOW); err != nil {
		t.Fatal(err)
	}
}

func TestDisk(t *testing.T) {
	secret := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(secret, []byte("contents"), 0o640); err != nil {
		t.Fatal(err)
	}
	replace := func(name string, with func(string) error) func(string) error {
		return func(dir string) error {
			return errors.Join(os.Remove(filepath.Join(dir, name)), with(filepath.Join(dir, name)))
		}
	}
	for _, tt := range []struct {
		name   string
		change func(dir string) error
		want   string // "" if the layer is as built
	}{
		{"as built", func(string) error { return nil }, ""},
		{"contents", func(dir string) error { return os.WriteFile(filepath.Join(dir, "dir/file"), []byte("CONTENTS"), 0) }, "dir/file"},
		{"shorter", func(dir string) error { return os.Truncate(filepath.Join(dir, "dir/file"), 3) }, "dir/file"},
		{"missing", func(dir string) error { return os.Remove(filepath.Join(dir, "empty")) }, `"empty" is missing`},
		{"more", func(dir string) error { return os.Mkdir(filepath.Join(dir, "more"), 0o755) }, `"more" is not in the layer`},
		{"mode", func(dir string) error { return os.Chmod(filepath.Join(dir, "dir"), 0o700) }, `"dir" has mode 0700, not 0750`},
		{"no setuid", func(dir string) error { return os.Chmod(filepath.Join(dir, "empty"), 0o755) }, "mode 0755, not 4755"},
		{"time", func(dir string) error {
			return os.Chtimes(filepath.Join(dir, "empty"), when, when.Add(time.Hour))
		}, "was changed at 2026-01-01T01:00:00Z"},
		{"target", replace("link", func(name string) error { return os.Symlink("elsewhere", name) }), "link"},
		{"no hard link", replace("dir/hard", func(name string) error { return os.WriteFile(name, []byte("contents"), 0o640) }), "hard link"},
		{"leads outside", replace("dir/file", func(name string) error { return os.Symlink(secret, name) }), "escapes"},
		{"named pipe", replace("dir/file", func(name string) error { return unix.Mkfifo(name, 0o640) }), "not a regular file"},
		{"layer leads outside", func(dir string) error {
			return errors.Join(os.Rename(dir, dir+"-moved"), os.Symlink(t.TempDir(), dir))
		}, "escapes"},
		{"no layer", os.RemoveAll, "no such file"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d, dir := newDisk(t, files())
			if err := tt.change(dir); err != nil {
				t.Fatal(err)
			}
			r, err := Disk(t.Context(), d, nil)
			if err != nil {
				t.Fatal(err)
			}
			if tt.want == "" {
				if len(r.Damaged) > 0 || r.Layers != 1 || r.Bytes == 0 {
					t.Errorf("says %+v", r)
				}
				return
			}
			if len(r.Damaged) != 1 {
				t.Fatal("the damage was not found")
			}
			if said := strings.Join(r.Damaged[0].Problems, "\n"); !strings.Contains(said, tt.want) {
				t.Errorf("says %s, want %s", said, tt.want)
			}
		})
	}
}

// TestUnreadable runs without the capability that lets root read everything, which
// an agent's container does not have either.
func TestUnreadable(t *testing.T) {
	if os.Geteuid() == 0 && os.Getenv("SELKIES_TEST_BOUNDED") == "" {
		cmd := exec.Command("setpriv", "--bounding-set=-dac_override,-dac_read_search",
			os.Args[0], "-test.run=^TestUnreadable$", "-test.v")
		cmd.Env = append(os.Environ(), "SELKIES_TEST_BOUNDED=1")
		out, err := cmd.CombinedOutput()
		if err != nil || !strings.Contains(string(out), "--- PASS: TestUnreadable") {
			t.Fatalf("%v: %s", err, out)
		}
		return
	}
	d, dir := newDisk(t, files())
	name := filepath.Join(dir, "dir/file")
	if err := os.Chmod(name, 0); err != nil {
		t.Fatal(err)
	}
	if os.Geteuid() == 0 {
		if err := os.Chown(name, 65534, 65534); err != nil {
			t.Fatal(err)
		}
	}
	r, err := Disk(t.Context(), d, nil)
	if !errors.Is(err, fs.ErrPermission) || !strings.Contains(err.Error(), "CAP_DAC_READ_SEARCH") {
		t.Errorf("result %+v, error %v", r, err)
	}
}

func TestDiskHeaders(t *testing.T) {
	for _, tt := range []struct {
		name   string
		change func(data []byte) []byte
		want   string
	}{
		{"truncated", func(b []byte) []byte { return b[:len(b)/2] }, "unexpected EOF"},
		{"empty", func([]byte) []byte { return nil }, "recorded headers"},
		{"no gzip", func([]byte) []byte { return []byte("not compressed") }, "recorded headers"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d, _ := newDisk(t, files())
			names, _ := filepath.Glob(filepath.Join(d.Dir, "docker/image/overlay2/layerdb/sha256/*/tar-split.json.gz"))
			data, err := os.ReadFile(names[0])
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(names[0], tt.change(data), 0o644); err != nil {
				t.Fatal(err)
			}
			r, err := Disk(t.Context(), d, nil)
			if err != nil {
				t.Fatal(err)
			}
			if len(r.Damaged) != 1 || !strings.Contains(r.Damaged[0].Problems[0], tt.want) {
				t.Errorf("says %+v, want %s", r.Damaged, tt.want)
			}
		})
	}
	t.Run("another diff ID", func(t *testing.T) {
		d, _ := newDisk(t, files())
		d.Manifest.Layers[0].DiffID = digest.FromString("another")
		r, err := Disk(t.Context(), d, nil)
		if err != nil {
			t.Fatal(err)
		}
		if len(r.Damaged) != 1 || !strings.Contains(r.Damaged[0].Problems[0], "not to its diff ID") {
			t.Errorf("says %+v", r.Damaged)
		}
	})
	t.Run("cancelled", func(t *testing.T) {
		d, _ := newDisk(t, files())
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		if _, err := Disk(ctx, d, nil); !errors.Is(err, context.Canceled) {
			t.Errorf("says %v", err)
		}
	})
}

// TestTree unpacks streams as Docker does.
func TestTree(t *testing.T) {
	dir := func(name string) tar.Header { return tar.Header{Name: name, Typeflag: tar.TypeDir} }
	file := func(name string) tar.Header { return tar.Header{Name: name} }
	link := func(name, target string) tar.Header {
		return tar.Header{Name: name, Typeflag: tar.TypeSymlink, Linkname: target}
	}
	for _, tt := range []struct {
		name string
		hdrs []tar.Header
		want map[string]string
	}{
		{"whiteout", []tar.Header{file("a/.wh.b")}, map[string]string{".": "dir", "a": "dir", "a/b": "whiteout"}},
		{"opaque", []tar.Header{dir("a/"), file("a/.wh..wh..opq"), file("a/b")}, map[string]string{".": "dir", "a": "opaque", "a/b": "file"}},
		{"opaque before its directory", []tar.Header{file("a/.wh..wh..opq"), dir("a/")}, map[string]string{".": "dir", "a": "opaque"}},
		{"opaque root", []tar.Header{file(".wh..wh..opq")}, map[string]string{".": "opaque"}},
		{"file after whiteout", []tar.Header{file(".wh.a"), file("a")}, map[string]string{".": "dir", "a": "file"}},
		{"file over directory", []tar.Header{dir("a"), file("a/b"), file("a")}, map[string]string{".": "dir", "a": "file"}},
		{"directory over directory", []tar.Header{file("a/b"), dir("a")}, map[string]string{".": "dir", "a": "dir", "a/b": "file"}},
		{"twice", []tar.Header{file("a"), file("./a")}, map[string]string{".": "dir", "a": "file"}},
		{"global header", []tar.Header{{Name: "pax_global_header", Typeflag: tar.TypeXGlobalHeader}, file("a")}, map[string]string{".": "dir", "a": "file"}},
		{"upward", []tar.Header{file("../../a")}, map[string]string{".": "dir", "a": "file"}},
		{"through links", []tar.Header{dir("usr/lib"), link("lib", "/usr/lib"), link("l", "lib"), file("l/a")},
			map[string]string{".": "dir", "usr": "dir", "usr/lib": "dir", "lib": "file", "l": "file", "usr/lib/a": "file"}},
		{"through a loop", []tar.Header{link("a", "a"), file("a/b")}, map[string]string{".": "dir", "a": "dir", "a/b": "file"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			tr := tree{}
			for _, h := range tt.hdrs {
				tr.add(&h)
			}
			got := map[string]string{}
			for name, n := range tr {
				switch {
				case n.whiteout:
					got[name] = "whiteout"
				case n.opaque:
					got[name] = "opaque"
				case n.dir():
					got[name] = "dir"
				default:
					got[name] = "file"
				}
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Errorf("(-want +got):\n%s", diff)
			}
		})
	}
}
