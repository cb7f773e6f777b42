package imagecache

import (
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/docker/go-units"
	"github.com/opencontainers/go-digest"

	"github.com/selkies-project/packer-plugin-selkies/htmlreport"
)

// unpackedFactor is how many bytes on the disk a compressed one is taken to become, since
// registries tell compressed sizes only. A Debian 12 system with Docker, 175 MB with gzip,
// takes 511 MB on ext4; what compresses less, such as games, takes less.
const unpackedFactor = 3

// freeBytes is what root may still write to the file system that holds a directory.
func freeBytes(ctx context.Context, r *vm, dir string) (int64, error) {
	space, err := diskSpace(ctx, r, dir)
	return space.Free, err
}

// diskSpace is how large the file system is that holds a directory.
func diskSpace(ctx context.Context, r *vm, dir string) (htmlreport.Disk, error) {
	out, err := r.run(ctx, "stat", "--file-system", "--format=%b %f %S", dir)
	if err != nil {
		return htmlreport.Disk{}, fmt.Errorf("asking for the free space of %s: %w", dir, err)
	}
	var blocks, free, size int64
	if _, err := fmt.Sscan(string(out), &blocks, &free, &size); err != nil {
		return htmlreport.Disk{}, fmt.Errorf("asking for the free space of %s: %w", dir, err)
	}
	return htmlreport.Disk{Size: blocks * size, Free: free * size}, nil
}

// checkRoom fails when pull compressed bytes certainly do not fit into room, and warns
// when they probably do not. Images that are no longer listed have to make room first if
// it is crowded. Unpacked, a layer is never much smaller than compressed. Blobs that are
// kept take the compressed size once more.
func checkRoom(pull, room, unlisted int64, keepBlobs bool) (crowded bool, warning string, err error) {
	least, likely := pull, unpackedFactor*pull
	if keepBlobs {
		least, likely = least+pull, likely+pull
	}
	size := func(n int64) string { return units.HumanSize(float64(n)) }
	has := size(room + unlisted)
	if unlisted > 0 {
		has += fmt.Sprintf(" (%s of it held by images that are no longer listed)", size(unlisted))
	}
	if least > room+unlisted {
		takes := size(pull) + " compressed"
		if keepBlobs {
			takes += ", which keep_blobs keeps"
		}
		return false, "", fmt.Errorf("the disk has room for %s, but what is to be pulled takes %s, and more than that unpacked; use a larger disk, or list fewer images", has, takes)
	}
	if likely > room+unlisted {
		warning = fmt.Sprintf("warning: the disk may be too small: it has room for %s, and what is to be pulled takes about %s", has, size(likely))
	}
	return least > room, warning, nil
}

// unlisted is how many bytes images take that an earlier build recorded and that may go,
// without the layers that listed ones share.
func (b *build) unlisted() (size int64) {
	if b.earlier == nil || b.config.Prune.False() {
		return 0
	}
	shared := map[digest.Digest]bool{}
	for _, w := range b.images {
		for _, c := range w.chain {
			shared[c] = true
		}
	}
	listed := b.listed()
	for _, img := range b.earlier.Images {
		if chain, err := img.ChainIDs(); err == nil && listed(img.Config.Digest.String(), img.Names) {
			for _, c := range chain {
				shared[c] = true
			}
		}
	}
	for _, l := range b.earlier.Layers {
		if !shared[l.ChainID] {
			size += l.Size
		}
	}
	return size
}

// listed reports images that the configuration asks for, also those that cannot be had
// from their registry now.
func (b *build) listed() func(id string, names []string) bool {
	ids, failed := map[string]bool{}, map[string]bool{}
	for _, w := range b.images {
		ids[w.id()] = true
	}
	for _, f := range b.failures {
		failed[f.ref.tag()] = true
		failed[f.ref.digested(f.ref.pinned())] = true
	}
	return func(id string, names []string) bool {
		return ids[id] || slices.ContainsFunc(names, func(n string) bool { return failed[n] })
	}
}

