package containerd

import (
	"cmp"
	"context"
	"fmt"
	"slices"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/opencontainers/go-digest"

	"github.com/selkies-project/packer-plugin-selkies/injector/report"
)

// Status lists what is registered, one entry for each image of each generation.
func (r *Runtime) Status(ctx context.Context) ([]report.Registration, error) {
	ctx = r.context(ctx)
	s, err := r.survey(ctx)
	if err != nil {
		return nil, err
	}
	type key struct{ target, cache digest.Digest }
	at := map[key]int{}
	rs := []report.Registration{}
	for _, record := range s.records(func(digest.Digest) bool { return true }) {
		k := key{record.Target.Digest, recordCache(record)}
		if i, ok := at[k]; ok {
			rs[i].Names = append(rs[i].Names, record.Name)
			continue
		}
		at[k] = len(rs)
		rs = append(rs, r.registration(ctx, s, record))
	}
	return rs, nil
}

// Generations lists those that have an anchor on the node.
func (r *Runtime) Generations(ctx context.Context) ([]report.Generation, error) {
	anchors, err := r.known(r.context(ctx))
	if err != nil {
		return nil, err
	}
	var gens []report.Generation
	for _, a := range anchors {
		gens = append(gens, report.Generation{CacheID: a.cache, Dir: r.mountPoint(a)})
	}
	slices.SortFunc(gens, func(a, b report.Generation) int { return cmp.Compare(a.CacheID, b.CacheID) })
	return gens, nil
}

func (r *Runtime) registration(ctx context.Context, s *survey, record images.Image) report.Registration {
	reg := report.Registration{Names: []string{record.Name}, CacheID: recordCache(record)}
	if a := s.anchors[reg.CacheID]; a != nil {
		reg.Disk = r.mountPoint(a)
	}
	chain, err := r.chain(ctx, record)
	if err != nil {
		reg.Problem = err.Error()
		return reg
	}
	reg.Layers = len(chain)
	if err := r.readable(s, chain); err != nil {
		reg.Problem = err.Error()
		return reg
	}
	reg.Readable = true
	return reg
}

// readable says why a container of the image would not start: a layer of it is
// missing, or the disk of one. An image may have layers of several generations.
func (r *Runtime) readable(s *survey, chain []digest.Digest) error {
	if len(chain) == 0 {
		return nil
	}
	for _, id := range chain {
		if !s.committed(id) {
			return fmt.Errorf("layer %s is not registered any more; run inject", report.Short(id))
		}
		info := s.snapshots[chainName(id)]
		if !isLayer(info) {
			continue
		}
		a := s.anchors[cacheOf(info.Labels)]
		if a == nil {
			return fmt.Errorf("the anchor of cache %s is gone", report.Short(cacheOf(info.Labels)))
		}
		if err := a.alive(); err != nil {
			return err
		}
		if r.link(info) == "" {
			return fmt.Errorf("layer %s has lost its link", report.Short(id))
		}
	}
	return nil
}
