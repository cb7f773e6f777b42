package docker

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/opencontainers/go-digest"

	"github.com/selkies-project/packer-plugin-selkies/injector/report"
)

// Status lists the images that were registered from cache disks and are still
// there, and looks at every layer's directory.
func (r *Runtime) Status(context.Context) ([]report.Registration, error) {
	recs, err := r.records()
	if err != nil {
		return nil, err
	}
	repos, err := r.readRepositories()
	if err != nil {
		return nil, err
	}
	var regs []report.Registration
	for _, rec := range recs {
		for _, img := range rec.Images {
			if !r.registered(repos, img) {
				continue
			}
			reg := report.Registration{CacheID: rec.CacheID, Layers: img.Layers, Disk: mountpoint(rec.CacheID), Readable: true}
			for _, n := range repos.names(img.ID) {
				reg.Names = append(reg.Names, n.ref)
			}
			slices.Sort(reg.Names)
			if err := r.imageReadable(img.ID); err != nil {
				reg.Readable, reg.Problem = false, err.Error()
			}
			regs = append(regs, reg)
		}
	}
	return regs, nil
}

// Generations lists those that images were registered from.
func (r *Runtime) Generations(context.Context) ([]report.Generation, error) {
	recs, err := r.records()
	if err != nil {
		return nil, err
	}
	var gens []report.Generation
	for _, rec := range recs {
		gens = append(gens, report.Generation{CacheID: rec.CacheID, Dir: mountpoint(rec.CacheID)})
	}
	return gens, nil
}

// registered says if the image, or a name of it, is there by us.
func (r *Runtime) registered(repos *repositories, img recordImage) bool {
	if r.ownsImage(img.ID) {
		return true
	}
	return slices.ContainsFunc(img.Added, func(ref string) bool {
		n, err := familiar(ref)
		return err == nil && repos.get(n) == img.ID
	})
}

func (s store) imageReadable(id digest.Digest) error {
	top, err := s.imageChain(id)
	if err != nil || top == "" {
		return err
	}
	chain, err := s.chain(top)
	if err != nil {
		return err
	}
	for _, c := range chain {
		if err := s.readable(c); err != nil {
			return err
		}
	}
	return nil
}

// readable says why the files of a registered layer cannot be reached.
func (s store) readable(chain digest.Digest) error {
	state, id, err := s.layer(chain)
	if err != nil {
		return err
	}
	switch state {
	case layerMissing, layerDamaged:
		return fmt.Errorf("layer %s is not complete in docker's store", short(chain))
	case layerNode:
		return nil
	}
	diff := s.overlay(id, "diff")
	target, err := os.Readlink(diff)
	if err != nil {
		mounted, err := s.bindMounts()
		if err == nil && !mounted[filepath.Join(s.root, "overlay2", id, "diff")] {
			err = errors.New("its bind mount is gone")
		}
		if err != nil {
			return fmt.Errorf("layer %s: %w", short(chain), err)
		}
		return nil
	}
	if _, err := os.Stat(s.host(target)); err != nil {
		return fmt.Errorf("layer %s: %w", short(chain), err)
	}
	return nil
}
