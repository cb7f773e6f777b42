package treediff_test

import (
	"archive/tar"
	"bytes"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/selkies-project/packer-plugin-selkies/e2e/treediff"
)

var old = time.Date(2020, 1, 2, 3, 4, 5, 6, time.UTC)

// tree makes a small tree and applies change to it before the times are set.
func tree(t *testing.T, change func(dir string) error) string {
	t.Helper()
	dir := t.TempDir()
	steps := []func() error{
		func() error { return os.Mkdir(filepath.Join(dir, "dir"), 0o755) },
		func() error { return os.WriteFile(filepath.Join(dir, "dir/file"), []byte("contents"), 0o644) },
		func() error { return os.Link(filepath.Join(dir, "dir/file"), filepath.Join(dir, "link")) },
		func() error { return os.WriteFile(filepath.Join(dir, "name-\xff"), nil, 0o600) },
		func() error { return os.Symlink("dir/file", filepath.Join(dir, "symlink")) },
		func() error { return change(dir) },
	}
	for _, step := range steps {
		if err := step(); err != nil {
			t.Fatal(err)
		}
	}
	return dir
}

func read(t *testing.T, dir string) treediff.Tree {
	t.Helper()
	got, err := treediff.Dir(dir)
	if err != nil {
		t.Fatal(err)
	}
	// Times are set by the clock, except where a case is about them.
	for name, e := range got {
		if !e.ModTime.Equal(old) {
			e.ModTime = time.Time{}
			got[name] = e
		}
	}
	return got
}

func TestCompare(t *testing.T) {
	want := read(t, tree(t, func(string) error { return nil }))
	tests := []struct {
		name   string
		change func(dir string) error
		diff   []string
	}{
		{"same", func(string) error { return nil }, nil},
		{"missing", func(d string) error { return os.Remove(d + "/symlink") }, []string{`"symlink": missing`}},
		{"extra", func(d string) error { return os.Mkdir(d+"/new", 0o755) }, []string{`"new": not wanted, a dir`}},
		{"mode", func(d string) error { return os.Chmod(d+"/name-\xff", 0o755|os.ModeSetuid) },
			[]string{`"name-\xff": mode is 04755, want 0600`}},
		{"type", func(d string) error {
			if err := os.Remove(d + "/symlink"); err != nil {
				return err
			}
			return os.Mkdir(d+"/symlink", 0o755)
		}, []string{`"symlink": type is dir, want symlink`}},
		{"target", func(d string) error {
			if err := os.Remove(d + "/symlink"); err != nil {
				return err
			}
			return os.Symlink("link", d+"/symlink")
		}, []string{`"symlink": target is "link", want "dir/file"`}},
		{"contents", func(d string) error { return os.WriteFile(d+"/link", []byte("CONTENTS"), 0o644) }, []string{
			`"dir/file": sha256 is eabe6aca2f0dcdbddb32c8f06e6edfa1b78618efaf57d677950d443b91d99175, want d1b2a59fbea7e20077af9f91b27e95e865061b270be03ff539ab3b73587882e8`,
			`"link": sha256 is eabe6aca2f0dcdbddb32c8f06e6edfa1b78618efaf57d677950d443b91d99175, want d1b2a59fbea7e20077af9f91b27e95e865061b270be03ff539ab3b73587882e8`}},
		{"hard link", func(d string) error {
			if err := os.Remove(d + "/link"); err != nil {
				return err
			}
			return os.WriteFile(d+"/link", []byte("contents"), 0o644)
		}, []string{`"link": first hard link is "", want "dir/file"`}},
		{"time", func(d string) error { return os.Chtimes(d+"/name-\xff", old, old) },
			[]string{`"name-\xff": modification time is 2020-01-02 03:04:05.000000006 +0000 UTC, want 0001-01-01 00:00:00 +0000 UTC`}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			diff := treediff.Compare(want, read(t, tree(t, tt.change)))
			if d := cmp.Diff(tt.diff, diff); d != "" {
				t.Error(d)
			}
		})
	}
}

// TestTar compares a tar stream, in which a hard link precedes the lexically first
// name, with the directory it stands for.
func TestTar(t *testing.T) {
	dir := tree(t, func(string) error { return nil })
	want, err := treediff.Dir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, h := range []tar.Header{
		{Name: "./", Typeflag: tar.TypeDir},
		{Name: "link", Typeflag: tar.TypeReg, Size: 8},
		{Name: "dir/", Typeflag: tar.TypeDir},
		{Name: "dir/file", Typeflag: tar.TypeLink, Linkname: "link"},
		{Name: "name-\xff", Typeflag: tar.TypeReg},
		{Name: "symlink", Typeflag: tar.TypeSymlink, Linkname: "dir/file"},
	} {
		e := want[filepath.Clean(h.Name)]
		h.Mode, h.Uid, h.Gid, h.ModTime, h.Format = int64(e.Mode), e.UID, e.GID, e.ModTime, tar.FormatPAX
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if h.Size > 0 {
			if _, err := w.Write([]byte("contents")); err != nil {
				t.Fatal(err)
			}
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	got, err := treediff.Tar(&buf)
	if err != nil {
		t.Fatal(err)
	}
	if diff := treediff.Compare(want, got); len(diff) > 0 {
		t.Error(diff)
	}
}
