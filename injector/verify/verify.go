// Package verify proves that a cache disk holds its images' layers bit for bit.
//
// Docker keeps of each layer's tar stream what is not in the files: headers and
// padding, in tar-split.json.gz. With the files' contents put back in their places
// the stream must hash to the layer's diff ID. That proves names, contents and the
// recorded headers; that the files on the disk have the owners, modes, times, links
// and extended attributes of those headers is not in the hash, so each is compared,
// with whiteouts and opaque directories in overlayfs' form. Nothing may be there
// that is not in the stream, but directories that only lead to something. Compressed
// blobs, where the disk keeps them, must hash to their digests.
//
// The disk is data from elsewhere: nothing on it leads out of it. What it can take of
// memory and time is bounded by its size and by that of the recorded headers, which
// are read up to a bound, and none of which costs more than its length.
package verify

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
	"golang.org/x/time/rate"

	"github.com/selkies-project/packer-plugin-selkies/injector/cachedisk"
	"github.com/selkies-project/packer-plugin-selkies/injector/report"
	"github.com/selkies-project/packer-plugin-selkies/manifest"
)

// parallel is how many layers are read at once. Hashing keeps a core busy.
const parallel = 4

// maxProblems bounds what is said of one layer.
const maxProblems = 10

// Options say how a disk is verified. The zero value is as fast as the disk allows.
type Options struct {
	// Rate is how much is read, in bytes a second; 0 is without limit. With a limit one
	// layer is read at a time, and little of it ahead.
	Rate int64
	// Resume is a file that notes which layers are proved; those that an earlier run
	// has noted of the same generation are not read again. Empty is none.
	Resume string
	// Progress, if not nil, is told now and then how far it is.
	Progress func(Progress)
}

// Progress says how many layers, of all, are done, how many of them are damaged, and
// how many bytes are read of those that the files have.
type Progress struct {
	Layers, Of   int
	Damaged      int
	Bytes, Total int64
}

// progressTime is the longest time between two reports of progress.
const progressTime = 10 * time.Second

// run is one verification.
type run struct {
	disk    *cachedisk.Disk
	root    *cachedisk.Root
	opt     Options
	limit   *rate.Limiter // nil without one
	depth   int
	size    int64        // of the disk
	claimed atomic.Int64 // what of it is accounted for
	bytes   atomic.Int64 // that were read
	blobs   map[digest.Digest][]blob
	resumed map[digest.Digest]bool
	resume  *resume
}

// Disk verifies every layer of a cache disk. Damage is in the report; the error is
// for a verification that could not be finished.
func Disk(ctx context.Context, d *cachedisk.Disk, opt Options) (*report.Verify, error) {
	r, err := newRun(d, opt)
	if err != nil {
		return nil, fmt.Errorf("verifying cache disk %s: %w", d.Dir, err)
	}
	defer r.close()
	rep, err := r.all(ctx)
	if err != nil {
		return nil, fmt.Errorf("verifying cache disk %s: %w", d.Dir, err)
	}
	return rep, nil
}

func newRun(d *cachedisk.Disk, opt Options) (*run, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(d.Dir, &st); err != nil {
		return nil, err
	}
	r := &run{disk: d, opt: opt, depth: depth, size: int64(st.Blocks) * st.Bsize}
	if opt.Rate > 0 {
		r.limit, r.depth = rate.NewLimiter(rate.Limit(opt.Rate), chunk), 1
	}
	var err error
	if r.blobs, err = blobsOf(d.Manifest); err != nil {
		return nil, err
	}
	if r.root, err = cachedisk.OpenRoot(d.Dir); err != nil {
		return nil, err
	}
	if r.resume, r.resumed, err = openResume(opt.Resume, d.ID); err != nil {
		r.root.Close()
		return nil, err
	}
	return r, nil
}

func (r *run) close() {
	r.root.Close()
	r.resume.close()
}

