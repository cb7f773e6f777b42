package verify

import (
	"archive/tar"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Overlayfs' attributes. It writes the harmless ones of its own accord where a
// layer was made by writing through a mount.
const (
	overlayPrefix = "trusted.overlay."
	overlayOpaque = "trusted.overlay.opaque"
)

var overlayHarmless = []string{"origin", "impure", "nlink", "upper", "uuid"}

// maxStrangers is how many paths that are not in the layer end the comparison: the disk
// may have any number of them.
const maxStrangers = 1000

// compare walks the layer's directory, following no symbolic link, and says what
// differs from the tree, a line for each path. It calls read for each that it has read.
func (t tree) compare(dir string, read func() error) ([]string, error) {
	var problems []string
	strangers := 0
	// Entries that are hard links have one set of attributes between them, those of
	// whichever came last.
	files, linked := map[string]*file{}, map[uint64][]string{}
	err := walk(dir, func(name string, f *file) error {
		if err := read(); err != nil {
			return err
		}
		n := t[name]
		switch {
		case n == nil && name == ".":
		case n == nil:
			problems = append(problems, fmt.Sprintf("%q is not in the layer", name))
			if strangers++; strangers == maxStrangers {
				return errStrangers
			}
		case f.st.Nlink > 1 && n.hdr != nil && n.hdr.Typeflag != tar.TypeDir:
			n.seen = true
			files[name], linked[f.st.Ino] = f, append(linked[f.st.Ino], name)
		default:
			n.seen = true
			problems = append(problems, t.problem(name, n.compare(f), f, files)...)
		}
		return nil
	})
	if errors.Is(err, errStrangers) {
		return problems, nil
	}
	if err != nil {
		return problems, err
	}
	for _, names := range linked {
		for i, diffs := range t.compareLinked(files, names) {
			problems = append(problems, t.problem(names[i], diffs, files[names[i]], files)...)
		}
	}
	for name, n := range t {
		if !n.seen {
			problems = append(problems, fmt.Sprintf("%q is missing", name))
		}
	}
	slices.Sort(problems)
	return problems, nil
}

var errStrangers = errors.New("too many paths that are not in the layer")

// problem is what is said of a path that differs, and of a hard link that is none; files
// are those with several links.
func (t tree) problem(name string, diffs []string, f *file, files map[string]*file) []string {
	n := t[name]
	if target := t.linkTarget(n); target != "" && (files[target] == nil || files[target].st.Ino != f.st.Ino) {
		diffs = append(diffs, fmt.Sprintf("is no hard link to %q", n.hdr.Linkname))
	}
	if len(diffs) == 0 {
		return nil
	}
	return []string{fmt.Sprintf("%q %s", name, strings.Join(diffs, ", "))}
}

// linkTarget is what a hard link leads to, "" if n is none or a later entry took the
// target's place.
func (t tree) linkTarget(n *node) string {
	if n.linked == nil {
		return ""
	}
	if target := t.resolve(clean(n.hdr.Linkname)); t[target] == n.linked {
		return target
	}
	return ""
}

// compareLinked says how each of the names of one file differs. The attributes of any of
// them are accepted.
func (t tree) compareLinked(files map[string]*file, names []string) [][]string {
	diffs := make([][]string, len(names))
	for i, name := range names {
		other := *t[name]
		if other.hdr.Typeflag == tar.TypeLink && len(names) > 1 {
			// The type and the contents' size are those of the file linked to.
			hdr := *other.hdr
			if target := other.linked; target != nil && target.hdr != nil {
				hdr.Typeflag, hdr.Size, hdr.Linkname = target.hdr.Typeflag, target.hdr.Size, target.hdr.Linkname
				hdr.Devmajor, hdr.Devminor = target.hdr.Devmajor, target.hdr.Devminor
				if len(xattrs(&hdr)) == 0 {
					hdr.PAXRecords = target.hdr.PAXRecords
				}
			}
			other.hdr = &hdr
		}
		if diffs[i] = other.compare(files[name]); len(diffs[i]) == 0 {
			return make([][]string, len(names))
		}
	}
	return diffs
}

// compare says how a path on the disk differs.
func (n *node) compare(f *file) []string {
	var diffs []string
	differ := func(format string, a ...any) { diffs = append(diffs, fmt.Sprintf(format, a...)) }
	kind := f.st.Mode & unix.S_IFMT
	if n.whiteout {
		if kind != unix.S_IFCHR || f.st.Rdev != 0 {
			differ("is no whiteout")
		}
		return diffs
	}
	if opaque := f.xattrs[overlayOpaque] == "y"; n.dir() && opaque != n.opaque {
		differ("is opaque: %t, not %t", opaque, n.opaque)
	}
	if n.hdr == nil {
		if kind != unix.S_IFDIR {
			differ("is no directory")
		}
		return append(diffs, n.compareXattrs(f, kind)...)
	}
	h := n.hdr
	if want, ok := kinds[h.Typeflag]; h.Typeflag != tar.TypeLink && (!ok || kind != want) {
		differ("is of another type")
		return diffs
	}
	switch kind {
	case unix.S_IFREG:
		if h.Typeflag != tar.TypeLink && f.st.Size != h.Size {
			differ("has %d bytes, not %d", f.st.Size, h.Size)
		}
	case unix.S_IFLNK:
		if f.link != h.Linkname {
			differ("points to %q, not %q", f.link, h.Linkname)
		}
	case unix.S_IFCHR, unix.S_IFBLK:
		if want := unix.Mkdev(uint32(h.Devmajor), uint32(h.Devminor)); f.st.Rdev != want {
			differ("is device %d:%d, not %d:%d", unix.Major(f.st.Rdev), unix.Minor(f.st.Rdev), h.Devmajor, h.Devminor)
		}
	}
	if kind != unix.S_IFLNK {
		if got, want := f.st.Mode&0o7777, uint32(h.Mode)&0o7777; got != want {
			differ("has mode %04o, not %04o", got, want)
		}
	}
	if int(f.st.Uid) != h.Uid || int(f.st.Gid) != h.Gid {
		differ("belongs to %d:%d, not %d:%d", f.st.Uid, f.st.Gid, h.Uid, h.Gid)
	}
	if got, want := time.Unix(f.st.Mtim.Unix()), bound(h.ModTime); got.Unix() != want.Unix() ||
		want.Nanosecond() != 0 && got.Nanosecond() != want.Nanosecond() {
		differ("was changed at %s, not %s", got.UTC().Format(time.RFC3339Nano), want.UTC().Format(time.RFC3339Nano))
	}
	return append(diffs, n.compareXattrs(f, kind)...)
}

var kinds = map[byte]uint32{
	tar.TypeReg: unix.S_IFREG, tar.TypeGNUSparse: unix.S_IFREG,
	tar.TypeDir: unix.S_IFDIR, tar.TypeSymlink: unix.S_IFLNK, tar.TypeFifo: unix.S_IFIFO,
	tar.TypeChar: unix.S_IFCHR, tar.TypeBlock: unix.S_IFBLK,
}

// bound is a time as Docker sets it: none before 1970.
func bound(t time.Time) time.Time {
	if t.Before(time.Unix(0, 0)) {
		return time.Unix(0, 0)
	}
	return t
}

func (n *node) compareXattrs(f *file, kind uint32) []string {
	var diffs []string
	var want map[string]string
	if n.hdr != nil {
		want = xattrs(n.hdr)
	}
	for name, value := range want {
		got, ok := f.xattrs[name]
		// The kernel takes user attributes on files and directories only; Docker goes on.
		if !ok && strings.HasPrefix(name, "user.") && kind != unix.S_IFREG && kind != unix.S_IFDIR {
			continue
		}
		if !ok || got != value {
			diffs = append(diffs, fmt.Sprintf("has %s=%q, not %q", name, got, value))
		}
	}
	for name := range f.xattrs {
		if _, ok := want[name]; ok {
			continue
		}
		// Another value than that of an opaque directory has another meaning to overlayfs.
		if name == overlayOpaque && f.xattrs[name] == "y" {
			continue
		}
		if own, ok := strings.CutPrefix(name, overlayPrefix); ok && slices.Contains(overlayHarmless, own) {
			continue
		}
		// The build machine's policy labels every file.
		if name == "security.selinux" {
			continue
		}
		diffs = append(diffs, fmt.Sprintf("has %s, which is not in the layer", name))
	}
	slices.Sort(diffs)
	return diffs
}

func xattrs(hdr *tar.Header) map[string]string {
	attrs := map[string]string{}
	for k, v := range hdr.PAXRecords {
		if name, ok := strings.CutPrefix(k, "SCHILY.xattr."); ok {
			attrs[name] = v
		}
	}
	return attrs
}
