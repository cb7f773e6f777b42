package docker

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/containerd/errdefs"
	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/api/types/image"
	"github.com/opencontainers/go-digest"

	"github.com/selkies-project/packer-plugin-selkies/injector/cachedisk"
	"github.com/selkies-project/packer-plugin-selkies/injector/report"
	"github.com/selkies-project/packer-plugin-selkies/manifest"
)

// Eject removes what the generations registered. It
// needs a daemon that runs, which removes the images itself, and refuses while a
// container uses one of their layers. Images that were built on them stay, with the
// layers and the disk below them, and are reported as kept.
func (r *Runtime) Eject(ctx context.Context, opt report.EjectOptions) (*report.Eject, error) {
	ids := opt.Caches
	unlock, err := r.lock(ctx)
	if err != nil {
		return nil, err
	}
	defer unlock()
	if r.info == nil {
		return nil, fmt.Errorf("docker at %s is not running; start it, eject removes images through it", r.cli.DaemonHost())
	}
	recs, err := r.records()
	if err != nil {
		return nil, err
	}
	e := &ejection{Runtime: r, check: r.checker(), rep: &report.Eject{Runtime: "docker", Images: []string{}}}
	for _, rec := range recs {
		if len(ids) == 0 || slices.Contains(ids, rec.CacheID) {
			e.going = append(e.going, rec)
		} else {
			e.staying = append(e.staying, rec)
		}
	}
	for _, id := range ids {
		if !slices.ContainsFunc(e.going, func(rec *record) bool { return rec.CacheID == id }) {
			return nil, fmt.Errorf("cache %s: %w", id, report.ErrUnknownCache)
		}
	}
	before, err := r.ownLayers()
	if err != nil {
		return nil, err
	}
	if err := e.checkContainers(ctx, before); err != nil {
		return nil, err
	}
	if err := e.removeImages(ctx); err != nil {
		return e.rep, err
	}
	if err := e.removeOrphans(ctx); err != nil {
		return e.rep, err
	}
	after, err := r.ownLayers()
	if err != nil {
		return e.rep, err
	}
	e.rep.Layers = len(before) - len(after)
	if err := r.clearTemporary(); err != nil {
		return e.rep, err
	}
	for _, rec := range e.going {
		if err := e.retire(rec, after); err != nil {
			return e.rep, err
		}
	}
	if err := os.RemoveAll(r.staging()); err != nil {
		return e.rep, fmt.Errorf("removing what an interrupted inject prepared: %w", err)
	}
	// Only empty ones go.
	os.Remove(r.stateDir())
	os.Remove(r.host(StateDir))
	return e.rep, nil
}

// ejection is one run of Eject.
type ejection struct {
	*Runtime
	going, staying []*record
	check          checker
	rep            *report.Eject
}

// checkContainers refuses if a container, running or not, has one of our layers that
// a going generation supplies.
func (e *ejection) checkContainers(ctx context.Context, own map[digest.Digest]string) error {
	all, err := e.cli.ContainerList(ctx, container.ListOptions{All: true})
	if err != nil {
		return fmt.Errorf("listing docker's containers: %w", explain(err))
	}
	for _, c := range all {
		// The container's own record of its layers: its image may be gone.
		top, err := readTrimmed(e.store.image("layerdb", "mounts", c.ID, "parent"))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return fmt.Errorf("reading container %s: %w", containerName(c), err)
		}
		chain, err := e.chain(digest.Digest(top))
		if err != nil {
			return fmt.Errorf("reading container %s: %w", containerName(c), err)
		}
		for _, id := range chain {
			dir, ok := own[id]
			if !ok {
				continue
			}
			if rec := e.supplier(id, dir); rec != nil {
				return fmt.Errorf("container %s (%s) uses layers of cache %s; remove it with docker rm, then eject again",
					containerName(c), c.Image, rec.CacheID)
			}
		}
	}
	return nil
}

