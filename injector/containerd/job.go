package containerd

import (
	"cmp"
	"fmt"
	"os"
	"slices"
	"strings"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"

	"github.com/selkies-project/packer-plugin-selkies/injector/cachedisk"
	"github.com/selkies-project/packer-plugin-selkies/injector/report"
	"github.com/selkies-project/packer-plugin-selkies/manifest"
)

// labelPinned keeps kubelet's image garbage collection away. The CRI adds its
// other label, labelManaged, itself, and with it the record under the
// image's ID, which it does not create where the label is there already.
const (
	labelPinned  = "io.cri-containerd.pinned"
	labelManaged = "io.cri-containerd.image"
	pinned       = "pinned"
)

// job is one image of one disk, and what the node lacks of it.
type job struct {
	disk  *cachedisk.Disk
	image manifest.Image
	chain []digest.Digest
	blobs []blob

	// write are the names whose image records are to be made or changed.
	write []string
	// left says of each name that is left to another image, why.
	left []string
	// removed are those of them that someone removed.
	removed []string
	// cached are the layers that are, or will be, read from a cache disk.
	cached map[digest.Digest]bool
	// absent are the layers to be registered; broken counts those whose link leads
	// nowhere and is to be moved, lacking the blobs to be written.
	absent          map[digest.Digest]bool
	broken, lacking int
}

// source says which of the run's disks a layer is read from.
type source struct {
	disk  *cachedisk.Disk
	layer manifest.Layer
}

// jobs compares the disks, newest generation first, with what the node has.
func (r *Runtime) jobs(s *survey, disks []*cachedisk.Disk, opt report.InjectOptions) ([]*job, error) {
	claimed := map[string]*cachedisk.Disk{}
	sources := sourcesOf(disks)
	var jobs []*job
	for _, d := range disks {
		ejected := opt.WasEjected(d.ID)
		for _, img := range d.Manifest.Images {
			j := &job{disk: d, image: img, absent: map[digest.Digest]bool{}, cached: map[digest.Digest]bool{}}
			var err error
			if j.chain, err = img.ChainIDs(); err != nil {
				return nil, fmt.Errorf("cache %s: image %s: %w", d.ID, img.Names[0], err)
			}
			if j.blobs, err = blobsOf(d, img, j.chain); err != nil {
				return nil, fmt.Errorf("cache %s: image %s: %w", d.ID, img.Names[0], err)
			}
			for _, name := range img.Names {
				if other, ok := claimed[name]; ok {
					j.left = append(j.left, fmt.Sprintf("%s comes from the newer cache %s", name, report.Short(other.ID)))
					continue
				}
				claimed[name] = d
				if _, ok := s.images[name]; !ok && (ejected || opt.Removed[name]) {
					j.left = append(j.left, wasRemoved(name))
					j.removed = append(j.removed, name)
					continue
				}
				j.compareName(s, name)
			}
			if !j.skipped() {
				j.compareLayers(r, s, sources)
				j.compareBlobs(r, s)
			}
			jobs = append(jobs, j)
		}
	}
	return jobs, addOrigins(jobs)
}

// wasRemoved says of a name why it is left alone.
func wasRemoved(name string) string { return name + " was removed on this node" }

// compareName decides about one of the image's names. What the node has wins,
// unless it is from an older generation of ours.
func (j *job) compareName(s *survey, name string) {
	record, ok := s.images[name]
	if !ok {
		j.write = append(j.write, name)
		return
	}
	ours := recordCache(record)
	same := record.Target.Digest == j.image.Target().Digest
	switch {
	case ours == j.disk.ID && same:
		if record.Labels[labelPinned] != pinned || j.lacksID(s, record) {
			j.write = append(j.write, name)
		}
	case ours != "":
		if s.outranked(ours, j.disk) {
			j.write = append(j.write, name)
		} else if !same {
			j.left = append(j.left, fmt.Sprintf("%s comes from the newer cache %s", name, report.Short(ours)))
		}
	case !same:
		j.left = append(j.left, fmt.Sprintf("%s is %s on this node", name, report.Short(record.Target.Digest)))
	case j.runsOnOurs(s):
		// A pull of the same image replaced all labels of our record.
		j.write = append(j.write, name)
	}
}

// lacksID says whether the record under the image's ID is gone, as where an eject was
// killed or the power was lost during it. The CRI makes it with its label only.
func (j *job) lacksID(s *survey, record images.Image) bool {
	_, there := s.images[j.image.Config.Digest.String()]
	return !there && record.Labels[labelManaged] != ""
}

// runsOnOurs says whether the image's layers are those that we registered.
func (j *job) runsOnOurs(s *survey) bool {
	return len(j.chain) > 0 && isLayer(s.snapshots[chainName(j.chain[len(j.chain)-1])])
}

// outranked says whether d takes over from the generation cache: because d is
// newer, or because the disk of the other is gone.
func (s *survey) outranked(cache digest.Digest, d *cachedisk.Disk) bool {
	a := s.anchors[cache]
	return a == nil || a.created.Before(d.Manifest.Created) || (cache != d.ID && a.alive() != nil)
}

