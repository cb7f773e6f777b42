package docker

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"syscall"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/selkies-project/packer-plugin-selkies/injector/cachedisk"
)

// What one layer and one image cost the node, in files, rounded up: see stage.
const (
	inodesPerLayer = 16
	inodesPerImage = 4
)

// checkRoom refuses changes that the data root has no room for.
func (s store) checkRoom(c *changes) error {
	var st unix.Statfs_t
	if err := unix.Statfs(s.image(), &st); err != nil {
		return fmt.Errorf("looking at docker's data root %s: %w", s.root, err)
	}
	inodes := uint64(len(c.layers)*inodesPerLayer + len(c.images)*inodesPerImage + 16)
	// Every file is smaller than a block, but for the configs.
	bytes := inodes * uint64(st.Bsize)
	for _, img := range c.images {
		bytes += uint64(len(img.Config))
	}
	if free := st.Bavail * uint64(st.Bsize); free < bytes {
		return fmt.Errorf("docker data root %s has %d bytes free, %d are needed; make room there and run inject again", s.root, free, bytes)
	}
	// btrfs and others that make inodes as needed report none.
	if st.Files > 0 && st.Ffree < inodes {
		return fmt.Errorf("docker data root %s has %d inodes free, %d are needed; make room there and run inject again", s.root, st.Ffree, inodes)
	}
	return nil
}

func (s store) staging(elem ...string) string {
	return filepath.Join(append([]string{s.stateDir(), "staging"}, elem...)...)
}

