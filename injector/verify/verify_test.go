package verify

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"iter"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
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
func newDisk(t testing.TB, entries []entry) (*cachedisk.Disk, string) {
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
	in, done, err := asm.NewInputTarStreamWithDone(&stream, storage.NewJSONPacker(z), storage.NewDiscardFilePutter())
	if err != nil {
		t.Fatal(err)
	}
	_, err = io.Copy(io.Discard, in)
	if err := errors.Join(err, <-done, z.Close()); err != nil {
		t.Fatal(err)
	}
	dir := d.LayerDir(d.Manifest.Layers[0])
	unpack(t, dir, entries)
	return d, dir
}

// addLayer adds a layer to the disk.
func addLayer(t testing.TB, d *cachedisk.Disk, entries []entry) {
	t.Helper()
	other, otherDir := newDisk(t, entries)
	l := other.Manifest.Layers[0]
	l.Directory = fmt.Sprint("layer", len(d.Manifest.Layers))
	for from, to := range map[string]string{
		otherDir: d.LayerDir(l),
		filepath.Join(other.Dir, other.Manifest.TarSplitPath(l)): filepath.Join(d.Dir, d.Manifest.TarSplitPath(l)),
	} {
		if err := errors.Join(os.MkdirAll(filepath.Dir(to), 0o755), os.Rename(from, to)); err != nil {
			t.Fatal(err)
		}
	}
	d.Manifest.Layers = append(d.Manifest.Layers, l)
}

// writeHeaders replaces the layer's recorded headers.
func writeHeaders(t testing.TB, d *cachedisk.Disk, entries iter.Seq[storage.Entry]) {
	t.Helper()
	f, err := os.Create(filepath.Join(d.Dir, d.Manifest.TarSplitPath(d.Manifest.Layers[0])))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	z, err := gzip.NewWriterLevel(f, gzip.BestSpeed)
	if err != nil {
		t.Fatal(err)
	}
	e := json.NewEncoder(z)
	for entry := range entries {
		if err := e.Encode(entry); err != nil {
			t.Fatal(err)
		}
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
}

func unpack(t testing.TB, dir string, entries []entry) {
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

func touch(t testing.TB, name string, when time.Time) {
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
		{"two files", func(dir string) error {
			return errors.Join(os.WriteFile(filepath.Join(dir, "dir/file"), []byte("CONTENTS"), 0),
				os.WriteFile(filepath.Join(dir, "implied/file"), []byte("IN a directory that the stream does not have"), 0))
		}, `"implied/file" has other contents`},
		{"longer", func(dir string) error { return os.Truncate(filepath.Join(dir, "dir/file"), 9) }, `"dir/file" has 9 bytes, not 8`},
		{"too many", func(dir string) error {
			var errs []error
			for i := range maxStrangers + 10 {
				errs = append(errs, os.Mkdir(filepath.Join(dir, "dir", strconv.Itoa(i)), 0o755))
			}
			return errors.Join(errs...)
		}, fmt.Sprintf("and %d more", maxStrangers+1-maxProblems)},
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
		{"leads outside", replace("dir/file", func(name string) error { return os.Symlink(secret, name) }), `"dir/file" cannot be read`},
		{"named pipe", replace("dir/file", func(name string) error { return unix.Mkfifo(name, 0o640) }), "not a regular file"},
		{"layer leads outside", func(dir string) error {
			return errors.Join(os.Rename(dir, dir+"-moved"), os.Symlink(t.TempDir(), dir))
		}, "not a directory"},
		{"no layer", os.RemoveAll, "no such file"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d, dir := newDisk(t, files())
			if err := tt.change(dir); err != nil {
				t.Fatal(err)
			}
			r, err := Disk(t.Context(), d, Options{})
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
	r, err := Disk(t.Context(), d, Options{})
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
			r, err := Disk(t.Context(), d, Options{})
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
		r, err := Disk(t.Context(), d, Options{})
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
		if _, err := Disk(ctx, d, Options{}); !errors.Is(err, context.Canceled) {
			t.Errorf("says %v", err)
		}
	})
}

// TestHostileHeaders has recorded headers that no Docker wrote.
func TestHostileHeaders(t *testing.T) {
	secret := filepath.Join(t.TempDir(), "secret")
	if err := os.WriteFile(secret, []byte("secret"), 0o644); err != nil {
		t.Fatal(err)
	}
	place := func(name string, size int64) storage.Entry {
		return storage.Entry{Type: storage.FileType, Name: name, Size: size, Payload: make([]byte, 8)}
	}
	for _, tt := range []struct {
		name    string
		entries iter.Seq[storage.Entry]
		want    string
	}{
		{"upward", slices.Values([]storage.Entry{place("../../../../../../../../../.."+secret, 6)}), "outside of the layer"},
		{"absolute", slices.Values([]storage.Entry{place(secret, 6)}), "no such file"},
		{"through a link", slices.Values([]storage.Entry{place("out/secret", 6)}), "no such file"},
		{"escapes", slices.Values([]storage.Entry{place("\x1b[31m\n", 6)}), `"\x1b[31m\n" cannot be read`},
		{"unknown type", slices.Values([]storage.Entry{{Type: 7}}), "unknown type"},
		{"a large file", slices.Values([]storage.Entry{place("dir/file", 1<<62)}), "more bytes than it has itself"},
		{"large files", slices.Values([]storage.Entry{place("dir/file", 1<<62), place("empty", 1<<62)}), "more bytes than it has itself"},
		{"one large header", slices.Values([]storage.Entry{{Type: storage.SegmentType, Payload: make([]byte, maxRecord)}}), "or 33554432 for one file"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d, dir := newDisk(t, files())
			if err := os.Symlink(filepath.Dir(secret), filepath.Join(dir, "out")); err != nil {
				t.Fatal(err)
			}
			writeHeaders(t, d, tt.entries)
			r, err := Disk(t.Context(), d, Options{})
			said := fmt.Sprint(err)
			if err == nil {
				if len(r.Damaged) != 1 {
					t.Fatalf("says %+v", r)
				}
				said = strings.Join(r.Damaged[0].Problems, "\n")
			}
			if !strings.Contains(said, tt.want) {
				t.Errorf("says %s, want %s", said, tt.want)
			}
		})
	}
}

