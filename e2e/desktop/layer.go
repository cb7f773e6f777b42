package desktop

import (
	"archive/tar"
	"bufio"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/klauspost/compress/gzip"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// blob describes a layer whose compressed form lies in the registry's directory.
type blob struct {
	Blob     digest.Digest `json:"digest"`
	Diff     digest.Digest `json:"diffID"`
	Packed   int64         `json:"packed"`   // bytes of the blob
	Unpacked int64         `json:"unpacked"` // bytes of the tar stream in it
}

func (b blob) path(dir string) string {
	return filepath.Join(dir, b.Blob.Algorithm().String(), b.Blob.Encoded())
}

// writeBlob packs the tree at dir, which may be the upper directory of an overlay,
// into a layer blob below blobs.
func writeBlob(dir, blobs string) (b blob, err error) {
	if err := os.MkdirAll(filepath.Join(blobs, digest.Canonical.String()), 0o755); err != nil {
		return b, err
	}
	out, err := os.CreateTemp(blobs, "layer-*")
	if err != nil {
		return b, err
	}
	defer func() {
		if err != nil {
			out.Close()
			os.Remove(out.Name())
		}
	}()
	compressed, plain := digest.Canonical.Digester(), digest.Canonical.Digester()
	file := &countingWriter{w: io.MultiWriter(out, compressed.Hash())}
	zip, err := gzip.NewWriterLevel(file, gzip.BestSpeed)
	if err != nil {
		return b, err
	}
	stream := &countingWriter{w: io.MultiWriter(zip, plain.Hash())}
	buffered := bufio.NewWriterSize(stream, 1<<20)
	if err := writeTar(buffered, dir); err != nil {
		return b, fmt.Errorf("packing %s: %w", dir, err)
	}
	if err := errors.Join(buffered.Flush(), zip.Close(), out.Chmod(0o644), out.Close()); err != nil {
		return b, fmt.Errorf("packing %s: %w", dir, err)
	}
	b = blob{compressed.Digest(), plain.Digest(), file.n, stream.n}
	return b, os.Rename(out.Name(), b.path(blobs))
}

type countingWriter struct {
	w io.Writer
	n int64
}

func (c *countingWriter) Write(p []byte) (int, error) {
	n, err := c.w.Write(p)
	c.n += int64(n)
	return n, err
}

// writeTar writes the tree at dir as an OCI layer, overlayfs's whiteouts and opaque
// directories in the form that the OCI image spec has for them.
func writeTar(w io.Writer, dir string) error {
	tw := tar.NewWriter(w)
	type inode struct{ dev, ino uint64 }
	links := map[inode]string{}
	err := filepath.WalkDir(dir, func(file string, d fs.DirEntry, err error) error {
		if err != nil || file == dir {
			return err
		}
		name, err := filepath.Rel(dir, file)
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(file, &st); err != nil {
			return &fs.PathError{Op: "lstat", Path: file, Err: err}
		}
		if st.Mode&unix.S_IFMT == unix.S_IFSOCK {
			return nil // a layer has none
		}
		if st.Mode&unix.S_IFMT == unix.S_IFCHR && st.Rdev == 0 {
			return tw.WriteHeader(&tar.Header{Name: filepath.Join(filepath.Dir(name), ".wh."+filepath.Base(name))})
		}
		h, opaque, err := header(file, name, d)
		if err != nil {
			return err
		}
		if !d.IsDir() && st.Nlink > 1 {
			id := inode{uint64(st.Dev), st.Ino}
			if first, ok := links[id]; ok {
				h.Typeflag, h.Linkname, h.Size = tar.TypeLink, first, 0
			} else {
				links[id] = name
			}
		}
		if err := tw.WriteHeader(h); err != nil {
			return err
		}
		if opaque {
			return tw.WriteHeader(&tar.Header{Name: name + "/.wh..wh..opq"})
		}
		if h.Typeflag != tar.TypeReg {
			return nil
		}
		f, err := os.Open(file)
		if err != nil {
			return err
		}
		defer f.Close()
		_, err = io.Copy(tw, f)
		return err
	})
	return errors.Join(err, tw.Close())
}

func header(file, name string, d fs.DirEntry) (h *tar.Header, opaque bool, err error) {
	fi, err := d.Info()
	if err != nil {
		return nil, false, err
	}
	target := ""
	if fi.Mode()&fs.ModeSymlink != 0 {
		if target, err = os.Readlink(file); err != nil {
			return nil, false, err
		}
	}
	if h, err = tar.FileInfoHeader(fi, target); err != nil {
		return nil, false, err
	}
	h.Name, h.Uname, h.Gname, h.Format = name, "", "", tar.FormatPAX
	if d.IsDir() {
		h.Name += "/"
	}
	value := make([]byte, 1024)
	for attr, prefix := range map[string]string{"security.capability": "SCHILY.xattr.", "trusted.overlay.opaque": ""} {
		n, err := unix.Lgetxattr(file, attr, value)
		switch {
		case errors.Is(err, unix.ENODATA) || errors.Is(err, unix.ENOTSUP):
		case err != nil:
			return nil, false, &fs.PathError{Op: "getxattr " + attr, Path: file, Err: err}
		case prefix == "":
			opaque = strings.HasPrefix(string(value[:n]), "y")
		default:
			h.PAXRecords = map[string]string{prefix + attr: string(value[:n])}
		}
	}
	return h, opaque, nil
}

// layer makes a v1.Layer of a blob below dir.
type layer struct {
	blob
	dir string
}

var _ v1.Layer = layer{}

func (l layer) Digest() (v1.Hash, error)            { return v1.NewHash(l.Blob.String()) }
func (l layer) DiffID() (v1.Hash, error)            { return v1.NewHash(l.Diff.String()) }
func (l layer) Size() (int64, error)                { return l.Packed, nil }
func (l layer) MediaType() (types.MediaType, error) { return types.OCILayer, nil }
func (l layer) Compressed() (io.ReadCloser, error)  { return os.Open(l.path(l.dir)) }
func (l layer) Uncompressed() (io.ReadCloser, error) {
	f, err := os.Open(l.path(l.dir))
	if err != nil {
		return nil, err
	}
	zip, err := gzip.NewReader(f)
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return struct {
		io.Reader
		io.Closer
	}{zip, f}, nil
}
