package readahead

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sync/semaphore"
	"golang.org/x/sys/unix"
	"golang.org/x/time/rate"

	"github.com/selkies-project/packer-plugin-selkies/injector/cachedisk"
	"github.com/selkies-project/packer-plugin-selkies/manifest"
	"github.com/selkies-project/packer-plugin-selkies/trace"
)

const (
	// depth is how many requests are under way at once, of no more than inFlight bytes
	// together: another's request waits behind them.
	depth    = 32
	inFlight = 1 << 20
	// piece is the most that one of them reads, in bytes: what the kernel reads ahead by
	// itself, so that one of a container's waits behind little.
	piece = 128 << 10
)

// part is one piece of a file, which is opened for the first of its pieces.
type part struct {
	file           int // in the trace
	open           func() (*os.File, error)
	offset, length int64
}

var pageSize = int64(os.Getpagesize())

// pages are those that the kernel reads for p, in bytes.
func (p part) pages() int64 {
	return (p.offset%pageSize + p.length + pageSize - 1) / pageSize * pageSize
}

// read reads the ranges of a trace, no more than opt has left.
func (read *Image) read(ctx context.Context, root *cachedisk.Root, m *manifest.Manifest, img manifest.Image, t *trace.Trace, opt *Options) error {
	began := time.Now()
	defer func() { read.Took = time.Since(began) }()
	o := &opener{}
	defer o.close()
	if err := o.openLayers(root, m, img); err != nil {
		return err
	}
	parts, err := o.split(t, opt.Bytes)
	if err != nil {
		return err
	}
	read.Left = t.Bytes()
	for _, p := range parts {
		read.Left -= p.length
		opt.Bytes -= p.pages()
	}
	var limit *rate.Limiter
	if opt.Rate > 0 {
		limit = rate.NewLimiter(rate.Limit(opt.Rate), piece)
	}
	for len(parts) > 0 && err == nil {
		var n int64
		parts, n, err = readTurn(ctx, parts, limit)
		read.Bytes += n
		if err == nil && len(parts) > 0 && opt.yield != nil {
			err = opt.yield.wait(ctx, parts)
		}
	}
	read.Files = len(o.files)
	return err
}

// readTurn reads for a while, waits for what is under way, and gives what is left and how
// many bytes it has read.
func readTurn(parent context.Context, parts []part, limit *rate.Limiter) (left []part, read int64, err error) {
	end := time.Now().Add(turn)
	g, ctx := errgroup.WithContext(parent)
	g.SetLimit(depth)
	room := semaphore.NewWeighted(inFlight)
	var bytes atomic.Int64
	for len(parts) > 0 && ctx.Err() == nil && time.Now().Before(end) {
		p := parts[0]
		if limit != nil && limit.WaitN(ctx, int(p.pages())) != nil || room.Acquire(ctx, p.pages()) != nil {
			break
		}
		parts = parts[1:]
		g.Go(func() error {
			defer room.Release(p.pages())
			n, err := p.read()
			bytes.Add(n)
			return err
		})
	}
	err = g.Wait()
	if err == nil {
		err = parent.Err()
	}
	return parts, bytes.Load(), err
}

// opener opens the layers of an image and files in them.
type opener struct {
	layers []*cachedisk.Root // base layer first

	mu    sync.Mutex
	files []*os.File
}

func (o *opener) close() {
	for _, l := range o.layers {
		l.Close()
	}
	for _, f := range o.files {
		f.Close()
	}
}

func (o *opener) openLayers(root *cachedisk.Root, m *manifest.Manifest, img manifest.Image) error {
	chain, err := img.ChainIDs()
	if err != nil {
		return err
	}
	at := map[string]manifest.Layer{}
	for _, l := range m.Layers {
		at[l.ChainID.String()] = l
	}
	for _, id := range chain {
		l, err := root.Sub(m.LayerPath(at[id.String()]))
		if err != nil {
			return err
		}
		o.layers = append(o.layers, l)
	}
	return nil
}

// split makes pieces of a trace's ranges, up to limit bytes of pages.
func (o *opener) split(t *trace.Trace, limit int64) ([]part, error) {
	files := make([]func() (*os.File, error), len(t.Files))
	for i, f := range t.Files {
		if f.Layer >= len(o.layers) {
			return nil, fmt.Errorf("files[%d] is of layer %d, the image has %d", i, f.Layer, len(o.layers))
		}
		files[i] = sync.OnceValues(func() (*os.File, error) { return o.open(f) })
	}
	var parts []part
	for _, r := range t.Ranges {
		for r.Length > 0 && limit >= pageSize {
			most := min(piece, limit/pageSize*pageSize) - r.Offset%pageSize
			p := part{r.File, files[r.File], r.Offset, min(r.Length, most)}
			parts = append(parts, p)
			r.Offset, r.Length, limit = r.Offset+p.length, r.Length-p.length, limit-p.pages()
		}
	}
	return parts, nil
}

// open opens a file as overlayfs finds it: it looks in each layer from the top down, in
// directories that are read from the disk as well.
func (o *opener) open(f trace.File) (*os.File, error) {
	for _, above := range o.layers[f.Layer+1:] {
		_, _ = above.CheckFile(f.Path) // there it is, or not
	}
	opened, err := o.layers[f.Layer].Open(f.Path)
	if err != nil {
		return nil, err
	}
	o.mu.Lock()
	o.files = append(o.files, opened)
	o.mu.Unlock()
	// What is asked for is read, and nothing around it.
	if err := unix.Fadvise(int(opened.Fd()), 0, 0, unix.FADV_RANDOM); err != nil {
		return nil, &fs.PathError{Op: "fadvise", Path: opened.Name(), Err: err}
	}
	return opened, nil
}

// read brings a piece into the page cache, and gives its length.
func (p part) read() (int64, error) {
	f, err := p.open()
	if errors.Is(err, fs.ErrPermission) {
		return 0, nil // without CAP_DAC_READ_SEARCH; a container may read it all the same
	}
	if err != nil {
		return 0, err
	}
	failed := func(err error) (int64, error) {
		return 0, &fs.PathError{Op: "read", Path: f.Name(), Err: err}
	}
	if err := unix.Fadvise(int(f.Fd()), p.offset, p.length, unix.FADV_WILLNEED); err != nil {
		return failed(err)
	}
	// Its last byte is there when all of it is.
	n, err := unix.Pread(int(f.Fd()), make([]byte, 1), p.offset+p.length-1)
	switch {
	case err != nil:
		return failed(err)
	case n == 0:
		return 0, nil // the file has become shorter
	}
	return p.length, nil
}