// TestContentsElsewhere has headers whose stream is the layer's, though not by the file
// that is on the disk: what verify proves must be that.
func TestContentsElsewhere(t *testing.T) {
	contents := storage.Entry{Type: storage.SegmentType, Payload: []byte("contents")}
	for name, change := range map[string]func(entries []storage.Entry, dir string) error{
		"among the headers": func(entries []storage.Entry, _ string) error {
			entries[slices.IndexFunc(entries, func(e storage.Entry) bool { return e.GetName() == "dir/file" })] = contents
			return nil
		},
		"in another file": func(entries []storage.Entry, dir string) error {
			entries[slices.IndexFunc(entries, func(e storage.Entry) bool { return e.GetName() == "dir/file" })].Name = "dir/another"
			return os.WriteFile(filepath.Join(dir, "dir/another"), []byte("contents"), 0o640)
		},
		"a header in a file": func(entries []storage.Entry, dir string) error {
			i := slices.IndexFunc(entries, func(e storage.Entry) bool { return e.Type == storage.SegmentType })
			header := entries[i].Payload
			entries[i] = storage.Entry{Type: storage.FileType, Name: "dir/another", Size: int64(len(header))}
			return os.WriteFile(filepath.Join(dir, "dir/another"), header, 0o640)
		},
	} {
		t.Run(name, func(t *testing.T) {
			d, dir := newDisk(t, files())
			var entries []storage.Entry
			headers := storage.NewJSONUnpacker(bytes.NewReader(gunzip(t, filepath.Join(d.Dir, d.Manifest.TarSplitPath(d.Manifest.Layers[0])))))
			for {
				e, err := headers.Next()
				if err != nil {
					break
				}
				entries = append(entries, *e)
			}
			file := filepath.Join(dir, "dir/file")
			err := errors.Join(change(entries, dir), os.WriteFile(file, []byte("CONTENTS"), 0), os.Chtimes(file, when, when), os.Chtimes(filepath.Dir(file), when, when))
			if err != nil {
				t.Fatal(err)
			}
			writeHeaders(t, d, slices.Values(entries))
			r, err := Disk(t.Context(), d, Options{})
			if err != nil {
				t.Fatal(err)
			}
			if len(r.Damaged) != 1 || !strings.Contains(strings.Join(r.Damaged[0].Problems, "\n"), "contents are ") {
				t.Errorf("says %+v", r.Damaged)
			}
		})
	}
}

type zeros struct{}

func (zeros) Read(p []byte) (int, error) { return len(p), nil }

// TestBounded reads more headers than are taken, each of a size that is.
func TestBounded(t *testing.T) {
	b := &bounded{r: zeros{}, headers: maxHeaders}
	read := int64(0)
	for {
		b.record = maxRecord
		n, err := io.CopyN(io.Discard, b, maxRecord)
		if read += n; err != nil {
			break
		}
	}
	if read != maxHeaders {
		t.Errorf("read %d bytes", read)
	}
}