func (r *run) all(ctx context.Context) (*report.Verify, error) {
	start := time.Now()
	m := r.disk.Manifest
	rep := &report.Verify{Dir: r.disk.Dir, CacheID: r.disk.ID, Layers: len(m.Layers)}
	p := Progress{Of: len(m.Layers)}
	order := make([]int, 0, len(m.Layers))
	for i, l := range m.Layers {
		if r.resumed[l.ChainID] {
			rep.Resumed++
			p.Layers++
			continue
		}
		p.Total += l.Size
		order = append(order, i)
	}
	// The longest first, so that none of them is read alone in the end.
	slices.SortStableFunc(order, func(a, b int) int { return cmp.Compare(m.Layers[b].Size, m.Layers[a].Size) })

	damaged := make([]*report.DamagedLayer, len(m.Layers))
	var mu sync.Mutex
	told := start
	tell := func(layers, broken int) {
		mu.Lock()
		defer mu.Unlock()
		p.Layers += layers
		p.Damaged += broken
		if r.opt.Progress == nil || layers == 0 && time.Since(told) < progressTime {
			return
		}
		told = time.Now()
		p.Bytes = r.bytes.Load()
		r.opt.Progress(p)
	}
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(parallel)
	if r.limit != nil {
		g.SetLimit(1)
	}
	for _, i := range order {
		g.Go(func() error {
			l := m.Layers[i]
			problems, err := r.layer(ctx, l, func() { tell(0, 0) })
			if err := errors.Join(ctx.Err(), err); err != nil {
				return err
			}
			if len(problems) > 0 {
				tell(1, 1)
				damaged[i] = &report.DamagedLayer{ChainID: l.ChainID, DiffID: l.DiffID, Directory: m.LayerPath(l), Problems: problems}
				return nil
			}
			tell(1, 0)
			return r.resume.note(l.ChainID)
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	for _, l := range damaged {
		if l != nil {
			rep.Damaged = append(rep.Damaged, *l)
		}
	}
	rep.Bytes = r.bytes.Load()
	rep.Milliseconds = time.Since(start).Milliseconds()
	return rep, nil
}

// layer verifies one layer and says what is wrong with it. What may not be read is
// an error: it says nothing about the layer.
func (r *run) layer(ctx context.Context, l manifest.Layer, tell func()) ([]string, error) {
	problems, err := r.files(ctx, l, tell)
	if err == nil {
		var more []string
		more, err = r.layerBlobs(ctx, l, tell)
		problems = append(problems, more...)
	}
	switch {
	case errors.Is(err, fs.ErrPermission):
		return nil, fmt.Errorf("layer %s: %w; run as root, in a container with CAP_DAC_READ_SEARCH", l.ChainID, err)
	case errors.Is(err, errTooMuch):
		return nil, err
	case err != nil:
		problems = append(problems, err.Error())
	}
	if more := len(problems) - maxProblems; more > 0 {
		problems = append(problems[:maxProblems], fmt.Sprintf("and %d more", more))
	}
	return problems, nil
}

// errTooMuch is of layers that have more than their disk. An honest one has as many
// bytes on the disk as in its stream.
var errTooMuch = errors.New("its layers have more bytes than it has itself; build the disk again")

// claim accounts for a file, or a blob, of n bytes.
func (r *run) claim(n int64) error {
	if n < 0 || n > r.size || r.claimed.Add(n) > r.size {
		return errTooMuch
	}
	return nil
}

// count counts bytes that are about to be read and waits for their time.
func (r *run) count(ctx context.Context, n int, tell func()) error {
	r.bytes.Add(int64(n))
	tell()
	return r.wait(ctx, n)
}

// metadata is about what a path has on the disk beside its contents, in bytes.
const metadata = 512

// throttled reads no faster than wait allows.
type throttled struct {
	r    io.Reader
	wait func(n int) error
}

func (t throttled) Read(p []byte) (int, error) {
	p = p[:min(len(p), chunk)]
	if err := t.wait(len(p)); err != nil {
		return 0, err
	}
	return t.r.Read(p)
}

// wait waits until n more bytes may be read.
func (r *run) wait(ctx context.Context, n int) error {
	if r.limit != nil {
		return r.limit.WaitN(ctx, n)
	}
	return ctx.Err()
}

// files verifies the layer's files.
func (r *run) files(ctx context.Context, l manifest.Layer, tell func()) ([]string, error) {
	path := r.disk.Manifest.LayerPath(l)
	dir, err := r.root.Sub(path)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	s := &stream{claim: r.claim, read: func(ctx context.Context, n int) error { return r.count(ctx, n, tell) }}
	got, want, headersErr, err := r.rebuild(ctx, l, dir, s)
	if errors.Is(err, errDamaged) || err == nil && got != l.DiffID {
		s = &stream{claim: func(int64) error { return nil }, read: r.wait, named: true}
		_, want, headersErr, err = r.rebuild(ctx, l, dir, s)
	}
	problems := s.problems
	switch {
	case err != nil:
		return problems, err
	case headersErr != nil:
		return append(problems, fmt.Sprintf("reading its recorded headers: %v", headersErr)), nil
	}
	more, err := want.compare(filepath.Join(r.disk.Dir, path), func() error { return r.wait(ctx, metadata) })
	problems = append(problems, more...)
	if got != l.DiffID && len(problems) == 0 {
		problems = []string{fmt.Sprintf("its tar stream hashes to %s, not to its diff ID %s: its recorded headers %s are others",
			got, l.DiffID, r.disk.Manifest.TarSplitPath(l))}
	}
	return problems, err
}

// rebuild rebuilds the layer's tar stream as s says, and gives its digest, and what it
// unpacks to or why that cannot be told.
func (r *run) rebuild(ctx context.Context, l manifest.Layer, dir *cachedisk.Root, s *stream) (_ digest.Digest, want tree, headersErr, err error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	split, err := r.root.Open(r.disk.Manifest.TarSplitPath(l))
	if err != nil {
		return "", nil, nil, fmt.Errorf("reading its recorded headers: %w", err)
	}
	defer split.Close()
	records := records(ctx, throttled{split, func(n int) error { return r.wait(ctx, n) }}, dir, r.depth)
	defer func() {
		cancel()
		go func() { // which may hang with its device
			for e := range records {
				e.close()
			}
		}()
	}()

	digester := l.DiffID.Algorithm().Digester()
	s.headers, s.hash = newPieces(), digester.Hash()
	read := make(chan struct{})
	go func() {
		want, headersErr = s.headers.tree(ctx)
		close(read)
	}()
	err = s.rebuild(ctx, records)
	close(s.headers.in)
	<-read
	return digester.Digest(), want, headersErr, err
}