// supplier is the going generation that a layer of ours is linked to, or, if it is
// bound, that lists it.
func (e *ejection) supplier(chain digest.Digest, dir string) *record {
	from := e.generation(dir)
	for _, rec := range e.going {
		if _, lists := rec.Layers[chain]; from == rec.CacheID || from == "" && lists {
			return rec
		}
	}
	return nil
}

func (e *ejection) removeImages(ctx context.Context) error {
	for _, rec := range e.going {
		for _, img := range rec.Images {
			var err error
			if keeper := e.alsoIn(img.ID); keeper != nil {
				err = e.handOver(ctx, img, keeper.image(img.ID))
			} else {
				err = e.removeImage(ctx, img)
			}
			if err != nil {
				return fmt.Errorf("removing image %s from docker: %w", img.Names, explain(err))
			}
		}
	}
	return nil
}

// alsoIn is a staying generation that has the image as well.
func (e *ejection) alsoIn(id digest.Digest) *record {
	for _, rec := range e.staying {
		if rec.image(id) != nil {
			return rec
		}
	}
	return nil
}

// handOver leaves an image to a staying generation and removes the names that only
// the going one has.
func (e *ejection) handOver(ctx context.Context, img recordImage, keeper *recordImage) error {
	going := img
	going.Names = slices.DeleteFunc(slices.Clone(img.Names), func(n string) bool { return slices.Contains(keeper.Names, n) })
	going.Added = slices.DeleteFunc(slices.Clone(img.Added), func(n string) bool { return slices.Contains(keeper.Names, n) })
	for _, n := range img.Added {
		if slices.Contains(keeper.Names, n) && !slices.Contains(keeper.Added, n) {
			keeper.Added = append(keeper.Added, n)
		}
	}
	ours, others, err := e.split(going)
	if err != nil {
		return err
	}
	if !slices.ContainsFunc(others, name.tagged) {
		// Removing the last tag would remove the image.
		for _, n := range ours {
			keeper.Names, keeper.Added = append(keeper.Names, n.ref), append(keeper.Added, n.ref)
		}
		return nil
	}
	return e.untag(ctx, ours)
}

// split sorts the names that an image has into those that are ours and others.
func (e *ejection) split(img recordImage) (ours, others []name, err error) {
	repos, err := e.readRepositories()
	if err != nil {
		return nil, nil, err
	}
	remove := img.Added
	if e.ownsImage(img.ID) {
		remove = img.Names
	}
	for _, n := range repos.names(img.ID) {
		if slices.Contains(remove, n.ref) {
			ours = append(ours, n)
		} else {
			others = append(others, n)
		}
	}
	return ours, others, nil
}

func (e *ejection) untag(ctx context.Context, names []name) error {
	for _, n := range names {
		_, err := e.cli.ImageRemove(ctx, n.ref, image.RemoveOptions{})
		if err != nil && !errdefs.IsNotFound(err) {
			return err
		}
	}
	return nil
}

func (e *ejection) removeImage(ctx context.Context, img recordImage) error {
	own := e.ownsImage(img.ID)
	if !own && !e.hasImage(img.ID) {
		return nil
	}
	ours, others, err := e.split(img)
	if err != nil {
		return err
	}
	// Removing an image's last tag removes its digests with it, and removing its last
	// name the image: the node's own must survive.
	if !own && !slices.ContainsFunc(others, name.tagged) {
		if len(ours) > 0 {
			e.keep("name %s: it is the only one of the node's own image %s", ours[0].ref, report.Short(img.ID))
		}
		return nil
	}
	if err := e.untag(ctx, ours); err != nil {
		return err
	}
	if own {
		return e.removeOwnImage(ctx, img, others)
	}
	return nil
}

// removeOwnImage removes the image itself where it outlived its names, and reports
// why if it has to stay.
func (e *ejection) removeOwnImage(ctx context.Context, img recordImage, others []name) error {
	if len(others) > 0 {
		e.keep("image %s: it is tagged %s", img.Names[0], others[0].ref)
		return nil
	}
	_, err := e.cli.ImageInspect(ctx, img.ID.String())
	if err == nil {
		_, err = e.cli.ImageRemove(ctx, img.ID.String(), image.RemoveOptions{})
	}
	switch {
	case errdefs.IsConflict(err):
		e.keep("image %s: %v", img.Names[0], err)
		return nil
	case err != nil && !errdefs.IsNotFound(err):
		return err
	}
	e.rep.Images = append(e.rep.Images, img.Names...)
	return nil
}