// makingRoom calls do, and once more if the disk was full and images made room.
func (b *build) makingRoom(ctx context.Context, do func() ([]*wanted, []failure, error)) ([]*wanted, []failure, error) {
	done, failures, err := do()
	if err != nil || !slices.ContainsFunc(failures, isDiskFull) {
		return done, failures, err
	}
	if made, err := b.makeRoom(ctx, false); err != nil || !made {
		return done, failures, err
	}
	return do()
}

// makeRoom removes images that are no longer listed while others are still to come, and
// reports whether there were any. Those that share layers with listed ones can be spared:
// until the listed ones are there, the layers would go as well. The layer manifest ceases
// to name an image before it goes.
func (b *build) makeRoom(ctx context.Context, spareSharing bool) (bool, error) {
	unreadable := b.earlier == nil && b.earlierData != nil
	if b.config.Prune.False() || unreadable {
		return false, nil
	}
	p := b.pruner()
	stored, err := p.list(ctx)
	if err != nil {
		return false, err
	}
	listed := b.listed()
	ids := map[digest.Digest]bool{}
	var names []string
	for _, s := range stored {
		removable := p.removable(s)
		if len(removable) == 0 || listed(s.ID, storedNames(s)) {
			continue
		}
		if spareSharing {
			if shares, err := b.sharesLayers(ctx, s.ID); err != nil {
				return false, err
			} else if shares {
				continue
			}
		}
		ids[digest.Digest(s.ID)] = true
		names = append(names, removable...)
	}
	if len(names) == 0 {
		return false, nil
	}
	b.say("making room: %d images are no longer listed", len(ids))
	if err := b.forget(ctx, ids); err != nil {
		return false, err
	}
	for _, n := range names {
		if err := p.remove(ctx, n); err != nil {
			return false, err
		}
	}
	return true, nil
}

// sharesLayers reports whether an image in the store shares layers with a listed one.
func (b *build) sharesLayers(ctx context.Context, id string) (bool, error) {
	inspect, err := b.engine.ImageInspect(ctx, id)
	if err != nil {
		return false, fmt.Errorf("inspecting image %s: %w", id, err)
	}
	// Images that share any layer of a chain share the first.
	return slices.ContainsFunc(b.images, func(w *wanted) bool {
		return len(w.chain) > 0 && len(inspect.RootFS.Layers) > 0 && inspect.RootFS.Layers[0] == w.chain[0].String()
	}), nil
}

// forget takes images out of the layer manifest, and then their blobs off the disk.
func (b *build) forget(ctx context.Context, ids map[digest.Digest]bool) error {
	if b.earlier == nil {
		return nil
	}
	rest := *b.earlier
	rest.Created = b.created(time.Now())
	rest.Images, rest.Layers = nil, nil
	blobs, chains := wantedBlobs(b.images), map[digest.Digest]bool{}
	for _, img := range b.earlier.Images {
		if ids[img.Config.Digest] {
			continue
		}
		rest.Images = append(rest.Images, img)
		chain, err := img.ChainIDs()
		if err != nil {
			return err
		}
		for _, c := range chain {
			chains[c] = true
		}
		kept, err := img.LayerBlobs()
		if err != nil {
			return err
		}
		for _, l := range kept {
			blobs[l.Digest] = true
		}
	}
	for _, l := range b.earlier.Layers {
		if chains[l.ChainID] {
			rest.Layers = append(rest.Layers, l)
		}
	}
	data, err := writeManifest(ctx, b.vm, b.root, &rest, b.earlier, b.earlierData)
	if err != nil {
		return err
	}
	b.earlier, b.earlierData = &rest, data
	if !rest.Store.Blobs {
		return nil
	}
	return newBlobStore(b.vm, b.root).prune(ctx, blobs)
}
