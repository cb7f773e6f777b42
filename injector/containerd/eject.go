package containerd

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/containers"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/opencontainers/go-digest"

	"github.com/selkies-project/packer-plugin-selkies/injector/cachedisk"
	"github.com/selkies-project/packer-plugin-selkies/injector/report"
)

// Eject removes what was registered from the generations. It refuses, naming each
// container, while containers use a layer, or leaves the images that they use.
// Layers that something else on the node was built on stay, with their disk's
// mount.
func (r *Runtime) Eject(ctx context.Context, opt report.EjectOptions) (*report.Eject, error) {
	ctx = r.context(ctx)
	unlock, err := r.lock(ctx)
	if err != nil {
		return nil, err
	}
	defer unlock()
	before, err := r.survey(ctx)
	if err != nil {
		return nil, err
	}
	wanted, err := before.generations(opt.Caches)
	if err != nil {
		return nil, err
	}
	layers := before.layers(wanted)
	used, err := r.used(ctx, before, layers)
	if err != nil {
		return nil, err
	}
	if !opt.LeaveUsed && len(used) > 0 {
		return nil, refuse(used)
	}
	out := &report.Eject{Runtime: r.name(), Images: []string{}}
	if out.Images, err = r.removeRecords(ctx, before, wanted, used); err != nil {
		return nil, err
	}
	if err := r.collectGarbage(ctx); err != nil {
		return nil, err
	}
	after, err := r.survey(ctx)
	if err != nil {
		return nil, err
	}
	if err := r.handOver(ctx, after, wanted); err != nil {
		return nil, err
	}
	left := after.layers(wanted)
	out.Layers = len(layers) - len(left)
	out.Kept = r.whyKept(ctx, after, left)
	if err := r.removeAnchors(ctx, after, wanted); err != nil {
		return nil, err
	}
	return out, nil
}

// generations checks the cache IDs that the caller gave.
func (s *survey) generations(ids []digest.Digest) (func(digest.Digest) bool, error) {
	for _, id := range ids {
		if s.anchors[id] == nil && !s.uses(id) {
			return nil, fmt.Errorf("cache %s: %w", id, report.ErrUnknownCache)
		}
	}
	return func(id digest.Digest) bool { return len(ids) == 0 || slices.Contains(ids, id) }, nil
}

// used are the containers that use one of the layers, by the topmost one used.
func (r *Runtime) used(ctx context.Context, s *survey, layers []snapshots.Info) (map[string][]containers.Container, error) {
	ours := map[string]bool{}
	for _, info := range layers {
		ours[info.Name] = true
	}
	list, err := r.client.ContainerService().List(ctx)
	if err != nil {
		return nil, fmt.Errorf("listing containers: %w", r.explain(err))
	}
	used := map[string][]containers.Container{}
	for _, c := range list {
		// Docker keeps a container's snapshot under its ID and does not name it here.
		for _, key := range []string{c.SnapshotKey, c.ID} {
			if layer := s.ancestor(key, ours); layer != "" {
				used[layer] = append(used[layer], c)
				break
			}
		}
	}
	return used, nil
}

// refuse gives an error for each container.
func refuse(used map[string][]containers.Container) error {
	var errs []error
	for _, layer := range slices.Sorted(maps.Keys(used)) {
		for _, c := range used[layer] {
			errs = append(errs, fmt.Errorf("%s uses layer %s of a cache disk: remove the container first",
				describe(c), report.Short(digest.Digest(layer))))
		}
	}
	return errors.Join(errs...)
}

// ancestor is the first snapshot at or below key that is in set.
func (s *survey) ancestor(key string, set map[string]bool) string {
	for key != "" && !set[key] {
		key = s.snapshots[key].Parent
	}
	return key
}

// describe names a container as a person knows it.
func describe(c containers.Container) string {
	name := c.Labels["io.kubernetes.container.name"]
	pod := c.Labels["io.kubernetes.pod.name"]
	switch {
	case name != "":
		return fmt.Sprintf("container %s of pod %s/%s (%s)", name, c.Labels["io.kubernetes.pod.namespace"], pod, c.ID)
	case pod != "":
		return fmt.Sprintf("sandbox of pod %s/%s (%s)", c.Labels["io.kubernetes.pod.namespace"], pod, c.ID)
	}
	return "container " + c.ID
}

// removeRecords removes the image records, after those under the images' IDs that
// the CRI made for them: in the other order a run that is killed in between would
// leave records that nothing shows to be ours. Images whose top layer is used stay.
func (r *Runtime) removeRecords(ctx context.Context, s *survey, wanted func(digest.Digest) bool, used map[string][]containers.Container) ([]string, error) {
	ids, names := map[string]bool{}, []string{}
	for _, record := range s.records(wanted) {
		if r.topIn(ctx, record, used) {
			continue
		}
		names = append(names, record.Name)
		if config, err := record.Config(ctx, r.content, platforms.Default()); err == nil {
			ids[config.Digest.String()] = true
		}
	}
	for name, record := range s.images {
		if isID(name) && r.runsOn(ctx, s, record, wanted) && !r.topIn(ctx, record, used) {
			ids[name] = true
		}
	}
	// What the node has under another name needs its ID too.
	for name, record := range s.images {
		if isID(name) || slices.Contains(names, name) {
			continue
		}
		if config, err := record.Config(ctx, r.content, platforms.Default()); err == nil {
			delete(ids, config.Digest.String())
		}
	}
	return names, r.deleteRecords(ctx, slices.Concat(slices.Sorted(maps.Keys(ids)), names))
}