func (j *job) compareLayers(r *Runtime, s *survey, sources map[digest.Digest][]source) {
	for _, id := range j.chain {
		switch {
		case !s.committed(id):
			j.absent[id], j.cached[id] = true, true
		default:
			j.cached[id] = isLayer(s.snapshots[chainName(id)])
			if _, wrong := r.wrongLink(s, s.snapshots[chainName(id)], sources[id]); wrong {
				j.broken++
			}
		}
	}
}

// wrongLink says whether the link of a snapshot is to be moved, and to
// which of the sources. What is not ours has no link to move.
func (r *Runtime) wrongLink(s *survey, info snapshots.Info, from []source) (source, bool) {
	if !isLayer(info) || len(from) == 0 {
		return source{}, false
	}
	src := sourceFor(from, cacheOf(info.Labels))
	if src.disk.ID != cacheOf(info.Labels) {
		// It leads to a disk that is not in this run, or not any more.
		a := s.anchors[cacheOf(info.Labels)]
		return src, a == nil || a.alive() != nil || r.link(info) == ""
	}
	a := s.anchors[src.disk.ID]
	return src, a == nil || r.link(info) != src.link(a)
}

func (j *job) compareBlobs(r *Runtime, s *survey) {
	for _, b := range j.blobs {
		info, ok := s.blobs[b.desc.Digest]
		if ok && b.file != "" {
			// Its link may lead to a disk that is gone.
			_, err := os.Stat(r.host(r.blobFile(b.desc.Digest)))
			ok = err == nil
		}
		if !ok || len(lacks(info.Labels, b.refs)) > 0 {
			j.lacking++
		}
	}
}

// skipped images have no name left.
func (j *job) skipped() bool { return len(j.left) == len(j.image.Names) }

// done says whether nothing is to be done for the image.
func (j *job) done() bool {
	return j.skipped() || len(j.write) == 0 && len(j.absent) == 0 && j.broken == 0 && j.lacking == 0
}

// report is what a dry run would say, or a run that has nothing to do.
func (j *job) report() report.Image {
	r := report.Image{
		Names:      j.image.Names,
		State:      report.Registered,
		Reason:     strings.Join(j.left, "; "),
		Layers:     len(j.chain),
		Registered: len(j.absent),
		Present:    len(j.chain) - len(j.absent),
		Removed:    j.removed,
	}
	for _, cached := range j.cached {
		if cached {
			r.Cached++
		}
	}
	switch {
	case j.skipped():
		r.State, r.Registered, r.Present = report.Skipped, 0, 0
	case j.done():
		r.State = report.Present
	}
	return r
}

// record is the image record for one of the image's names.
func (j *job) record(name string) images.Image {
	target := j.image.Target()
	target.Data = nil
	return images.Image{
		Name:   name,
		Target: target,
		Labels: map[string]string{
			labelPinned: pinned,
			labelCache:  j.disk.ID.String(),
			labelTarget: target.Digest.String(),
		},
	}
}

// link is where the layer's snapshot links to; a is the anchor of its disk.
func (s source) link(a *anchor) string { return layerLink(a.dir, s.disk.Manifest, s.layer) }

// order is the order in which the jobs are done, as indices: the images that first
// names, as it names them, then those that share the most layers with others, since
// with each of them others become quicker.
func order(jobs []*job, first []string) []int {
	wanted := map[string]int{}
	for i, ref := range first {
		named, err := reference.ParseNormalizedNamed(ref)
		if err != nil {
			continue // such as an image ID
		}
		if name := lookupName(named); wanted[name] == 0 {
			wanted[name] = len(first) - i
		}
	}
	users := map[digest.Digest]int{}
	for _, j := range jobs {
		for _, id := range j.chain {
			users[id]++
		}
	}
	type rank struct{ job, wanted, shared int }
	ranks := make([]rank, len(jobs))
	for i, j := range jobs {
		ranks[i].job = i
		for _, name := range j.image.Names {
			ranks[i].wanted = max(ranks[i].wanted, wanted[name])
		}
		for _, id := range j.chain {
			if users[id] > 1 {
				ranks[i].shared++
			}
		}
	}
	slices.SortStableFunc(ranks, func(a, b rank) int {
		return cmp.Or(cmp.Compare(b.wanted, a.wanted), cmp.Compare(b.shared, a.shared))
	})
	indices := make([]int, len(ranks))
	for i, r := range ranks {
		indices[i] = r.job
	}
	return indices
}

// sourcesOf says where each chain can be read, in the order of the disks.
func sourcesOf(disks []*cachedisk.Disk) map[digest.Digest][]source {
	m := map[digest.Digest][]source{}
	for _, d := range disks {
		for _, l := range d.Manifest.Layers {
			m[l.ChainID] = append(m[l.ChainID], source{d, l})
		}
	}
	return m
}

// sourceFor prefers the disk that the layer was registered from.
func sourceFor(from []source, cache digest.Digest) source {
	for _, s := range from {
		if s.disk.ID == cache {
			return s
		}
	}
	return from[0]
}
