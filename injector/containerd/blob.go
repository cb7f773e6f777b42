package containerd

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/pkg/labels"
	"github.com/containerd/errdefs"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"github.com/selkies-project/packer-plugin-selkies/injector/cachedisk"
	"github.com/selkies-project/packer-plugin-selkies/manifest"
)

// blob is a config, manifest or index, with its bytes, or the compressed blob of a
// layer, with its place on the disk.
type blob struct {
	desc ocispec.Descriptor
	// refs are the labels by which containerd's garbage collection goes from an
	// index to its manifest, to the config, to the snapshots. They hold also for a
	// blob that is there already.
	refs map[string]string
	// info are labels that only a blob of ours gets.
	info map[string]string
	// file is a layer blob's path relative to the disk's root.
	file string
}

// blobsOf lists the image's blobs, those that others refer to first. Layer blobs
// are there only if the disk keeps them; nothing but docker save and a push
// needs them. The labels are those that a pull sets, also for what is not there, so
// that a pull of the same image finds nothing to change.
func blobsOf(d *cachedisk.Disk, img manifest.Image, chain []digest.Digest) ([]blob, error) {
	config := blob{desc: img.Config, refs: map[string]string{}}
	if len(chain) > 0 {
		config.refs["containerd.io/gc.ref.snapshot."+snapshotter] = chainName(chain[len(chain)-1])
	}
	man := blob{desc: img.Manifest, refs: map[string]string{
		"containerd.io/gc.ref.content.config": img.Config.Digest.String(),
	}}
	layers, err := img.LayerBlobs()
	if err != nil {
		return nil, err
	}
	var diffIDs []digest.Digest
	if d.Manifest.Store.Blobs {
		if diffIDs, err = img.DiffIDs(); err != nil {
			return nil, err
		}
	}
	var blobs []blob
	for i, l := range layers {
		man.refs["containerd.io/gc.ref.content.l."+strconv.Itoa(i)] = l.Digest.String()
		if d.Manifest.Store.Blobs {
			blobs = append(blobs, blob{
				desc: l,
				info: map[string]string{labels.LabelUncompressed: diffIDs[i].String()},
				file: filepath.Join(manifest.BlobsDir, l.Digest.Algorithm().String(), l.Digest.Encoded()),
			})
		}
	}
	blobs = append(blobs, config, man)
	if img.Index != nil {
		index := blob{desc: *img.Index, refs: map[string]string{}}
		var list ocispec.Index
		if err := json.Unmarshal(img.Index.Data, &list); err != nil {
			return nil, fmt.Errorf("decoding index %s: %w", img.Index.Digest, err)
		}
		for i, m := range list.Manifests {
			index.refs["containerd.io/gc.ref.content.m."+strconv.Itoa(i)] = m.Digest.String()
		}
		blobs = append(blobs, index)
	}
	return blobs, nil
}

// addOrigins labels each blob with the repositories of all images that have it.
func addOrigins(jobs []*job) error {
	names := map[digest.Digest][]string{}
	for _, j := range jobs {
		for _, b := range j.blobs {
			names[b.desc.Digest] = append(names[b.desc.Digest], j.image.Names...)
		}
	}
	origins := map[digest.Digest]map[string]string{}
	for d, all := range names {
		var err error
		if origins[d], err = distributionSource(all); err != nil {
			return err
		}
	}
	for _, j := range jobs {
		for i, b := range j.blobs {
			info := maps.Clone(origins[b.desc.Digest])
			maps.Copy(info, b.info)
			j.blobs[i].info = info
		}
	}
	return nil
}

// distributionSource are the labels by which a pull records where a blob came from:
// a push to the same registry can then mount it instead of uploading it.
func distributionSource(names []string) (map[string]string, error) {
	repos := map[string][]string{}
	for _, name := range names {
		ref, err := reference.ParseNormalizedNamed(name)
		if err != nil {
			return nil, fmt.Errorf("name %q: %w", name, err)
		}
		// containerd's key has no port.
		host, _, _ := strings.Cut(reference.Domain(ref), ":")
		key := labels.LabelDistributionSource + "." + host
		repos[key] = append(repos[key], reference.Path(ref))
	}
	origin := map[string]string{}
	for key, list := range repos {
		slices.Sort(list)
		list = slices.Compact(list)
		// A label has a length limit, which a very common image can reach; a pull
		// leaves the label out then.
		if value := strings.Join(list, ","); labels.Validate(key, value) == nil {
			origin[key] = value
		}
	}
	return origin, nil
}