// stage writes all files of the changes where dockerd does not look, and makes them
// durable: the layers' directories, which dockerd finds by layerdb only, and below
// staging what commit renames into place. The distribution metadata goes where it
// belongs: dockerd does not use it for layers that it does not have. It may run
// while dockerd does.
func (s store) stage(c *changes, link string) error {
	if err := os.RemoveAll(s.staging()); err != nil {
		return fmt.Errorf("preparing layers: %w", err)
	}
	for _, dir := range []string{"layerdb", "imagedb"} {
		if err := os.MkdirAll(s.staging(dir), 0o700); err != nil {
			return fmt.Errorf("preparing layers: %w", err)
		}
	}
	var g errgroup.Group
	g.SetLimit(4)
	g.Go(func() error { return s.addMetadata(c.metadata) })
	for _, l := range c.layers {
		g.Go(func() error {
			if err := s.stageLayer(l, link); err != nil {
				return fmt.Errorf("preparing layer %s: %w", l.Chain, err)
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return err
	}
	for _, img := range c.images {
		if err := os.WriteFile(s.staging("imagedb", img.ID.Encoded()), img.Config, 0o600); err != nil {
			return fmt.Errorf("preparing image %s: %w", img.ID, err)
		}
	}
	// One sync for all: two or three per file would cost seconds on a network disk.
	return s.sync()
}

func (s store) stageLayer(l newLayer, link string) error {
	if err := s.removeOwn(l); err != nil {
		return err
	}
	dir := s.overlay(l.ID)
	if err := os.Mkdir(dir, 0o710); err != nil {
		return err
	}
	files := []struct{ name, content string }{{"link", l.Link}, {"lower", l.Lower}}
	for _, f := range files {
		if f.content == "" {
			continue
		}
		if err := os.WriteFile(filepath.Join(dir, f.name), []byte(f.content), 0o644); err != nil {
			return err
		}
	}
	// dockerd mounts a committed layer without an upper directory.
	if err := os.WriteFile(filepath.Join(dir, "committed"), nil, 0o600); err != nil {
		return err
	}
	diff := filepath.Join(dir, "diff")
	if link == LinkBind {
		if err := os.Mkdir(diff, 0o755); err != nil {
			return err
		}
	} else if err := os.Symlink(l.Source, diff); err != nil {
		return err
	}
	if err := os.Symlink(filepath.Join("..", l.ID, "diff"), s.overlay("l", l.Link)); err != nil {
		return err
	}

	entry := s.staging("layerdb", l.Chain.Encoded())
	if err := os.Mkdir(entry, 0o700); err != nil {
		return err
	}
	files = []struct{ name, content string }{
		{"cache-id", l.ID}, {"diff", l.DiffID.String()},
		{"parent", l.Parent.String()}, {"size", strconv.FormatInt(l.Size, 10)},
	}
	for _, f := range files {
		if f.content == "" {
			continue
		}
		if err := os.WriteFile(filepath.Join(entry, f.name), []byte(f.content), 0o644); err != nil {
			return err
		}
	}
	return os.Symlink(l.TarSplit, filepath.Join(entry, "tar-split.json.gz"))
}

// staged says if every layer's directory is there as stage made it.
func (s store) staged(c *changes) bool {
	for _, l := range c.layers {
		files := []string{s.overlay("l", l.Link)}
		for _, name := range []string{"link", "committed", "diff", "lower"} {
			if name != "lower" || l.Lower != "" {
				files = append(files, s.overlay(l.ID, name))
			}
		}
		for _, f := range files {
			if _, err := os.Lstat(f); err != nil {
				return false
			}
		}
	}
	return true
}

// forgetRemovals keeps dockerd from removing what c registers. A layer's entry that it
// has begun to remove is named CHAIN-RANDOM-removing. Where dockerd was killed before
// the end, it removes the directory that the entry's cache-id names when it stops the
// next time, whatever has become of it; a layer of ours always has the same directory.
func (s store) forgetRemovals(c *changes) error {
	entries, err := filepath.Glob(s.image("layerdb", "sha256", "*-removing"))
	if err != nil {
		return err
	}
	for _, e := range entries {
		id, err := readTrimmed(filepath.Join(e, "cache-id"))
		if err != nil || !slices.ContainsFunc(c.layers, func(l newLayer) bool { return l.ID == id }) {
			continue
		}
		if err := os.RemoveAll(e); err != nil {
			return fmt.Errorf("taking back the removal of a layer: %w", err)
		}
	}
	return nil
}

// commit makes the staged changes visible to a dockerd that starts after it: layers
// before the images that have them, images before their names. After a power loss
// it is the same: file systems with a journal keep the order of renames, and all but
// the markers, which are empty, is durable already.
func (s store) commit(c *changes) error {
	if err := s.forgetRemovals(c); err != nil {
		return err
	}
	for _, l := range c.layers {
		// What is there is ours and incomplete, else the layer would not be missing.
		if err := os.RemoveAll(s.layerdb(l.Chain)); err != nil {
			return fmt.Errorf("registering layer %s: %w", l.Chain, err)
		}
		if err := mkdirOf(s.layerdb(l.Chain)); err != nil {
			return fmt.Errorf("registering layer %s: %w", l.Chain, err)
		}
		if err := os.Rename(s.staging("layerdb", l.Chain.Encoded()), s.layerdb(l.Chain)); err != nil {
			return fmt.Errorf("registering layer %s: %w", l.Chain, err)
		}
	}
	for _, img := range c.images {
		// The marker first: an image without it would be taken for the node's own.
		marker := s.imageMarker(img.ID)
		if err := os.MkdirAll(filepath.Dir(marker), 0o700); err != nil {
			return fmt.Errorf("registering image %s: %w", img.ID, err)
		}
		if err := os.WriteFile(marker, nil, 0o600); err != nil {
			return fmt.Errorf("registering image %s: %w", img.ID, err)
		}
		if err := os.Rename(s.staging("imagedb", img.ID.Encoded()), s.imageContent(img.ID)); err != nil {
			return fmt.Errorf("registering image %s: %w", img.ID, err)
		}
	}
	if len(c.names) > 0 {
		repos, err := s.readRepositories()
		if err != nil {
			return err
		}
		for n, to := range c.names {
			repos.set(n, to)
		}
		if err := s.writeRepositories(repos); err != nil {
			return err
		}
	}
	return os.RemoveAll(s.staging())
}

// abandon removes what stage wrote for layers that were not registered.
func (s store) abandon(c *changes) error {
	var errs []error
	for _, l := range c.layers {
		if state, _, err := s.layer(l.Chain); err == nil && state != layerOwn {
			errs = append(errs, s.removeOwn(l))
		}
	}
	return errors.Join(append(errs, os.RemoveAll(s.staging()))...)
}

// removeOwn removes the directory of a layer of ours that is not registered. It
// never descends into diff, which may be a mount.
func (s store) removeOwn(l newLayer) error {
	for _, name := range []string{s.overlay("l", l.Link), s.overlay(l.ID, "diff")} {
		if err := removeIfThere(name); err != nil && !errors.Is(err, syscall.ENOTDIR) {
			return err
		}
	}
	return os.RemoveAll(s.overlay(l.ID))
}

// relinkLayers makes layers reach their files anew, without dockerd noticing. One that
// dockerd removes meanwhile stays removed.
func (s store) relinkLayers(relinks []relink) error {
	var binds []cachedisk.Bind
	for _, r := range relinks {
		if r.Rebind {
			binds = append(binds, s.bind(r.Layer))
			continue
		}
		err := replaceLink(r.Layer.Source, s.overlay(r.Layer.ID, "diff"))
		if err == nil {
			err = replaceLink(r.Layer.TarSplit, filepath.Join(s.layerdb(r.Chain), "tar-split.json.gz"))
		}
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("linking layer %s: %w", r.Chain, err)
		}
	}
	if len(binds) == 0 {
		return nil
	}
	return cachedisk.BindOnHost(s.hostRoot, binds)
}

func (s store) bind(l newLayer) cachedisk.Bind {
	return cachedisk.Bind{Source: l.Source, Target: filepath.Join(s.root, "overlay2", l.ID, "diff")}
}

// sync makes all that was written to the store durable.
func (s store) sync() error {
	for _, dir := range []string{s.overlay(), s.image()} {
		f, err := os.Open(dir)
		if err != nil {
			return fmt.Errorf("flushing docker's data root: %w", err)
		}
		err = unix.Syncfs(int(f.Fd()))
		f.Close()
		if err != nil {
			return fmt.Errorf("flushing docker's data root: %w", err)
		}
	}
	return nil
}
