package images

import (
	"archive/tar"
	"bytes"
	"fmt"
	"io"
	"os"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/compression"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// made is every file's time, with the fraction of a second that PAX headers keep.
var made = time.Date(2024, 2, 29, 12, 34, 56, 789012345, time.UTC)

// file is one entry of a layer. Its header needs a name only: it is then a file of
// mode 0644, or a directory of mode 0755 if the name ends in a slash.
type file struct {
	tar.Header
	body []byte
}

func text(name, body string) file {
	return file{tar.Header{Name: name}, []byte(body)}
}

func dir(name string) file { return file{tar.Header{Name: name + "/"}, nil} }

// layer is a tar stream of files.
func layer(files ...file) ([]byte, error) {
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, f := range files {
		h := f.Header
		h.Format, h.ModTime, h.Size = tar.FormatPAX, made, int64(len(f.body))
		if h.Mode == 0 {
			h.Mode = 0o644
			if h.Name[len(h.Name)-1] == '/' {
				h.Mode = 0o755
			}
		}
		if err := w.WriteHeader(&h); err != nil {
			return nil, fmt.Errorf("writing layer: %q: %w", h.Name, err)
		}
		if _, err := w.Write(f.body); err != nil {
			return nil, fmt.Errorf("writing layer: %q: %w", h.Name, err)
		}
	}
	if err := w.Close(); err != nil {
		return nil, fmt.Errorf("writing layer: %w", err)
	}
	return buf.Bytes(), nil
}

// compress makes a layer of a media type of a tar stream.
func compress(stream []byte, mediaType types.MediaType) (v1.Layer, error) {
	// Its digest is asked for before it is pushed, to one registry or several.
	options := []tarball.LayerOption{tarball.WithMediaType(mediaType), tarball.WithCompressedCaching}
	if mediaType == types.OCILayerZStd {
		options = append(options, tarball.WithCompression(compression.ZStd))
	}
	return tarball.LayerFromOpener(func() (io.ReadCloser, error) {
		return io.NopCloser(bytes.NewReader(stream)), nil
	}, options...)
}

// baseLayer has what a container needs to run: busybox, under its usual names.
func baseLayer(busybox string) ([]byte, error) {
	program, err := os.ReadFile(busybox)
	if err != nil {
		return nil, fmt.Errorf("reading busybox: %w", err)
	}
	files := []file{
		dir("bin"), dir("etc"), dir("dev"), dir("proc"), dir("sys"), dir("root"),
		{tar.Header{Name: "tmp/", Mode: 0o1777}, nil},
		{tar.Header{Name: "bin/busybox", Mode: 0o755}, program},
		text("etc/passwd", "root:x:0:0:root:/root:/bin/sh\n"),
		text("etc/group", "root:x:0:\n"),
	}
	for _, applet := range []string{"cat", "echo", "env", "id", "ls", "mkdir", "rm", "sh", "sleep", "stat", "tar", "touch", "true"} {
		files = append(files, file{tar.Header{Name: "bin/" + applet, Typeflag: tar.TypeSymlink, Linkname: "busybox", Mode: 0o777}, nil})
	}
	return layer(files...)
}

// capNetBindService is a security.capability attribute, version 2 and effective, of
// the one capability, number 10.
const capNetBindService = "\x01\x00\x00\x02\x00\x04\x00\x00" + "\x00\x00\x00\x00" + "\x00\x00\x00\x00\x00\x00\x00\x00"

// oddLayers hold every kind of file that tools that copy layers get wrong: the
// first makes them, the second hides and replaces some.
func oddLayers() ([][]byte, error) {
	zeros := make([]byte, 4<<20)
	copy(zeros[2<<20:], "in the middle of nothing")
	long := "long/" + string(bytes.Repeat([]byte("n"), 200))

	lower, err := layer(
		dir("odd"),
		text("odd/first", "one file of three names"),
		file{tar.Header{Name: "odd/second", Typeflag: tar.TypeLink, Linkname: "odd/first"}, nil},
		dir("odd/sub"),
		file{tar.Header{Name: "odd/sub/third", Typeflag: tar.TypeLink, Linkname: "odd/first"}, nil},
		file{tar.Header{Name: "odd/setuid", Mode: 0o4755}, []byte("setuid")},
		file{tar.Header{Name: "odd/setgid/", Mode: 0o2775, Gid: 50}, nil},
		file{tar.Header{Name: "odd/sticky/", Mode: 0o1777}, nil},
		file{tar.Header{Name: "odd/owned", Uid: 1000, Gid: 60000}, []byte("owned")},
		file{tar.Header{Name: "odd/unreadable", Mode: 0o1000}, []byte("sticky file without permissions")},
		file{tar.Header{Name: "odd/capable", Mode: 0o755,
			PAXRecords: map[string]string{"SCHILY.xattr.security.capability": capNetBindService}}, []byte("capable")},
		file{tar.Header{Name: "odd/xattr",
			PAXRecords: map[string]string{"SCHILY.xattr.user.e2e": "a value\nof two lines"}}, []byte("xattr")},
		// More than an inode of ext4 has room for.
		file{tar.Header{Name: "odd/attributes",
			PAXRecords: map[string]string{"SCHILY.xattr.user.e2e": strings.Repeat("attribute ", 100)}}, []byte("attributes")},
		file{tar.Header{Name: "odd/char", Typeflag: tar.TypeChar, Devmajor: 1, Devminor: 3, Mode: 0o666}, nil},
		file{tar.Header{Name: "odd/block", Typeflag: tar.TypeBlock, Devmajor: 7, Devminor: 200, Mode: 0o660}, nil},
		file{tar.Header{Name: "odd/fifo", Typeflag: tar.TypeFifo}, nil},
		file{tar.Header{Name: "odd/sparse"}, zeros},
		text("odd/latin-\xe9\xff", "not UTF-8"),
		text("odd/unicode-é-\u4e16", "UTF-8"),
		text("odd/line\nbreak", "a name of two lines"),
		text("odd/ space ", "a name with spaces"),
		text("odd/back\\slash", "no separator here"),
		dir("odd/long"),
		text("odd/"+long, "a long name"),
		text("odd/empty", ""),
		file{tar.Header{Name: "odd/dangling", Typeflag: tar.TypeSymlink, Linkname: "/no/such/file", Mode: 0o777}, nil},
		file{tar.Header{Name: "odd/upward", Typeflag: tar.TypeSymlink, Linkname: "../../../../etc/passwd", Mode: 0o777}, nil},

		dir("gone"), text("gone/file", "hidden with its directory"),
		dir("opaque"), text("opaque/below", "hidden by an opaque directory"),
		dir("opaque/sub"), text("opaque/sub/below", "hidden as well"),
		dir("kept"), text("kept/hidden", "hidden by a whiteout"), text("kept/below", "kept"),
		text("kept/replaced", "a file that becomes a directory"),
		dir("kept/flattened"), text("kept/flattened/file", "in a directory that becomes a file"),
		text("kept/mode", "a file whose mode changes"),
		dir("kept/target"),
		file{tar.Header{Name: "kept/symlink", Typeflag: tar.TypeSymlink, Linkname: "target", Mode: 0o777}, nil},
	)
	if err != nil {
		return nil, err
	}
	upper, err := layer(
		text(".wh.gone", ""),
		dir("opaque"), text("opaque/.wh..wh..opq", ""), text("opaque/above", "alone here"),
		dir("kept"), text("kept/.wh.hidden", ""),
		dir("kept/replaced"), text("kept/replaced/file", "in the new directory"),
		text("kept/flattened", "a file now"),
		file{tar.Header{Name: "kept/mode", Mode: 0o600}, []byte("a file whose mode changes")},
		dir("kept/symlink"), text("kept/symlink/file", "in a directory that was a symbolic link"),
	)
	return [][]byte{lower, upper}, err
}