func (e *ejection) keep(format string, a ...any) {
	e.rep.Kept = append(e.rep.Kept, fmt.Sprintf(format, a...))
}

// retire forgets a generation: layers that outlived its images are linked to a
// staying generation that has them, and if none does, the disk and the record stay.
func (e *ejection) retire(rec *record, left map[digest.Digest]string) error {
	kept := 0
	for chain, dir := range left {
		if from := e.generation(dir); from != rec.CacheID && (from != "" || rec.Layers[chain].Directory == "") {
			continue
		}
		moved, err := e.move(chain)
		if err != nil {
			return err
		}
		if !moved {
			kept++
		}
	}
	if kept > 0 || slices.ContainsFunc(rec.Images, e.remains) {
		if kept > 0 {
			e.keep("cache %s: %d of its layers are used by other images, the build cache or an earlier docker save; remove the images, prune the cache, or restart docker and inject, and then eject again", report.Short(rec.CacheID), kept)
		}
		return nil
	}
	if err := e.clearUnfinished(rec); err != nil {
		return err
	}
	if err := e.handOverMetadata(rec); err != nil {
		return err
	}
	if err := cachedisk.UnmountOnHost(e.opt.HostRoot, mountpoint(rec.CacheID)); err != nil {
		return err
	}
	if err := removeIfThere(e.host(mountpoint(rec.CacheID))); err != nil {
		return err
	}
	return removeIfThere(e.recordFile(rec.CacheID))
}

// remains says if an image of ours is still there and no staying generation's.
func (e *ejection) remains(img recordImage) bool {
	return e.ownsImage(img.ID) && e.alsoIn(img.ID) == nil
}

// move links a layer to a staying generation that has it.
func (e *ejection) move(chain digest.Digest) (bool, error) {
	for _, rec := range e.staying {
		l, ok := rec.Layers[chain]
		if !ok || e.check(rec.CacheID) != nil {
			continue
		}
		base := mountpoint(rec.CacheID)
		layer := newLayer{
			Chain: chain, ID: ownID(chain),
			Source: filepath.Join(base, rec.Overlay, l.Directory, "diff"),
			TarSplit: filepath.Join(base, filepath.Dir(rec.Overlay), "image", manifest.DriverOverlay2, "layerdb",
				chain.Algorithm().String(), chain.Encoded(), "tar-split.json.gz"),
		}
		bound := e.generation(layer.ID) == ""
		if bound {
			if err := cachedisk.UnmountOnHost(e.opt.HostRoot, e.bind(layer).Target); err != nil {
				return false, err
			}
		}
		return true, e.relinkLayers([]relink{{chain, layer, bound}})
	}
	return false, nil
}

// handOverMetadata gives the distribution metadata of layers that a staying
// generation has to its record, and removes the rest.
func (e *ejection) handOverMetadata(rec *record) error {
	gone := rec.Metadata
	for _, keeper := range e.staying {
		diffIDs := map[digest.Digest]bool{}
		for _, l := range keeper.Layers {
			diffIDs[l.DiffID] = true
		}
		kept := newMetadata()
		for diffID, sources := range gone.Sources {
			if diffIDs[diffID] {
				kept.Sources[diffID] = sources
				delete(gone.Sources, diffID)
			}
		}
		for blob, diffID := range gone.DiffIDs {
			if diffIDs[diffID] {
				kept.DiffIDs[blob] = diffID
				delete(gone.DiffIDs, blob)
			}
		}
		keeper.Metadata.merge(kept)
		if err := e.replace(keeper); err != nil {
			return err
		}
	}
	if err := e.removeMetadata(gone); err != nil {
		return fmt.Errorf("removing distribution metadata: %w", err)
	}
	return nil
}
