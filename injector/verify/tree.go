package verify

import (
	"archive/tar"
	"fmt"
	"path"
	"sort"
	"strings"

	"golang.org/x/sys/unix"
)

// Whiteouts in a layer's tar stream, as the OCI image spec names them.
const (
	whiteoutPrefix = ".wh."
	whiteoutOpaque = ".wh..wh..opq"
)

// tree is what a layer's tar stream leaves behind once unpacked, by path.
type tree map[string]*node

// node is one path: an entry of the stream, a whiteout, or a directory that is only
// there because something is below it.
type node struct {
	hdr      *tar.Header // nil for the others
	whiteout bool
	opaque   bool
	linked   *node    // what a hard link was made to
	below    []string // what was made in it, and may be gone
	seen     bool     // on the disk
}

// maxPath is more than the kernel takes for a path or a link, in bytes (PATH_MAX).
const maxPath = unix.PathMax

// add unpacks one entry as Docker does: a later one replaces an earlier one, but a
// directory keeps what is in it when another directory comes over it. It gives how many
// paths it has made.
func (t tree) add(hdr *tar.Header) (made int, err error) {
	if hdr.Typeflag == tar.TypeXGlobalHeader {
		return 0, nil
	}
	if len(hdr.Name) >= maxPath || len(hdr.Linkname) >= maxPath {
		return 0, fmt.Errorf("%.100q: its name, or what it links to, is too long to be unpacked", hdr.Name)
	}
	name := t.resolve(clean(hdr.Name))
	if len(name) >= maxPath {
		return 0, fmt.Errorf("%.100q: where its name leads is too long to be unpacked", hdr.Name)
	}
	dir, base := path.Split(name)
	dir = path.Clean(dir)
	made = t.parents(name)
	if base == whiteoutOpaque {
		t[dir].opaque = true
		return made, nil
	}
	if hidden, ok := strings.CutPrefix(base, whiteoutPrefix); ok {
		name = path.Join(dir, hidden)
		t.remove(name)
		t.put(name, &node{whiteout: true})
		return made + 1, nil
	}
	if old := t[name]; old != nil && old.dir() && hdr.Typeflag == tar.TypeDir {
		old.hdr = hdr
		return made, nil
	}
	n := &node{hdr: hdr}
	if hdr.Typeflag == tar.TypeLink {
		n.linked = t[t.resolve(clean(hdr.Linkname))]
	}
	t.remove(name)
	t.put(name, n)
	return made + 1, nil
}

// put has n at name, whose directory is there.
func (t tree) put(name string, n *node) {
	t[name] = n
	if name != "." {
		dir := t[path.Dir(name)]
		dir.below = append(dir.below, name)
	}
}

func (n *node) dir() bool {
	return !n.whiteout && (n.hdr == nil || n.hdr.Typeflag == tar.TypeDir)
}

// parents makes the directories above name that the stream does not have, and gives how
// many. What is above a directory is one.
func (t tree) parents(name string) (made int) {
	if name == "." {
		return 0
	}
	dir := path.Dir(name)
	if n := t[dir]; n != nil && n.dir() {
		return 0
	}
	made = t.parents(dir)
	t.put(dir, &node{})
	return made + 1
}

func (t tree) remove(name string) {
	old := t[name]
	delete(t, name)
	if old == nil {
		return
	}
	for _, below := range old.below {
		t.remove(below)
	}
}

// resolve follows symbolic links of the same layer in all but the last element, as
// unpacking does.
func (t tree) resolve(name string) string {
	for range 40 {
		next := t.resolveOnce(name)
		if next == name || len(name) >= maxPath {
			break
		}
		name = next
	}
	return name
}

func (t tree) resolveOnce(name string) string {
	var ends []int // of the directories above
	for i := range len(name) {
		if name[i] == '/' {
			ends = append(ends, i)
		}
	}
	// What is above a path that is there is a directory, so only the last can be a link.
	there := sort.Search(len(ends), func(i int) bool { return t[name[:ends[i]]] == nil })
	if there == 0 {
		return name
	}
	end := ends[there-1]
	n := t[name[:end]]
	if n.hdr == nil || n.hdr.Typeflag != tar.TypeSymlink {
		return name
	}
	target := n.hdr.Linkname
	if !path.IsAbs(target) {
		target = path.Join(path.Dir(name[:end]), target)
	}
	return clean(target + name[end:])
}
