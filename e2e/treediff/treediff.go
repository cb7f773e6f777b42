// Package treediff compares file trees byte for byte and in all their metadata:
// type, mode, owner, device number, symbolic link's target, modification time,
// extended attributes and which names are hard links to one file. How a file's
// zeros are stored is not compared.
package treediff

import (
	"archive/tar"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Tree is a tree's entries by path, slash-separated and relative to its root, which
// is ".". Entries that may differ can be deleted from it before it is compared.
type Tree map[string]Entry

// Entry is one name in a tree.
type Entry struct {
	Type     string // "file", "dir", "symlink", "char", "block", "fifo" or "socket"
	Mode     uint32 // permission bits with setuid, setgid and sticky
	UID, GID int
	Size     int64  // of a file
	Digest   string // sha256 of a file's contents, in hex
	Target   string // of a symbolic link
	Major    uint32 // of a device
	Minor    uint32
	ModTime  time.Time
	Xattrs   map[string]string
	// SameAs is the first name, in lexical order, of the file that this one is a
	// hard link to; empty for that name itself.
	SameAs string
}

// Dir reads the tree at root. It does not enter what is mounted below root.
func Dir(root string) (Tree, error) {
	tree := Tree{}
	type inode struct{ dev, ino uint64 }
	names := map[inode]string{}
	var top unix.Stat_t
	if err := unix.Stat(root, &top); err != nil {
		return nil, fmt.Errorf("reading tree %s: %w", root, err)
	}
	// A root that is a symbolic link, as /proc/PID/root, is meant to be followed.
	err := filepath.WalkDir(filepath.Clean(root)+"/.", func(file string, _ fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		name, err := filepath.Rel(root, file)
		if err != nil {
			return err
		}
		var st unix.Stat_t
		if err := unix.Lstat(file, &st); err != nil {
			return &fs.PathError{Op: "lstat", Path: file, Err: err}
		}
		e, err := entry(file, &st)
		if err != nil {
			return err
		}
		if e.Type != "dir" && st.Nlink > 1 {
			id := inode{uint64(st.Dev), st.Ino}
			if first, ok := names[id]; ok {
				e.SameAs = first
			} else {
				names[id] = name
			}
		}
		tree[name] = e
		// Only directories tell: overlayfs gives files the device of their layer.
		if e.Type == "dir" && st.Dev != top.Dev {
			return filepath.SkipDir
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("reading tree %s: %w", root, err)
	}
	return tree, nil
}

var types = map[uint32]string{
	unix.S_IFREG: "file", unix.S_IFDIR: "dir", unix.S_IFLNK: "symlink", unix.S_IFCHR: "char",
	unix.S_IFBLK: "block", unix.S_IFIFO: "fifo", unix.S_IFSOCK: "socket",
}

func entry(file string, st *unix.Stat_t) (Entry, error) {
	e := Entry{
		Type: types[st.Mode&unix.S_IFMT], Mode: st.Mode &^ unix.S_IFMT,
		UID: int(st.Uid), GID: int(st.Gid),
		ModTime: time.Unix(st.Mtim.Unix()).UTC(),
	}
	var err error
	switch e.Type {
	case "file":
		e.Size = st.Size
		var f *os.File
		if f, err = os.Open(file); err != nil {
			return e, err
		}
		defer f.Close()
		e.Digest, err = digest(f)
	case "symlink":
		e.Target, err = os.Readlink(file)
	case "char", "block":
		e.Major, e.Minor = unix.Major(uint64(st.Rdev)), unix.Minor(uint64(st.Rdev))
	}
	if err != nil {
		return e, err
	}
	e.Xattrs, err = xattrs(file)
	return e, err
}

func digest(r io.Reader) (string, error) {
	h := sha256.New()
	if _, err := io.Copy(h, r); err != nil {
		return "", err
	}
	return hex.EncodeToString(h.Sum(nil)), nil
}

func xattrs(file string) (map[string]string, error) {
	list := make([]byte, 64<<10) // the kernel's limit
	n, err := unix.Llistxattr(file, list)
	if errors.Is(err, unix.ENOTSUP) {
		return nil, nil
	}
	if err != nil {
		return nil, &fs.PathError{Op: "listxattr", Path: file, Err: err}
	}
	attrs := map[string]string{}
	value := make([]byte, 64<<10)
	for name := range strings.SplitSeq(strings.TrimRight(string(list[:n]), "\x00"), "\x00") {
		// overlayfs's own notes in an upper directory are no part of the tree.
		if name == "" || strings.HasPrefix(name, "trusted.overlay.") {
			continue
		}
		n, err := unix.Lgetxattr(file, name, value)
		if err != nil {
			return nil, &fs.PathError{Op: "getxattr " + name, Path: file, Err: err}
		}
		attrs[name] = string(value[:n])
	}
	if len(attrs) == 0 {
		return nil, nil
	}
	return attrs, nil
}

// Tar reads the tree in a tar stream. Whiteouts are entries like others.
func Tar(r io.Reader) (Tree, error) {
	tree := Tree{}
	links := map[string][]string{}
	for tr := tar.NewReader(r); ; {
		h, err := tr.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return nil, fmt.Errorf("reading tree from tar: %w", err)
		}
		name := path.Clean(strings.TrimLeft(h.Name, "/"))
		e := Entry{
			Mode: uint32(h.Mode) & 0o7777, UID: h.Uid, GID: h.Gid, ModTime: h.ModTime.UTC(),
		}
		switch h.Typeflag {
		case tar.TypeReg, tar.TypeGNUSparse:
			e.Type, e.Size = "file", h.Size
			if e.Digest, err = digest(tr); err != nil {
				return nil, fmt.Errorf("reading %q from tar: %w", name, err)
			}
		case tar.TypeLink:
			target := path.Clean(strings.TrimLeft(h.Linkname, "/"))
			links[target] = append(links[target], name)
			continue
		case tar.TypeDir:
			e.Type = "dir"
		case tar.TypeSymlink:
			e.Type, e.Target, e.Mode = "symlink", h.Linkname, 0o777
		case tar.TypeChar, tar.TypeBlock:
			e.Type = map[byte]string{tar.TypeChar: "char", tar.TypeBlock: "block"}[h.Typeflag]
			e.Major, e.Minor = uint32(h.Devmajor), uint32(h.Devminor)
		case tar.TypeFifo:
			e.Type = "fifo"
		default:
			return nil, fmt.Errorf("reading %q from tar: type %q is unknown", name, h.Typeflag)
		}
		for k, v := range h.PAXRecords {
			if attr, ok := strings.CutPrefix(k, "SCHILY.xattr."); ok {
				if e.Xattrs == nil {
					e.Xattrs = map[string]string{}
				}
				e.Xattrs[attr] = v
			}
		}
		tree[name] = e
	}
	for target, names := range links {
		e, ok := tree[target]
		if !ok {
			return nil, fmt.Errorf("reading %q from tar: it links to %q, which is not there", names[0], target)
		}
		names = slices.Sorted(slices.Values(append(names, target)))
		for i, name := range names {
			e.SameAs = ""
			if i > 0 {
				e.SameAs = names[0]
			}
			tree[name] = e
		}
	}
	return tree, nil
}

// Compare lists what differs, one line per name and field, in the order of names;
// nothing if the trees are the same.
func Compare(want, got Tree) []string {
	names := maps.Clone(want)
	maps.Copy(names, got)
	var diffs []string
	for _, name := range slices.Sorted(maps.Keys(names)) {
		w, inWant := want[name]
		g, inGot := got[name]
		switch {
		case !inGot:
			diffs = append(diffs, fmt.Sprintf("%q: missing", name))
		case !inWant:
			diffs = append(diffs, fmt.Sprintf("%q: not wanted, a %s", name, g.Type))
		default:
			diffs = append(diffs, compare(name, w, g)...)
		}
	}
	return diffs
}

func compare(name string, want, got Entry) []string {
	var diffs []string
	differ := func(field string, want, got any) {
		if want != got {
			diffs = append(diffs, fmt.Sprintf("%q: %s is %v, want %v", name, field, got, want))
		}
	}
	if want.Type != got.Type {
		differ("type", want.Type, got.Type)
		return diffs
	}
	differ("mode", fmt.Sprintf("%#o", want.Mode), fmt.Sprintf("%#o", got.Mode))
	differ("owner", fmt.Sprint(want.UID, ":", want.GID), fmt.Sprint(got.UID, ":", got.GID))
	differ("size", want.Size, got.Size)
	differ("sha256", want.Digest, got.Digest)
	differ("target", fmt.Sprintf("%q", want.Target), fmt.Sprintf("%q", got.Target))
	differ("device", fmt.Sprint(want.Major, ":", want.Minor), fmt.Sprint(got.Major, ":", got.Minor))
	if !want.ModTime.Equal(got.ModTime) {
		differ("modification time", want.ModTime, got.ModTime)
	}
	differ("first hard link", fmt.Sprintf("%q", want.SameAs), fmt.Sprintf("%q", got.SameAs))
	attrs := maps.Clone(want.Xattrs)
	if attrs == nil {
		attrs = map[string]string{}
	}
	maps.Copy(attrs, got.Xattrs)
	for _, a := range slices.Sorted(maps.Keys(attrs)) {
		differ("xattr "+a, fmt.Sprintf("%q", want.Xattrs[a]), fmt.Sprintf("%q", got.Xattrs[a]))
	}
	return diffs
}
