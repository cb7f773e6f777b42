package containerd

import (
	"context"
	"fmt"
	"maps"
	"slices"

	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"
)

// survey is what the node has, read without changing anything.
type survey struct {
	snapshots map[string]snapshots.Info
	images    map[string]images.Image
	blobs     map[digest.Digest]content.Info
	anchors   map[digest.Digest]*anchor
	// stale are leases of dead runs or, without the lock, of one at work.
	stale []leases.Lease
	// strays are mounts of cache disks that containerd has forgotten.
	strays []string
}

func (r *Runtime) survey(ctx context.Context) (*survey, error) {
	s := &survey{
		snapshots: map[string]snapshots.Info{},
		images:    map[string]images.Image{},
		blobs:     map[digest.Digest]content.Info{},
		anchors:   map[digest.Digest]*anchor{},
	}
	g, listing := errgroup.WithContext(ctx)
	g.Go(func() error {
		err := r.snapshots.Walk(listing, func(_ context.Context, info snapshots.Info) error {
			s.snapshots[info.Name] = info
			if a := r.anchorOf(info); a != nil {
				s.anchors[a.cache] = a
			}
			return nil
		})
		if err != nil {
			return fmt.Errorf("listing snapshots: %w", r.explain(err))
		}
		return nil
	})
	g.Go(func() error {
		records, err := r.images.List(listing)
		if err != nil {
			return fmt.Errorf("listing images: %w", r.explain(err))
		}
		for _, img := range records {
			s.images[img.Name] = img
		}
		return nil
	})
	g.Go(func() error {
		err := r.content.Walk(listing, func(info content.Info) error {
			s.blobs[info.Digest] = info
			return nil
		})
		if err != nil {
			return fmt.Errorf("listing content: %w", r.explain(err))
		}
		return nil
	})
	g.Go(func() (err error) {
		s.stale, err = r.ourLeases(listing)
		return err
	})
	if err := g.Wait(); err != nil {
		return nil, err
	}
	var err error
	s.strays, err = r.strays(ctx, s.anchors)
	return s, err
}

// layers are the snapshots of the layers that were registered from the
// generations that want says, by name.
func (s *survey) layers(want func(digest.Digest) bool) []snapshots.Info {
	var infos []snapshots.Info
	for _, name := range slices.Sorted(maps.Keys(s.snapshots)) {
		if info := s.snapshots[name]; isLayer(info) && want(cacheOf(info.Labels)) {
			infos = append(infos, info)
		}
	}
	return infos
}

// records are the image records that were made from the generations that want
// says, by name.
func (s *survey) records(want func(digest.Digest) bool) []images.Image {
	var records []images.Image
	for _, name := range slices.Sorted(maps.Keys(s.images)) {
		if cache := recordCache(s.images[name]); cache != "" && want(cache) {
			records = append(records, s.images[name])
		}
	}
	return records
}

// committed says whether the chain is there.
func (s *survey) committed(chain digest.Digest) bool {
	info, ok := s.snapshots[chainName(chain)]
	return ok && info.Kind == snapshots.KindCommitted
}

// recordCache is the generation that the image record is from; empty if it is not
// ours, or not any more: a pull may lead a record elsewhere and keep its labels.
func recordCache(img images.Image) digest.Digest {
	if img.Labels[labelTarget] != img.Target.Digest.String() {
		return ""
	}
	return cacheOf(img.Labels)
}

func cacheOf(labels map[string]string) digest.Digest { return digest.Digest(labels[labelCache]) }
