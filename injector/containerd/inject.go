package containerd

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"

	"github.com/selkies-project/packer-plugin-selkies/injector/cachedisk"
	"github.com/selkies-project/packer-plugin-selkies/injector/report"
)

// width is how many images are registered at once. containerd commits one
// database transaction at a time: more than four gain nothing.
const width = 4

// Inject registers the images of the disks. An image becomes visible when all that
// it needs is there. If nothing is to be done, nothing is written. An image or a
// disk that fails does not hold the others up: then there is a report and an error,
// and another run completes what is missing. Without disks it only clears away what
// killed runs and a containerd whose state was emptied have left.
func (r *Runtime) Inject(ctx context.Context, disks []*cachedisk.Disk, opt report.InjectOptions) (*report.Inject, error) {
	start := time.Now()
	ctx = r.context(ctx)
	disks = cachedisk.NewestFirst(disks)
	s, err := r.survey(ctx)
	if err != nil {
		return nil, err
	}
	jobs, err := r.jobs(s, disks, opt)
	if err != nil {
		return nil, err
	}
	if opt.DryRun || len(s.stale) == 0 && len(s.strays) == 0 && s.complete(disks, jobs) {
		out := r.reportUnchanged(disks, jobs, opt, start)
		if refusal := r.checkRoom(jobs); refusal != nil {
			out.Refusal = refusal.Error()
		}
		return out, nil
	}
	unlock, err := r.lock(ctx)
	if err != nil {
		return nil, err
	}
	defer unlock()
	if err := r.remount(ctx, disks); err != nil {
		return nil, err
	}
	if err := r.checkRoom(jobs); err != nil {
		return nil, err
	}
	return r.inject(ctx, disks, opt, start)
}

// complete says whether the node has all that it is to have.
func (s *survey) complete(disks []*cachedisk.Disk, jobs []*job) bool {
	for _, j := range jobs {
		if !j.done() {
			return false
		}
	}
	for _, d := range disks {
		if a := s.anchors[d.ID]; a == nil && s.uses(d.ID) || a != nil && a.alive() != nil {
			return false
		}
	}
	return true
}

// uses says whether anything is registered from the generation.
func (s *survey) uses(cache digest.Digest) bool {
	is := func(c digest.Digest) bool { return c == cache }
	return len(s.layers(is)) > 0 || len(s.records(is)) > 0
}

// inject does the work; the caller holds the lock. It looks again, for the run
// that held the lock before may have done it all, or an eject have taken it back.
func (r *Runtime) inject(ctx context.Context, disks []*cachedisk.Disk, opt report.InjectOptions, start time.Time) (_ *report.Inject, err error) {
	ctx, release, err := r.lease(ctx)
	if err != nil {
		return nil, err
	}
	defer func() {
		if e := release(err == nil); err == nil {
			err = e
		}
	}()
	s, err := r.survey(ctx)
	if err != nil {
		return nil, err
	}
	if err := r.clearStrays(s.strays); err != nil {
		return nil, err
	}
	jobs, err := r.jobs(s, disks, opt)
	if err != nil {
		return nil, err
	}
	if s.complete(disks, jobs) {
		return r.reportUnchanged(disks, jobs, opt, start), nil
	}
	run := r.newRun(s, opt)
	disks, diskErr := run.anchor(ctx, disks, jobs)
	if len(disks) == 0 && diskErr != nil {
		return nil, diskErr
	}
	if jobs, err = r.jobs(s, disks, opt); err != nil {
		return nil, errors.Join(err, diskErr)
	}
	done, err := run.all(ctx, jobs)
	if done == nil {
		return nil, errors.Join(err, diskErr)
	}
	return r.reportInject(disks, jobs, done, start), errors.Join(err, diskErr)
}

