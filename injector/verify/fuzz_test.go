package verify

import (
	"archive/tar"
	"bytes"
	"compress/gzip"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	"github.com/vbatts/tar-split/tar/storage"
)

// FuzzHeaders verifies a layer by recorded headers that no Docker wrote.
func FuzzHeaders(f *testing.F) {
	d, _ := newDisk(f, files())
	split := filepath.Join(d.Dir, d.Manifest.TarSplitPath(d.Manifest.Layers[0]))
	good := gunzip(f, split)
	f.Add(good)
	f.Add(good[:len(good)/2])
	f.Add(bytes.ReplaceAll(good, []byte("dir/file"), []byte("../../fi")))
	f.Add([]byte(`{"type":1,"name":"dir/file","size":4611686018427387904,"payload":""}`))
	f.Add([]byte(`{"type":1,"name":"dir","size":1}{"type":1,"name_raw":"/w==","size":-1}{"type":2}{"type":3}`))
	f.Fuzz(func(t *testing.T, headers []byte) {
		var z bytes.Buffer
		w := gzip.NewWriter(&z)
		_, err := w.Write(headers)
		if err == nil {
			err = w.Close()
		}
		if err == nil {
			err = os.WriteFile(split, z.Bytes(), 0o644)
		}
		if err != nil {
			t.Fatal(err)
		}
		r, err := Disk(t.Context(), d, Options{})
		if err == nil && len(r.Damaged) == 0 && !sameStream(headers, good) {
			t.Fatal("proved another stream")
		}
	})
}

// FuzzTree unpacks tar streams.
func FuzzTree(f *testing.F) {
	stream := func(hdrs ...tar.Header) []byte {
		var b bytes.Buffer
		w := tar.NewWriter(&b)
		for _, h := range hdrs {
			if err := w.WriteHeader(&h); err != nil {
				f.Fatal(err)
			}
		}
		if err := w.Close(); err != nil {
			f.Fatal(err)
		}
		return b.Bytes()
	}
	f.Add(stream(tar.Header{Name: "a/b"}, tar.Header{Name: "a", Typeflag: tar.TypeSymlink, Linkname: "../.."}, tar.Header{Name: "a/.wh..wh..opq"}))
	f.Add(stream(tar.Header{Name: ".wh.a"}, tar.Header{Name: ".wh."}, tar.Header{Name: ".wh.."}, tar.Header{Name: ".wh..wh..opq"}))
	f.Add(stream(tar.Header{Name: "l", Typeflag: tar.TypeLink, Linkname: "l"}, tar.Header{Name: "x", Typeflag: tar.TypeLink, Linkname: "nowhere"}))
	f.Add(stream(tar.Header{Name: "/", Typeflag: tar.TypeDir}, tar.Header{Name: "."}, tar.Header{Name: "a"}))
	f.Fuzz(func(t *testing.T, stream []byte) {
		p := newPieces()
		go func() {
			p.send(piece{bytes: stream})
			close(p.in)
		}()
		unpacked, err := p.tree(t.Context())
		if err != nil && unpacked != nil {
			t.Fatalf("unpacks %v although %v", unpacked, err)
		}
		for name, n := range unpacked {
			if !filepath.IsLocal(name) || name != filepath.Clean(name) {
				t.Fatalf("unpacks %q", name)
			}
			if n.whiteout && n.hdr != nil {
				t.Fatalf("%q is a file and a whiteout", name)
			}
		}
	})
}

// gunzip reads a compressed file.
func gunzip(t testing.TB, name string) []byte {
	t.Helper()
	data, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	z, err := gzip.NewReader(bytes.NewReader(data))
	if err != nil {
		t.Fatal(err)
	}
	text, err := io.ReadAll(z)
	if err != nil {
		t.Fatal(err)
	}
	return text
}

// sameStream says if two lists of headers have the same bytes and the same places.
func sameStream(a, b []byte) bool {
	flat := func(text []byte) (out []byte) {
		for u := storage.NewJSONUnpacker(bytes.NewReader(text)); ; {
			e, err := u.Next()
			if err != nil {
				return out
			}
			switch {
			case e.Type == storage.SegmentType:
				out = append(out, e.Payload...)
			case e.Size > 0:
				out = append(out, clean(e.GetName())...)
			}
		}
	}
	return bytes.Equal(flat(a), flat(b))
}

// FuzzResume goes on from what a file says is proved: it begins anew where it says nothing
// of this cache, and what is noted is read again. What it does not take it leaves alone.
func FuzzResume(f *testing.F) {
	cache, chain := digest.FromString("cache"), digest.FromString("chain")
	f.Add([]byte(cache.String() + "\n" + chain.String() + "\n"))
	f.Add([]byte(cache.String() + "\n" + chain.String()[:40]))
	f.Add([]byte(chain.String() + "\n" + chain.String() + "\n"))
	f.Add([]byte(cache.String() + "\n" + strings.Repeat("x", 1<<17)))
	f.Add([]byte("\x00\r\n\n"))
	f.Fuzz(func(t *testing.T, file []byte) {
		name := filepath.Join(t.TempDir(), "resume")
		if err := os.WriteFile(name, file, 0o600); err != nil {
			t.Fatal(err)
		}
		r, before, err := openResume(name, cache)
		if err != nil {
			if left, _ := os.ReadFile(name); !bytes.Equal(left, file) {
				t.Fatalf("%q is refused, and %q left of it", file, left)
			}
			return
		}
		if len(before) > 0 && !bytes.HasPrefix(file, []byte(cache)) {
			t.Fatalf("of another cache it takes %d layers", len(before))
		}
		if err := r.note("sha256:new"); err != nil {
			t.Fatal(err)
		}
		r.close()
		r, after, err := openResume(name, cache)
		if err != nil {
			t.Fatal(err)
		}
		r.close()
		before["sha256:new"] = true
		for chain := range before {
			if !after[chain] {
				t.Fatalf("%q was proved and is not", chain)
			}
		}
	})
}
