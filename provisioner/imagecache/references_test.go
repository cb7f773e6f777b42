package imagecache

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// FuzzImageList reads an image_list_file.
func FuzzImageList(f *testing.F) {
	f.Add("debian:12 # the base\n\n  us-docker.pkg.dev/p/apps/desktop:1.4\t#x\n")
	f.Add("localhost:5000/x@sha256:" + strings.Repeat("0", 64) + "\r\nx:1@sha256:" + strings.Repeat("a", 64))
	f.Add("a#b\n#\n:\x1b[31m\n[::1]:5000/x\nindex.docker.io/library/a:1\n")
	f.Add(strings.Repeat("x", 1<<17))
	dir := f.TempDir()
	f.Fuzz(func(t *testing.T, text string) {
		file := filepath.Join(dir, "list")
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		refs, errs := parseListFile(file)
		for _, err := range errs {
			if strings.Contains(err.Error(), "\n") {
				t.Fatalf("an error of several lines: %q", err)
			}
		}
		for _, r := range refs {
			if strings.ContainsFunc(r.String(), func(c rune) bool { return c <= ' ' || c >= 0x7f }) {
				t.Fatalf("accepted %q", r)
			}
			again, err := parseReference("again", r.named.String())
			if err != nil || again.key() != r.key() || again.pinned() != r.pinned() || again.registry() != r.registry() {
				t.Fatalf("%q is %+v, and that %+v (%v)", text, r, again, err)
			}
		}
	})
}
