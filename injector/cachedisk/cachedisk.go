// Package cachedisk finds cache disks on a node, checks them against their layer
// manifest, and mounts them at a stable path, read-only.
package cachedisk

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
	"slices"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/selkies-project/packer-plugin-selkies/manifest"
)

// DefaultParents are the directories whose sub-directories are searched for
// cache disks, besides /cache itself: where GKE mounts secondary boot disks.
var DefaultParents = []string{"/mnt/disks/gke-secondary-disks"}

// DefaultDir is where the DaemonSet mounts the cache disk's volume claim.
const DefaultDir = "/cache"

// ErrAbsent is that of a directory without a layer manifest.
var ErrAbsent = errors.New("no cache disk")

// Disk is a cache disk whose layer manifest has been read and validated.
type Disk struct {
	// Dir is the disk's root as this process sees it.
	Dir      string
	ID       digest.Digest
	Manifest *manifest.Manifest
}

// Find opens the cache disks in dirs or, without any, every directory below
// DefaultParents, and DefaultDir, that holds a layer manifest. Default paths are
// looked up below hostRoot as well as in the process's own root. One broken disk
// does not hide another: disks may come together with an error.
func Find(dirs []string, hostRoot string) ([]*Disk, error) {
	// A disk that is reachable by two paths is one disk, and so are two that are alike.
	return find(dirs, hostRoot, func(a, b *Disk) bool { return a.ID == b.ID })
}

// FindAll is Find for those who prove what is on a disk: two that claim to be alike are two.
func FindAll(dirs []string, hostRoot string) ([]*Disk, error) {
	return find(dirs, hostRoot, func(a, b *Disk) bool {
		var x, y unix.Stat_t
		return a.ID == b.ID && unix.Stat(a.Dir, &x) == nil && unix.Stat(b.Dir, &y) == nil && x.Dev == y.Dev && x.Ino == y.Ino
	})
}

func find(dirs []string, hostRoot string, same func(a, b *Disk) bool) ([]*Disk, error) {
	if len(dirs) == 0 {
		dirs = defaults(hostRoot)
		if len(dirs) == 0 {
			return nil, fmt.Errorf("%w: no %s below %s or a directory of %s; name the disk's directory with --cache",
				ErrAbsent, manifest.Path, DefaultDir, DefaultParents[0])
		}
	}
	var disks []*Disk
	var errs []error
	for _, dir := range dirs {
		d, err := Open(dir)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		if !slices.ContainsFunc(disks, func(o *Disk) bool { return same(o, d) }) {
			disks = append(disks, d)
		}
	}
	return disks, errors.Join(errs...)
}

func defaults(hostRoot string) []string {
	roots := []string{"/"}
	if filepath.Clean(hostRoot) != "/" {
		roots = append(roots, hostRoot)
	}
	var dirs []string
	for _, root := range roots {
		candidates := []string{filepath.Join(root, DefaultDir)}
		for _, parent := range DefaultParents {
			below, _ := filepath.Glob(filepath.Join(root, parent, "*"))
			candidates = append(candidates, below...)
		}
		for _, dir := range candidates {
			if hasManifest(dir) {
				dirs = append(dirs, dir)
			}
		}
	}
	return dirs
}

// hasManifest says if there is anything in the layer manifest's place.
func hasManifest(dir string) bool {
	root, err := OpenRoot(dir)
	if err != nil {
		return false
	}
	defer root.Close()
	_, err = root.CheckFile(manifest.Path)
	return !errors.Is(err, unix.ENOENT) && !errors.Is(err, unix.ENOTDIR)
}

// Open reads the layer manifest of the cache disk at dir and checks that the disk
// has every layer that the manifest names.
func Open(dir string) (*Disk, error) {
	abs, err := filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("finding cache disk %s: %w", dir, err)
	}
	if err := Probe(abs); errors.Is(err, fs.ErrNotExist) {
		return nil, fmt.Errorf("%w: no layer manifest at %s: mount the cache disk there, or build one with the selkies-image-cache provisioner",
			ErrAbsent, filepath.Join(abs, manifest.Path))
	} else if err != nil {
		return nil, remedy(err)
	}
	m, id, err := manifest.ReadWithID(abs)
	if err = unreadable(err); errors.Is(err, ErrUnreadable) {
		return nil, remedy(err)
	} else if err != nil {
		return nil, err // with a remedy of its own
	}
	d := &Disk{Dir: abs, ID: id, Manifest: m}
	if err := d.check(); err != nil {
		return nil, remedy(unreadable(err))
	}
	return d, nil
}

// Lost says that the disk's device cannot be read any more, nil if it can.
func (d *Disk) Lost() error {
	if err := Probe(d.Dir); errors.Is(err, ErrUnreadable) {
		return remedy(err)
	}
	return nil
}

// remedy adds to an error of reading the disk what to do about it.
func remedy(err error) error {
	switch {
	case errors.Is(err, fs.ErrPermission):
		return fmt.Errorf("%w; run as root", err)
	case errors.Is(err, ErrUnreadable):
		return fmt.Errorf("%w; attach the disk again", err)
	}
	return fmt.Errorf("%w; build the disk again", err)
}

// Lookups is how many layers are looked at at once. Each takes a read of a cold disk,
// and a network disk answers many as quickly as one.
const Lookups = 32

// check looks at every layer's directory once.
func (d *Disk) check() error {
	root, err := OpenRoot(d.Dir)
	if err != nil {
		return err
	}
	defer root.Close()
	var g errgroup.Group
	g.SetLimit(Lookups)
	for _, l := range d.Manifest.Layers {
		g.Go(func() error {
			if err := root.CheckDir(d.Manifest.LayerPath(l)); err != nil {
				return fmt.Errorf("layer %s of cache disk %s: %w", l.ChainID, d.Dir, err)
			}
			return nil
		})
	}
	return g.Wait()
}

// LayerDir is the directory of l's files as this process sees it.
func (d *Disk) LayerDir(l manifest.Layer) string {
	return filepath.Join(d.Dir, d.Manifest.LayerPath(l))
}