// deleteRecords removes image records that may be gone.
func (r *Runtime) deleteRecords(ctx context.Context, names []string) error {
	for _, name := range names {
		if err := r.images.Delete(ctx, name); err != nil && !errdefs.IsNotFound(err) {
			return fmt.Errorf("removing image record %s: %w", name, r.explain(err))
		}
	}
	return nil
}

// isID says whether a record's name is an image ID, as the CRI makes it.
func isID(name string) bool { return digest.Digest(name).Validate() == nil }

// runsOn says whether the image's top layer was registered from one of the wanted
// generations.
func (r *Runtime) runsOn(ctx context.Context, s *survey, record images.Image, wanted func(digest.Digest) bool) bool {
	chain, err := r.chain(ctx, record)
	if err != nil || len(chain) == 0 {
		return false
	}
	info := s.snapshots[chainName(chain[len(chain)-1])]
	return isLayer(info) && wanted(cacheOf(info.Labels))
}

// topIn says whether the image's top layer is among the used ones.
func (r *Runtime) topIn(ctx context.Context, record images.Image, used map[string][]containers.Container) bool {
	if len(used) == 0 {
		return false
	}
	chain, err := r.chain(ctx, record)
	return err == nil && len(chain) > 0 && len(used[chainName(chain[len(chain)-1])]) > 0
}

// others are the anchors, with a disk that can be read, of all other generations.
func (s *survey) others(wanted func(digest.Digest) bool) []*anchor {
	var list []*anchor
	for id, a := range s.anchors {
		if !wanted(id) && a.alive() == nil {
			list = append(list, a)
		}
	}
	return list
}

// handOver leads layers that stay because another generation's images have them
// too to that generation's disk, so that the ejected one's can go.
func (r *Runtime) handOver(ctx context.Context, s *survey, wanted func(digest.Digest) bool) error {
	left := s.layers(wanted)
	if len(left) == 0 {
		return nil
	}
	var disks []*cachedisk.Disk
	for _, a := range s.others(wanted) {
		d, err := cachedisk.Open(r.host(r.mountPoint(a)))
		if err != nil {
			return err
		}
		disks = append(disks, d)
	}
	sources := sourcesOf(cachedisk.NewestFirst(disks))
	for _, info := range left {
		from := sources[digest.Digest(info.Name)]
		if len(from) == 0 {
			continue
		}
		link := from[0].link(s.anchors[from[0].disk.ID])
		if err := r.moveLink(ctx, info, link, from[0].disk.ID); err != nil {
			return err
		}
		info.Labels = maps.Clone(info.Labels)
		info.Labels[labelCache] = from[0].disk.ID.String()
		s.snapshots[info.Name] = info
	}
	return nil
}

// whyKept says for each chain of layers that stays, named by its top, what keeps
// it: images, else snapshots.
func (r *Runtime) whyKept(ctx context.Context, s *survey, left []snapshots.Info) []string {
	if len(left) == 0 {
		return nil
	}
	users, children := map[string][]string{}, map[string][]string{}
	for name, record := range s.images {
		if isID(name) {
			continue // says nothing to a person
		}
		if chain, err := r.chain(ctx, record); err == nil {
			for _, id := range chain {
				users[chainName(id)] = append(users[chainName(id)], "image "+name)
			}
		}
	}
	for name, info := range s.snapshots {
		children[info.Parent] = append(children[info.Parent], "snapshot "+name)
	}
	below := map[string]bool{}
	for _, info := range left {
		below[info.Parent] = true
	}
	var kept []string
	for _, info := range left {
		if below[info.Name] {
			continue
		}
		by := users[info.Name]
		if len(by) == 0 {
			by = children[info.Name]
		}
		if len(by) == 0 {
			by = []string{"a lease or content that refers to it"}
		}
		slices.Sort(by)
		kept = append(kept, fmt.Sprintf("layer %s and those below it, for %s", report.Short(digest.Digest(info.Name)), strings.Join(by, ", ")))
	}
	return kept
}

// removeAnchors unmounts the disks that nothing links to any more.
func (r *Runtime) removeAnchors(ctx context.Context, s *survey, wanted func(digest.Digest) bool) error {
	removed := false
	for id, a := range s.anchors {
		if !wanted(id) || s.uses(id) {
			continue
		}
		if err := r.handOverBlobs(ctx, s, a, s.others(wanted)); err != nil {
			return err
		}
		if err := cachedisk.UnmountOnHost(r.opt.HostRoot, r.mountPoint(a)); err != nil {
			return err
		}
		if err := r.snapshots.Remove(ctx, a.name); err != nil && !errdefs.IsNotFound(err) {
			return fmt.Errorf("removing snapshot %s: %w", a.name, r.explain(err))
		}
		removed = true
	}
	if !removed {
		return nil
	}
	return r.collectGarbage(ctx)
}