// TestBlobs has a disk that keeps the compressed layers.
func TestBlobs(t *testing.T) {
	blob := []byte("compressed")
	for name, tt := range map[string]struct {
		contents []byte
		want     string
	}{
		"good":    {blob, ""},
		"missing": {nil, "no such file"},
		"changed": {[]byte("Compressed"), "hashes to sha256:"},
		"longer":  {append(slices.Clone(blob), 0), "hashes to sha256:"},
		"shorter": {blob[:3], "hashes to sha256:"},
	} {
		t.Run(name, func(t *testing.T) {
			d, _ := newDisk(t, files())
			config, err := json.Marshal(ocispec.Image{RootFS: ocispec.RootFS{DiffIDs: []digest.Digest{d.Manifest.Layers[0].DiffID}}})
			if err != nil {
				t.Fatal(err)
			}
			image, err := json.Marshal(ocispec.Manifest{Layers: []ocispec.Descriptor{{Digest: digest.FromBytes(blob), Size: int64(len(blob))}}})
			if err != nil {
				t.Fatal(err)
			}
			d.Manifest.Store.Blobs = true
			d.Manifest.Images = []manifest.Image{{Config: ocispec.Descriptor{Data: config}, Manifest: ocispec.Descriptor{Data: image}}}
			if tt.contents != nil {
				file := filepath.Join(d.Dir, manifest.BlobsDir, "sha256", digest.FromBytes(blob).Encoded())
				if err := errors.Join(os.MkdirAll(filepath.Dir(file), 0o755), os.WriteFile(file, tt.contents, 0o644)); err != nil {
					t.Fatal(err)
				}
			}
			r, err := Disk(t.Context(), d, Options{})
			if err != nil {
				t.Fatal(err)
			}
			if tt.want == "" {
				if len(r.Damaged) > 0 {
					t.Errorf("says %+v", r.Damaged)
				}
				return
			}
			if len(r.Damaged) != 1 || !strings.Contains(r.Damaged[0].Problems[0], tt.want) {
				t.Errorf("says %+v, want %s", r.Damaged, tt.want)
			}
		})
	}
}

// TestResume interrupts a verification, and goes on.
func TestResume(t *testing.T) {
	// Three layers, of which the first to be read is the largest.
	d, dir := newDisk(t, files())
	first := d.Manifest.Layers[0]
	for i := range 2 {
		addLayer(t, d, append(files(), entry{tar.Header{Name: fmt.Sprint("more", i), Mode: 0o644}, "more"}))
		d.Manifest.Layers[1+i].Size = int64(i)
	}
	d.Manifest.Layers[0].Size = 100
	note := filepath.Join(t.TempDir(), "run", "note")

	ctx, cancel := context.WithCancel(t.Context())
	opt := Options{Rate: 1 << 30, Resume: note, Progress: func(p Progress) {
		if p.Layers == 1 {
			cancel()
		}
	}}
	if _, err := Disk(ctx, d, opt); !errors.Is(err, context.Canceled) {
		t.Fatalf("says %v", err)
	}
	text, err := os.ReadFile(note)
	if want := d.ID.String() + "\n" + first.ChainID.String() + "\n"; err != nil || string(text) != want {
		t.Fatalf("noted %q, %v, want %q", text, err, want)
	}
	// Killed as it was noting the second.
	if err := os.WriteFile(note, append(text, "sha256:0123"...), 0o600); err != nil {
		t.Fatal(err)
	}
	// What is proved is not read again, what is damaged is never noted.
	if err := errors.Join(os.RemoveAll(dir), os.RemoveAll(d.LayerDir(d.Manifest.Layers[1]))); err != nil {
		t.Fatal(err)
	}
	for _, resumed := range []int{1, 2} {
		r, err := Disk(t.Context(), d, Options{Resume: note})
		if err != nil {
			t.Fatal(err)
		}
		if r.Layers != 3 || r.Resumed != resumed || len(r.Damaged) != 1 || r.Damaged[0].ChainID != d.Manifest.Layers[1].ChainID {
			t.Errorf("says %+v, want %d resumed", r, resumed)
		}
	}
	// Another generation begins anew.
	d.ID = digest.FromString("another generation")
	if r, err := Disk(t.Context(), d, Options{Resume: note}); err != nil || r.Resumed != 0 || len(r.Damaged) != 2 {
		t.Errorf("says %+v, %v", r, err)
	}
}