// writeBlob makes the blob known to containerd, held by the context's lease.
func (r *Runtime) writeBlob(ctx context.Context, run string, b blob, a *anchor) error {
	// A writer's Close leaves its stream open at this end, with its memory.
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	all := maps.Clone(b.info)
	maps.Copy(all, b.refs)
	desc := b.desc
	desc.Data = nil
	for {
		var err error
		if b.file == "" {
			err = r.copyBlob(ctx, run, desc, b.desc.Data, all)
		} else {
			err = r.linkBlob(ctx, run, b, a, all)
		}
		if err != nil {
			return fmt.Errorf("writing blob %s: %w", desc.Digest, r.explain(err))
		}
		if err := r.hold(ctx, "content", desc.Digest.String()); err != nil {
			return err
		}
		info, err := r.content.Info(ctx, desc.Digest)
		if errdefs.IsNotFound(err) {
			continue // it was there, unreferenced, and was collected
		}
		if err != nil {
			return fmt.Errorf("looking up blob %s: %w", desc.Digest, r.explain(err))
		}
		return r.labelBlob(ctx, info, lacks(info.Labels, b.refs))
	}
}

// copyBlob gives containerd the blob's bytes. content.WriteBlob does too, with a buffer of
// a megabyte.
func (r *Runtime) copyBlob(ctx context.Context, run string, desc ocispec.Descriptor, data []byte, all map[string]string) error {
	w, err := content.OpenWriter(ctx, r.content, content.WithRef(run+"/"+desc.Digest.String()), content.WithDescriptor(desc))
	if errdefs.IsAlreadyExists(err) {
		return nil
	}
	if err != nil {
		return err
	}
	defer w.Close()
	// What another namespace has, or what nobody has and is not collected yet, is all there
	// already: a write would append to it.
	status, err := w.Status()
	if err != nil {
		return err
	}
	if left := data[min(status.Offset, int64(len(data))):]; len(left) > 0 {
		if _, err := w.Write(left); err != nil {
			return err
		}
	}
	if err := w.Commit(ctx, desc.Size, desc.Digest, content.WithLabels(all)); err != nil && !errdefs.IsAlreadyExists(err) {
		return err
	}
	return nil
}

func (r *Runtime) labelBlob(ctx context.Context, info content.Info, missing map[string]string) error {
	if len(missing) == 0 {
		return nil
	}
	var paths []string
	for key := range missing {
		paths = append(paths, "labels."+key)
	}
	if _, err := r.content.Update(ctx, content.Info{Digest: info.Digest, Labels: missing}, paths...); err != nil {
		return fmt.Errorf("labelling blob %s: %w", info.Digest, r.explain(err))
	}
	return nil
}

// linkBlob puts a link to the blob on the disk where containerd's content store
// looks for it, then registers it by a write without bytes: containerd takes over
// content that its store has, if only the size is right, and gives it to whoever asks,
// as a manifest too. So the blob is hashed before.
func (r *Runtime) linkBlob(ctx context.Context, run string, b blob, a *anchor, all map[string]string) error {
	name := r.blobFile(b.desc.Digest)
	if err := os.MkdirAll(filepath.Dir(r.host(name)), 0o755); err != nil {
		return err
	}
	checked := false
	var err error
	// Garbage collection may find the link before it is registered, and remove it.
	for range 3 {
		// A link that leads nowhere is of a disk that is gone.
		if _, err := os.Stat(r.host(name)); err != nil {
			if !checked {
				if err := r.checkBlob(ctx, a, b.file, b.desc); err != nil {
					return err
				}
				checked = true
			}
			if err := r.placeBlob(a, b.file, b.desc.Digest); err != nil {
				return err
			}
		}
		var w content.Writer
		w, err = r.content.Writer(ctx, content.WithRef(run+"/"+b.desc.Digest.String()), content.WithDescriptor(b.desc))
		if errdefs.IsAlreadyExists(err) {
			return nil
		}
		if err != nil {
			return err
		}
		err = w.Commit(ctx, b.desc.Size, b.desc.Digest, content.WithLabels(all))
		w.Close()
		if err == nil || errdefs.IsAlreadyExists(err) {
			return nil
		}
	}
	return err
}

