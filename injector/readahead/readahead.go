// Package readahead reads from a cache disk, before a container does, what the start of
// its image is going to read: the ranges of the image's access trace, in the order of
// first use and many at once. A network disk answers many requests as quickly as one,
// and a start makes them one after the other.
//
// It yields: while others read from the disk what a trace does not have, it waits.
//
// What is read stays in the page cache, as long as the kernel has the memory for it. A
// wrong trace costs time, and nothing else depends on it.
package readahead

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"slices"
	"time"

	"github.com/distribution/reference"
	"github.com/docker/go-units"

	"github.com/selkies-project/packer-plugin-selkies/injector/cachedisk"
	"github.com/selkies-project/packer-plugin-selkies/injector/report"
	"github.com/selkies-project/packer-plugin-selkies/manifest"
	"github.com/selkies-project/packer-plugin-selkies/trace"
)

// Options say how much is read, and in which order.
type Options struct {
	// First names images, as pods name them, whose traces are read before all others, in
	// this order.
	First []string
	// Bytes is the most that is read of one disk; 0 is what DefaultBytes says.
	Bytes int64
	// Rate is how much is read, in bytes a second; 0 is without limit.
	Rate int64

	yield *yield // nil where it cannot be told what others read
}

// Image is what was read of one image.
type Image struct {
	Names []string
	// Bytes of the trace's ranges that are in the page cache now, and the files they are of.
	Bytes int64
	Files int
	// Left is how many bytes were left out, since the limit was reached.
	Left int64
	Took time.Duration
}

// Disk reads the traces that a disk has, one image after the other, and tells of each.
// The error of a trace that cannot be used is one line, and does not stop the others.
func Disk(ctx context.Context, d *cachedisk.Disk, opt Options, done func(Image, error)) error {
	root, err := cachedisk.OpenRoot(d.Dir)
	if err != nil {
		return err
	}
	defer root.Close()
	if opt.Bytes == 0 {
		if opt.Bytes, err = DefaultBytes(); err != nil {
			return err
		}
	}
	opt.yield = newYield(d.Dir)
	for _, img := range inOrder(d.Manifest.Images, opt.First) {
		t, err := readTrace(root, img)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		read := Image{Names: img.Names}
		if err == nil {
			err = read.read(ctx, root, d.Manifest, img, t, &opt)
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		if err != nil {
			err = fmt.Errorf("access trace %s of cache disk %s: %w; it is of no use, build the disk again", trace.Path(img.Config.Digest), d.Dir, err)
		}
		done(read, err)
	}
	return nil
}

// Log is a function for Disk that logs what it is told.
func Log(log *slog.Logger) func(Image, error) {
	return func(img Image, err error) {
		if err != nil {
			log.Warn("not read ahead", "image", report.Title(img.Names), "error", err)
			return
		}
		log.Info("read ahead", "image", report.Title(img.Names), "bytes", units.HumanSize(float64(img.Bytes)),
			"left", units.HumanSize(float64(img.Left)), "files", img.Files, "milliseconds", img.Took.Milliseconds())
	}
}

// readTrace reads an image's trace; fs.ErrNotExist if it has none.
func readTrace(root *cachedisk.Root, img manifest.Image) (*trace.Trace, error) {
	f, err := root.Open(trace.Path(img.Config.Digest))
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, trace.MaxSize+1))
	if err != nil {
		return nil, err
	}
	t, err := trace.Decode(data)
	if err == nil && t.Image != img.Config.Digest {
		err = fmt.Errorf("it is that of image %s", t.Image)
	}
	return t, err
}

// inOrder puts the images that first names first, in its order.
func inOrder(images []manifest.Image, first []string) []manifest.Image {
	place := map[string]int{}
	for i, ref := range first {
		// A reference with a tag and a digest goes by the digest.
		if named, err := reference.ParseDockerRef(ref); err == nil && place[named.String()] == 0 {
			place[named.String()] = i - len(first)
		}
	}
	rank := func(img manifest.Image) (r int) {
		for _, name := range img.Names {
			r = min(r, place[name])
		}
		return r
	}
	images = slices.Clone(images)
	slices.SortStableFunc(images, func(a, b manifest.Image) int { return rank(a) - rank(b) })
	return images
}
