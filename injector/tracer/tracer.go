// Package tracer records which parts of an image's files are read while a container of
// it starts: it empties the page cache of the image's files, and looks again and again at
// what is in there. overlayfs reads a layer's files through their own page cache, so that
// this sees what containers read, also through mmap, whatever runtime started them.
//
// It needs root. The little that the kernel reads ahead by itself is in the trace as well; what
// someone else reads of the same files meanwhile, too.
package tracer

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"golang.org/x/sys/unix"

	"github.com/selkies-project/packer-plugin-selkies/injector/cachedisk"
	"github.com/selkies-project/packer-plugin-selkies/manifest"
	"github.com/selkies-project/packer-plugin-selkies/trace"
)

// pause is the least between two looks. It is longer where a look takes longer, so that
// half a processor is left alone at least.
const pause = 50 * time.Millisecond

// Tracer knows all files of an image.
type Tracer struct {
	disk  *cachedisk.Disk
	image manifest.Image
	files []*file
	// seen is what came into the page cache, in order.
	seen []trace.Range
}

// file is one that may be read.
type file struct {
	name string // absolute
	at   trace.File
	size int64
	// pages says which were in the page cache at the last look, nil for none; count is
	// how many.
	pages []byte
	count uint64
}

// New looks up the files of an image of the disk.
func New(d *cachedisk.Disk, img manifest.Image) (*Tracer, error) {
	t := &Tracer{disk: d, image: img}
	root, err := cachedisk.OpenRoot(d.Dir)
	if err != nil {
		return nil, err
	}
	defer root.Close()
	chain, err := img.ChainIDs()
	if err != nil {
		return nil, err
	}
	inodes := map[uint64]bool{}
	for n, id := range chain {
		i := slices.IndexFunc(d.Manifest.Layers, func(l manifest.Layer) bool { return l.ChainID == id })
		if err := t.addLayer(root, d.Manifest.Layers[i], n, inodes); err != nil {
			return nil, fmt.Errorf("looking up the image's files: %w", err)
		}
	}
	return t, nil
}

// addLayer adds the regular files of a layer, those with several names once.
func (t *Tracer) addLayer(root *cachedisk.Root, l manifest.Layer, layer int, inodes map[uint64]bool) error {
	sub, err := root.Sub(t.disk.Manifest.LayerPath(l))
	if err != nil {
		return err
	}
	defer sub.Close()
	dir := t.disk.LayerDir(l)
	return filepath.WalkDir(dir, func(name string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		rel, err := filepath.Rel(dir, name)
		if err != nil {
			return err
		}
		if manifest.ValidPath(rel) != nil {
			return nil // a trace cannot name it
		}
		// As a node will open it.
		f, err := sub.Open(rel)
		if err != nil {
			return err
		}
		defer f.Close()
		var st unix.Stat_t
		if err := unix.Fstat(int(f.Fd()), &st); err != nil {
			return err
		}
		if st.Size > 0 && !inodes[st.Ino] {
			inodes[st.Ino] = true
			t.files = append(t.files, &file{name: name, at: trace.File{Layer: layer, Path: rel}, size: st.Size})
		}
		return nil
	})
}

// Cold empties the page cache of the image's files.
func (t *Tracer) Cold() error {
	// What was not written yet would stay.
	dir, err := os.Open(t.disk.Dir)
	if err != nil {
		return err
	}
	defer dir.Close()
	if err := unix.Syncfs(int(dir.Fd())); err != nil {
		return fmt.Errorf("flushing %s: %w", t.disk.Dir, err)
	}
	for _, f := range t.files {
		err := f.open(func(fd int) error { return unix.Fadvise(fd, 0, 0, unix.FADV_DONTNEED) })
		if err != nil {
			return fmt.Errorf("emptying the page cache of %s: %w", f.name, err)
		}
	}
	return nil
}

// Record looks at what comes into the page cache until stop is closed, and once more.
func (t *Tracer) Record(stop <-chan struct{}) error {
	for ended := false; !ended; {
		began := time.Now()
		select {
		case <-stop:
			ended = true
		default:
		}
		for i, f := range t.files {
			fresh, err := f.look()
			if err != nil {
				return fmt.Errorf("looking at the page cache of %s: %w", f.name, err)
			}
			for _, r := range fresh {
				r.File = i
				t.seen = append(t.seen, r)
			}
		}
		if ended {
			break
		}
		select {
		case <-stop:
		case <-time.After(max(pause, time.Since(began))):
		}
	}
	return nil
}