// checkBlob says why the disk on the anchor does not have the blob, which it hashes.
func (r *Runtime) checkBlob(ctx context.Context, a *anchor, file string, desc ocispec.Descriptor) error {
	root, err := cachedisk.OpenRoot(r.host(r.mountPoint(a)))
	if err != nil {
		return err
	}
	defer root.Close()
	err = root.CheckBlob(ctx, file, desc.Digest, desc.Size)
	if err == nil || ctx.Err() != nil || errors.Is(err, cachedisk.ErrUnreadable) {
		return err
	}
	return fmt.Errorf("%w; the layer manifest says that the disk keeps its blobs: build the disk again", err)
}

// placeBlob leads the blob's place in containerd's content store to the anchor's disk.
func (r *Runtime) placeBlob(a *anchor, file string, d digest.Digest) error {
	name := r.blobFile(d)
	target, err := filepath.Rel(filepath.Dir(name), filepath.Join(r.mountPoint(a), file))
	if err != nil {
		return err
	}
	return replaceLink(target, r.host(name))
}

// placed is the path on the anchor's disk that the blob's place in the content store
// leads to, "" if it leads elsewhere or is a file of containerd's own.
func (r *Runtime) placed(a *anchor, d digest.Digest) string {
	name := r.blobFile(d)
	target, err := os.Readlink(r.host(name))
	if err != nil {
		return ""
	}
	file, ok := strings.CutPrefix(filepath.Join(filepath.Dir(name), target), r.mountPoint(a)+"/")
	if !ok {
		return ""
	}
	return file
}

// checkPlaced looks at the disk's files that places in the content store lead to, before
// it is mounted there: another disk may have the same layer manifest, and containerd
// opens what it finds, also a pipe or a link to elsewhere.
func (r *Runtime) checkPlaced(d *cachedisk.Disk, a *anchor) error {
	if !d.Manifest.Store.Blobs {
		return nil
	}
	root, err := cachedisk.OpenRoot(d.Dir)
	if err != nil {
		return fmt.Errorf("cache disk %s: %w", d.Dir, err)
	}
	defer root.Close()
	var g errgroup.Group
	g.SetLimit(cachedisk.Lookups)
	for _, img := range d.Manifest.Images {
		blobs, err := img.LayerBlobs()
		if err != nil {
			return fmt.Errorf("cache disk %s: %w", d.Dir, err)
		}
		for _, b := range blobs {
			g.Go(func() error {
				file := r.placed(a, b.Digest)
				if file == "" {
					return nil
				}
				if err := root.CheckSize(file, b.Size); err != nil {
					return fmt.Errorf("blob %s of cache disk %s: %w; build the disk again", b.Digest, d.Dir, err)
				}
				return nil
			})
		}
	}
	return g.Wait()
}

// blobFile is the host path of the blob in containerd's content store.
func (r *Runtime) blobFile(d digest.Digest) string {
	return filepath.Join(r.contentRoot, "blobs", d.Algorithm().String(), d.Encoded())
}

// handOverBlobs leads links of blobs that stay, for images of other generations,
// from the anchor's disk to one of theirs. Blobs that none of them keeps go: those
// images are registered without.
func (r *Runtime) handOverBlobs(ctx context.Context, s *survey, from *anchor, to []*anchor) error {
	for d := range s.blobs {
		file := r.placed(from, d)
		if file == "" {
			continue
		}
		moved := false
		for _, a := range to {
			if err := r.checkBlob(ctx, a, file, ocispec.Descriptor{Digest: d, Size: s.blobs[d].Size}); ctx.Err() != nil {
				return ctx.Err()
			} else if err != nil {
				continue
			}
			if err := r.placeBlob(a, file, d); err != nil {
				return fmt.Errorf("linking blob %s: %w", d, r.explain(err))
			}
			moved = true
			break
		}
		if moved {
			continue
		}
		if err := r.content.Delete(ctx, d); err != nil && !errdefs.IsNotFound(err) {
			return fmt.Errorf("removing blob %s: %w", d, r.explain(err))
		}
	}
	return nil
}

// lacks is the part of want that labels do not have.
func lacks(labels, want map[string]string) map[string]string {
	missing := map[string]string{}
	for k, v := range want {
		if labels[k] != v {
			missing[k] = v
		}
	}
	return missing
}