// TestResumeOthers is told to note what is proved in files of something else, which stay.
func TestResumeOthers(t *testing.T) {
	d, _ := newDisk(t, files())
	for name, text := range map[string]string{
		"a text":            "notes\n" + d.ID.String() + "\n",
		"a long line":       strings.Repeat("x", 1<<20),
		"a long line below": d.ID.String() + "\n" + strings.Repeat("x", 1<<20),
		"an empty line":     "\n",
		"half a digest":     d.ID.String()[:40],
	} {
		t.Run(name, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "file")
			if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
				t.Fatal(err)
			}
			if _, err := Disk(t.Context(), d, Options{Resume: file}); err == nil || !strings.Contains(err.Error(), file) {
				t.Errorf("says %v", err)
			}
			if left, err := os.ReadFile(file); string(left) != text {
				t.Errorf("%d bytes are left, %v", len(left), err)
			}
		})
	}
	t.Run("a link", func(t *testing.T) {
		dir := t.TempDir()
		link := filepath.Join(dir, "link")
		if err := os.Symlink("elsewhere", link); err != nil {
			t.Fatal(err)
		}
		if _, err := Disk(t.Context(), d, Options{Resume: link}); !errors.Is(err, unix.ELOOP) {
			t.Errorf("says %v", err)
		}
		if _, err := os.Lstat(filepath.Join(dir, "elsewhere")); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("where it leads: %v", err)
		}
	})
}

// TestRate reads no faster than it may.
func TestRate(t *testing.T) {
	body := strings.Repeat("x", 3*chunk)
	d, _ := newDisk(t, []entry{{tar.Header{Name: "file", Mode: 0o644}, body}})
	start := time.Now()
	r, err := Disk(t.Context(), d, Options{Rate: 4 * chunk})
	if err != nil || len(r.Damaged) > 0 || r.Bytes != int64(len(body)) {
		t.Fatalf("says %+v, %v", r, err)
	}
	// The first chunk is free.
	if took := time.Since(start); took < 450*time.Millisecond {
		t.Errorf("%d bytes took %v at %d bytes a second", len(body), took, 4*chunk)
	}
}

// TestRateOfMetadata has a layer without contents: its recorded headers and its paths are
// read no faster than anything else.
func TestRateOfMetadata(t *testing.T) {
	var empty []entry
	for i := range 200 {
		empty = append(empty, entry{tar.Header{Name: fmt.Sprint("file", i), Mode: 0o644}, ""})
	}
	d, _ := newDisk(t, empty)
	r, err := newRun(d, Options{Rate: 1})
	if err != nil {
		t.Fatal(err)
	}
	defer r.close()
	if rep, err := r.all(t.Context()); err != nil || len(rep.Damaged) > 0 {
		t.Fatalf("says %+v, %v", rep, err)
	}
	if used := chunk - r.limit.Tokens(); used < 200*metadata+4096 {
		t.Errorf("%.0f bytes were waited for", used)
	}
}

// TestHung ends although a file is not opened.
func TestHung(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	file := make(chan opened)
	defer func() { file <- opened{} }()
	s := &stream{}
	if err := s.file(ctx, record{file: file}); !errors.Is(err, context.Canceled) {
		t.Errorf("says %v", err)
	}
}

