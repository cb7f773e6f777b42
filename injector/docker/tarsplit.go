package docker

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"golang.org/x/sync/errgroup"

	"github.com/selkies-project/packer-plugin-selkies/injector/cachedisk"
)

// checkLinked is checkFiles for the layers that are linked to the generation of d already:
// another disk may have the same layer manifest.
func (s store) checkLinked(d *cachedisk.Disk) error {
	var layers []newLayer
	for _, l := range d.Manifest.Layers {
		file := filepath.Join(mountpoint(d.ID), d.Manifest.TarSplitPath(l))
		if to, err := os.Readlink(filepath.Join(s.layerdb(l.ChainID), "tar-split.json.gz")); err == nil && to == file {
			layers = append(layers, newLayer{Chain: l.ChainID, Cache: d.ID, TarSplit: file})
		}
	}
	return checkTarSplits(d, layers)
}

// checkFiles looks at the files of the disks that dockerd is going to open by links in
// its store: such a file must not lead it anywhere else.
func (c *changes) checkFiles(disks []*cachedisk.Disk) error {
	layers := slices.Clone(c.layers)
	for _, r := range c.relinks {
		layers = append(layers, r.Layer)
	}
	for _, d := range disks {
		if err := checkTarSplits(d, layers); err != nil {
			return err
		}
	}
	return nil
}

// checkTarSplits looks at the files of those of the layers that the disk has.
func checkTarSplits(d *cachedisk.Disk, layers []newLayer) error {
	root, err := cachedisk.OpenRoot(d.Dir)
	if err != nil {
		return fmt.Errorf("cache disk %s: %w", d.Dir, err)
	}
	defer root.Close()
	var g errgroup.Group
	g.SetLimit(cachedisk.Lookups)
	for _, l := range layers {
		if l.Cache != d.ID {
			continue
		}
		g.Go(func() error {
			file, err := filepath.Rel(mountpoint(d.ID), l.TarSplit)
			if err == nil {
				_, err = root.CheckFile(file)
			}
			if err != nil {
				return fmt.Errorf("layer %s of cache disk %s: %w; build the disk again", l.Chain, d.Dir, err)
			}
			return nil
		})
	}
	return g.Wait()
}