// run is one run of inject. Layers and blobs that images share are registered by
// the first that needs them, while the others wait.
type run struct {
	r       *Runtime
	opt     report.InjectOptions
	id      string
	survey  *survey
	sources map[digest.Digest][]source

	// bottom makes the snapshot below all base layers.
	bottom func() error

	mu     sync.Mutex
	layers map[digest.Digest]func() (bool, error)
	blobs  map[digest.Digest]func() error
}

func (r *Runtime) newRun(s *survey, opt report.InjectOptions) *run {
	return &run{
		r:      r,
		opt:    opt,
		id:     "selkies-image-injector-" + rand.Text(),
		survey: s,
		layers: map[digest.Digest]func() (bool, error){},
		blobs:  map[digest.Digest]func() error{},
	}
}

// anchor mounts every disk that the node needs, and returns all but those for which
// that failed.
func (n *run) anchor(ctx context.Context, disks []*cachedisk.Disk, jobs []*job) (left []*cachedisk.Disk, err error) {
	var mounted []*cachedisk.Disk
	for _, d := range disks {
		if n.survey.needs(d, jobs) {
			a, e := n.r.ensureAnchor(ctx, n.id, d)
			if e != nil {
				err = errors.Join(err, e)
				continue
			}
			n.survey.anchors[d.ID] = a
			mounted = append(mounted, d)
		}
		left = append(left, d)
	}
	n.sources = sourcesOf(mounted)
	return left, err
}

// needs says whether anything is, or is to be, registered from the disk. Of a disk that
// was ejected nothing is.
func (s *survey) needs(d *cachedisk.Disk, jobs []*job) bool {
	return s.anchors[d.ID] != nil || s.uses(d.ID) ||
		slices.ContainsFunc(jobs, func(j *job) bool { return j.disk == d && !j.done() })
}