// TestCompareInterrupted ends at the path that it is at.
func TestCompareInterrupted(t *testing.T) {
	read := 0
	_, err := tree{}.compare(t.TempDir(), func() error {
		read++
		return context.Canceled
	})
	if !errors.Is(err, context.Canceled) || read != 1 {
		t.Errorf("says %v after %d paths", err, read)
	}
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
		{"file over the root", []tar.Header{file("a/b"), file("."), file("c")}, map[string]string{".": "dir", "c": "file"}},
		{"through a link that is replaced", []tar.Header{link("a", "b"), file("a/x"), file("a"), file("a/y")},
			map[string]string{".": "dir", "a": "dir", "a/y": "file", "b": "dir", "b/x": "file"}},
		{"through a loop", []tar.Header{link("a", "a"), file("a/b")}, map[string]string{".": "dir", "a": "dir", "a/b": "file"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			tr := tree{}
			for _, h := range tt.hdrs {
				if _, err := tr.add(&h); err != nil {
					t.Fatal(err)
				}
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

// TestTreeLarge unpacks what takes hours where a path costs as much as the tree has others,
// or as it is deep itself.
func TestTreeLarge(t *testing.T) {
	hdrs := map[string]iter.Seq[tar.Header]{
		"replaced directories": func(yield func(tar.Header) bool) {
			for i := range 120_000 {
				if !yield(tar.Header{Name: fmt.Sprint(i/2, "/", i%2)}) || i%2 == 1 && !yield(tar.Header{Name: fmt.Sprint(i / 2)}) {
					return
				}
			}
		},
		"deep links": func(yield func(tar.Header) bool) {
			yield(tar.Header{Name: "l", Typeflag: tar.TypeSymlink, Linkname: strings.Repeat("a/", 1000)})
			for range 1000 {
				if !yield(tar.Header{Name: "l/" + strings.Repeat("a/", 1000) + "f", Typeflag: tar.TypeLink, Linkname: strings.Repeat("b/", 2000)}) {
					return
				}
			}
		},
	}
	for name, hdrs := range hdrs {
		t.Run(name, func(t *testing.T) {
			tr := tree{}
			for h := range hdrs {
				if _, err := tr.add(&h); err != nil {
					t.Fatal(err)
				}
			}
		})
	}
}

// TestTreeRefused has streams that nobody can unpack, or that ask for more than is given.
func TestTreeRefused(t *testing.T) {
	deep := func(n int) string { return strings.Repeat("a/", n) }
	for name, tt := range map[string]struct {
		hdrs iter.Seq[tar.Header]
		want string
	}{
		"name":   {slices.Values([]tar.Header{{Name: deep(80_000)}}), "its name, or what it links to, is too long"},
		"target": {slices.Values([]tar.Header{{Name: "a", Typeflag: tar.TypeSymlink, Linkname: deep(80_000)}}), "its name, or what it links to, is too long"},
		"by a link": {slices.Values([]tar.Header{
			{Name: "l", Typeflag: tar.TypeSymlink, Linkname: deep(1500)}, {Name: "l/" + deep(1500) + "b"},
		}), "where its name leads is too long"},
		"too many": {func(yield func(tar.Header) bool) {
			for i := range 10 {
				if !yield(tar.Header{Name: fmt.Sprint(i%2, "/", deep(1000))}) || !yield(tar.Header{Name: fmt.Sprint(i % 2)}) {
					return
				}
			}
		}, fmt.Sprintf("more than %d paths", maxPaths)},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPieces()
			p.paths = 9000
			go func() {
				defer close(p.in)
				for h := range tt.hdrs {
					var b bytes.Buffer
					if err := tar.NewWriter(&b).WriteHeader(&h); err != nil {
						panic(err)
					}
					p.send(piece{bytes: b.Bytes()})
				}
			}()
			if _, err := p.tree(t.Context()); err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("says %v, want %s", err, tt.want)
			}
		})
	}
}

// TestManyLinks compares names of one file, none of which has its attributes.
func TestManyLinks(t *testing.T) {
	const links = 30_000
	tr, files, names := tree{}, map[string]*file{}, make([]string, links)
	f := &file{}
	f.st.Mode = unix.S_IFREG
	for i := range names {
		names[i] = strconv.Itoa(i)
		if _, err := tr.add(&tar.Header{Name: names[i], Typeflag: tar.TypeLink, Linkname: "0", Uid: 1}); err != nil {
			t.Fatal(err)
		}
		files[names[i]] = f
	}
	if diffs := tr.compareLinked(files, names); len(diffs) != links || len(diffs[links-1]) == 0 {
		t.Errorf("says %d times %q", len(diffs), diffs[links-1])
	}
}

// TestOverlayAttributes has those that would lead overlayfs to other files, and those that it
// writes by itself.
func TestOverlayAttributes(t *testing.T) {
	tr := tree{}
	if _, err := tr.add(&tar.Header{Name: "implied/file", Typeflag: tar.TypeReg}); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{".", "implied", "implied/file"} {
		for attribute, reported := range map[string]bool{
			"trusted.overlay.redirect": true, "trusted.overlay.metacopy": true, "trusted.overlay.verity": true,
			"trusted.overlay.opaque": true, "trusted.overlay.origin": false, "trusted.overlay.impure": false, "trusted.overlay.nlink": false,
		} {
			f := &file{xattrs: map[string]string{attribute: "/elsewhere"}}
			f.st.Mode = unix.S_IFREG
			if tr[name].dir() {
				f.st.Mode = unix.S_IFDIR
			}
			said := strings.Join(tr[name].compare(f), "; ")
			if strings.Contains(said, "has "+attribute+", which is not in the layer") != reported {
				t.Errorf("%s with %s: %q", name, attribute, said)
			}
		}
	}
}
