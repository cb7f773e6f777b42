package docker

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/opencontainers/go-digest"

	"github.com/selkies-project/packer-plugin-selkies/injector/report"
)

// Status lists the images that were registered from cache disks and are still
// there, and looks at every layer's directory and its disk.
func (r *Runtime) Status(context.Context) ([]report.Registration, error) {
	rd, err := r.reader()
	if err != nil {
		return nil, err
	}
	repos, err := r.readRepositories()
	if err != nil {
		return nil, err
	}
	regs := []report.Registration{}
	for _, rec := range rd.records {
		for _, img := range rec.Images {
			if !r.registered(repos, img) {
				continue
			}
			reg := report.Registration{CacheID: rec.CacheID, Layers: img.Layers, Disk: mountpoint(rec.CacheID), Readable: true}
			for _, n := range repos.names(img.ID) {
				reg.Names = append(reg.Names, n.ref)
			}
			slices.Sort(reg.Names)
			if err := rd.imageReadable(img.ID); err != nil {
				reg.Readable, reg.Problem = false, err.Error()
			}
			regs = append(regs, reg)
		}
	}
	return regs, nil
}

// Generations lists those that images were registered from. One whose record is broken
// is left out until an inject has written it again.
func (r *Runtime) Generations(context.Context) ([]report.Generation, error) {
	recs := r.knownRecords()
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

// reader looks at the files of registered layers.
type reader struct {
	store
	check   checker
	records []*record
	mounted map[string]bool // bind mounts, by target
}

func (r *Runtime) reader() (*reader, error) {
	recs, err := r.records()
	if err != nil {
		return nil, err
	}
	mounted, err := r.bindMounts()
	if err != nil {
		return nil, err
	}
	return &reader{r.store, r.checker(), recs, mounted}, nil
}

// imageReadable says why a container of the image would not start, or not find its
// files.
func (r *reader) imageReadable(id digest.Digest) error {
	top, err := r.imageChain(id)
	if err != nil || top == "" {
		return err
	}
	chain, err := r.chain(top)
	if err != nil {
		return err
	}
	for _, c := range chain {
		if err := r.readable(c); err != nil {
			return err
		}
	}
	return nil
}

// readable says why the files of a registered layer cannot be read.
func (r *reader) readable(chain digest.Digest) error {
	state, id, err := r.layer(chain)
	if err != nil {
		return err
	}
	switch state {
	case layerMissing, layerDamaged:
		return fmt.Errorf("layer %s is not complete in docker's store", report.Short(chain))
	case layerNode:
		return nil
	}
	target, err := os.Readlink(r.overlay(id, "diff"))
	if err != nil {
		return r.bound(chain, id)
	}
	if from := r.generation(id); from != "" {
		if err := r.check(from); err != nil {
			return err
		}
	}
	if _, err := os.Stat(r.host(target)); err != nil {
		return fmt.Errorf("layer %s: %w", report.Short(chain), err)
	}
	return nil
}

// bound is readable for a layer that is reached by a bind mount. That does not say from
// which generation: it is readable if one that has the layer is.
func (r *reader) bound(chain digest.Digest, id string) error {
	if !r.mounted[filepath.Join(r.root, "overlay2", id, "diff")] {
		return fmt.Errorf("layer %s: its bind mount is gone", report.Short(chain))
	}
	var failed error
	for _, rec := range r.records {
		if _, lists := rec.Layers[chain]; !lists {
			continue
		}
		err := r.check(rec.CacheID)
		if err == nil {
			return nil
		}
		failed = err
	}
	return failed
}