// all registers the images and reports each. Without containerd, with one that does not
// answer, or after an interrupt, there is no report.
func (n *run) all(ctx context.Context, jobs []*job) ([]report.Image, error) {
	n.bottom = sync.OnceValue(func() error {
		_, err := n.r.commit(ctx, n.id, bottomName, "", nil, syncDir)
		return err
	})
	done, errs := make([]report.Image, len(jobs)), make([]error, len(jobs))
	one := func(ctx context.Context, i int) error {
		err := ctx.Err()
		if err == nil {
			done[i], err = n.image(ctx, jobs[i])
		}
		if err != nil {
			err = fmt.Errorf("image %s: %w", report.Title(jobs[i].image.Names), err)
		}
		if ctx.Err() != nil || errdefs.IsUnavailable(err) || errors.Is(err, context.DeadlineExceeded) {
			return err
		}
		n.opt.Report(done[i])
		errs[i] = err
		return nil
	}
	var first []string
	if n.opt.First != nil && slices.ContainsFunc(jobs, func(j *job) bool { return !j.done() }) {
		first = n.opt.First(ctx)
	}
	wanted := order(jobs, first)
	// The first one that makes a snapshot has containerd for itself: a pod may wait for
	// it, and what isForgotten says must not happen to two at once. While one removes the
	// directory, the other may have been given it.
	for alone := true; alone && len(wanted) > 0; wanted = wanted[1:] {
		if err := one(ctx, wanted[0]); err != nil {
			return nil, err
		}
		alone = len(jobs[wanted[0]].absent) == 0
	}
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(width)
	for _, i := range wanted {
		g.Go(func() error { return one(ctx, i) })
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	return done, errors.Join(byDisk(jobs, errs)...)
}

// byDisk is the errors of images, but one alone for all those of a disk that cannot be
// read any more.
func byDisk(jobs []*job, errs []error) (all []error) {
	lost := map[*cachedisk.Disk]error{}
	for i, err := range errs {
		if err == nil {
			continue
		}
		d := jobs[i].disk
		dead, known := lost[d]
		if !known {
			dead = d.Lost()
			lost[d] = dead
			if dead != nil {
				all = append(all, dead)
			}
		}
		if dead == nil {
			all = append(all, err)
		}
	}
	return all
}

// image registers one image and says what became of it, also after an error.
func (n *run) image(ctx context.Context, j *job) (report.Image, error) {
	img, err := n.register(ctx, j)
	if err != nil {
		img.State, img.Reason = report.Failed, err.Error()
	}
	return img, err
}

// register registers one image: layers, blobs beside them, and the names last.
func (n *run) register(ctx context.Context, j *job) (report.Image, error) {
	start := time.Now()
	img := j.report()
	if j.done() {
		return img, nil
	}
	img.Registered, img.Present = 0, 0
	var g errgroup.Group
	g.Go(func() error { return n.addLayers(ctx, j, &img) })
	g.Go(func() error { return n.writeBlobs(ctx, j) })
	if err := g.Wait(); err != nil {
		return img, err
	}
	if err := n.r.held(ctx); err != nil {
		return img, err
	}
	for _, name := range j.write {
		left, err := n.name(ctx, j, name)
		if err != nil {
			return img, err
		}
		switch left {
		case "":
			continue
		case wasRemoved(name):
			img.Removed = append(img.Removed, name)
		}
		img.Reason = strings.TrimPrefix(img.Reason+"; "+left, "; ")
	}
	if err := n.kept(ctx, j); err != nil {
		return img, err
	}
	img.Milliseconds = time.Since(start).Milliseconds()
	n.r.opt.Log.Debug("registered", "image", j.image.Names[0], "layers", img.Registered, "present", img.Present)
	return img, nil
}

// addLayers registers the image's layers, and counts them.
func (n *run) addLayers(ctx context.Context, j *job, img *report.Image) error {
	for _, id := range j.chain {
		added, err := n.layer(ctx, id)
		if err != nil {
			return err
		}
		switch {
		case added:
			img.Registered++
		case j.absent[id]: // a pull was faster
			img.Present++
			img.Cached--
		default:
			img.Present++
		}
	}
	return nil
}

func (n *run) writeBlobs(ctx context.Context, j *job) error {
	for _, b := range j.blobs {
		if err := n.blob(ctx, b, j.disk); err != nil {
			return err
		}
	}
	return nil
}

// kept fails if the lease was gone before the image's records kept what they lead to, and
// something of that is gone too: then they go again.
func (n *run) kept(ctx context.Context, j *job) error {
	lost := n.r.held(ctx)
	if lost == nil {
		return nil
	}
	var errs []error
	for _, id := range j.chain {
		_, err := n.r.snapshots.Stat(ctx, chainName(id))
		errs = append(errs, err)
	}
	for _, b := range j.blobs {
		_, err := n.r.content.Info(ctx, b.desc.Digest)
		errs = append(errs, err)
	}
	if errors.Join(errs...) == nil {
		return nil
	}
	return errors.Join(lost, n.r.deleteRecords(ctx, j.write))
}

// layer registers the chain id, whose parent is there, and says whether this run
// made it.
func (n *run) layer(ctx context.Context, id digest.Digest) (bool, error) {
	n.mu.Lock()
	once, ok := n.layers[id]
	if !ok {
		once = sync.OnceValues(func() (bool, error) { return n.registerLayer(ctx, id) })
		n.layers[id] = once
	}
	n.mu.Unlock()
	return once()
}

func (n *run) registerLayer(ctx context.Context, id digest.Digest) (bool, error) {
	src := n.sources[id][0]
	parent := chainName(src.layer.Parent)
	if parent == "" {
		if err := n.bottom(); err != nil {
			return false, err
		}
		parent = bottomName
	}
	added, err := n.r.commit(ctx, n.id, chainName(id), parent,
		map[string]string{labelCache: src.disk.ID.String()}, placeLink(src.link(n.survey.anchors[src.disk.ID])))
	if err != nil || added {
		return added, err
	}
	// Not as the survey saw it: it may have been removed and made again meanwhile.
	info, err := n.r.snapshots.Stat(ctx, chainName(id))
	if err != nil {
		return false, fmt.Errorf("looking up snapshot %s: %w", id, n.r.explain(err))
	}
	if src, wrong := n.r.wrongLink(n.survey, info, n.sources[id]); wrong {
		return false, n.r.moveLink(ctx, info, src.link(n.survey.anchors[src.disk.ID]), src.disk.ID)
	}
	return false, nil
}

func (n *run) blob(ctx context.Context, b blob, d *cachedisk.Disk) error {
	n.mu.Lock()
	once, ok := n.blobs[b.desc.Digest]
	if !ok {
		once = sync.OnceValue(func() error {
			return n.r.writeBlob(ctx, n.id, b, n.survey.anchors[d.ID])
		})
		n.blobs[b.desc.Digest] = once
	}
	n.mu.Unlock()
	return once()
}

// name makes or changes one image record. If another program made one in the meantime,
// or removed one that is not to be made again, it stays so, and left says that.
func (n *run) name(ctx context.Context, j *job, name string) (left string, err error) {
	record := j.record(name)
	if known, ok := n.survey.images[name]; ok {
		if j.lacksID(n.survey, known) {
			record.Labels[labelManaged] = "" // removes it
		}
		var labels []string
		for key := range record.Labels {
			labels = append(labels, "labels."+key)
		}
		paths := labels
		if known.Target.Digest != record.Target.Digest {
			paths = append(slices.Clone(labels), "target")
		}
		got, err := n.r.images.Update(ctx, record, paths...)
		if err == nil && got.Target.Digest != record.Target.Digest {
			// The image that was pulled is not ours to pin.
			for key := range record.Labels {
				record.Labels[key] = ""
			}
			if _, err = n.r.images.Update(ctx, record, labels...); err == nil {
				return name + " was pulled meanwhile", nil
			}
		}
		if err == nil {
			return "", nil
		}
		if !errdefs.IsNotFound(err) { // removed meanwhile
			return "", fmt.Errorf("updating image record %s: %w", name, n.r.explain(err))
		}
		if n.opt.WasRemoved(j.disk.ID, name) {
			return wasRemoved(name), nil
		}
	}
	_, err = n.r.images.Create(ctx, record)
	if errdefs.IsAlreadyExists(err) {
		return name + " was pulled meanwhile", nil
	}
	if err != nil {
		return "", fmt.Errorf("creating image record %s: %w", name, n.r.explain(err))
	}
	return "", nil
}

// reportUnchanged is the report of a run that changes nothing.
func (r *Runtime) reportUnchanged(disks []*cachedisk.Disk, jobs []*job, opt report.InjectOptions, start time.Time) *report.Inject {
	var done []report.Image
	for _, j := range jobs {
		done = append(done, j.report())
		opt.Report(j.report())
	}
	return r.reportInject(disks, jobs, done, start)
}

// reportInject puts the images under their disks.
func (r *Runtime) reportInject(disks []*cachedisk.Disk, jobs []*job, done []report.Image, start time.Time) *report.Inject {
	out := &report.Inject{Runtime: r.name(), Disks: []report.Disk{}}
	seen := map[digest.Digest]bool{}
	for _, d := range disks {
		rd := report.Disk{Dir: d.Dir, CacheID: d.ID, Created: d.Manifest.Created, Images: []report.Image{}}
		for i, j := range jobs {
			if j.disk != d {
				continue
			}
			rd.Images = append(rd.Images, done[i])
			if j.skipped() || done[i].State == report.Failed {
				continue
			}
			for _, id := range j.chain {
				if seen[id] {
					continue
				}
				seen[id] = true
				if j.absent[id] {
					rd.Registered++
				} else {
					rd.Present++
				}
				if j.cached[id] {
					rd.Cached++
				}
			}
		}
		out.Disks = append(out.Disks, rd)
	}
	out.Milliseconds = time.Since(start).Milliseconds()
	return out
}
