//go:build e2e

package desktop

import (
	"bytes"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/selkies-project/packer-plugin-selkies/e2e/treediff"
)

// TestWriteTar packs what the upper directory of an overlay may hold and reads it
// back. It makes devices and trusted attributes, so it needs root.
func TestWriteTar(t *testing.T) {
	dir := t.TempDir()
	in := func(name string) string { return filepath.Join(dir, name) }
	capability := []byte("\x01\x00\x00\x02\x00\x04\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00\x00")
	for _, err := range []error{
		os.Mkdir(in("dir"), 0o755),
		os.WriteFile(in("dir/file"), []byte("contents"), 0o644),
		os.Chmod(in("dir/file"), 0o755|os.ModeSetuid),
		os.Chown(in("dir/file"), 1000, 1001),
		unix.Setxattr(in("dir/file"), "security.capability", capability, 0),
		os.Link(in("dir/file"), in("link")),
		os.Symlink("dir/file", in("symlink")),
		unix.Mknod(in("null"), unix.S_IFCHR|0o666, int(unix.Mkdev(1, 3))),
		unix.Mkfifo(in("fifo"), 0o600),
		os.WriteFile(in("latin-\xe9"), nil, 0o600),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	want, err := treediff.Dir(dir)
	if err != nil {
		t.Fatal(err)
	}
	delete(want, ".")

	for _, err := range []error{
		unix.Mknod(in("gone"), unix.S_IFCHR, 0),
		unix.Setxattr(in("dir"), "trusted.overlay.opaque", []byte("y"), 0),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	var stream bytes.Buffer
	if err := writeTar(&stream, dir); err != nil {
		t.Fatal(err)
	}
	got, err := treediff.Tar(&stream)
	if err != nil {
		t.Fatal(err)
	}
	for _, whiteout := range []string{".wh.gone", "dir/.wh..wh..opq"} {
		if _, ok := got[whiteout]; !ok {
			t.Errorf("%s is missing", whiteout)
		}
		delete(got, whiteout)
	}
	for _, diff := range treediff.Compare(want, got) {
		t.Error(diff)
	}
}
