// Package verify proves that a cache disk holds its images' layers bit for bit.
//
// Docker keeps of each layer's tar stream what is not in the files: headers and
// padding, in tar-split.json.gz. With the files' contents put back in their places
// the stream must hash to the layer's diff ID. That proves names, contents and the
// recorded headers; that the files on the disk have the owners, modes, times, links
// and extended attributes of those headers is not in the hash, so each is compared,
// with whiteouts and opaque directories in overlayfs' form. Nothing may be there
// that is not in the stream, but directories that only lead to something.
package verify

import (
	"archive/tar"
	"bufio"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/vbatts/tar-split/tar/asm"
	"github.com/vbatts/tar-split/tar/storage"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/selkies-project/packer-plugin-selkies/injector/cachedisk"
	"github.com/selkies-project/packer-plugin-selkies/injector/report"
	"github.com/selkies-project/packer-plugin-selkies/manifest"
)

// Parallel is how many layers are read at once. Hashing keeps a core busy.
const Parallel = 4

// maxProblems bounds what is said of one layer.
const maxProblems = 10

// Progress is told when a layer is done: how many of all, and the bytes hashed.
type Progress func(done, total int, bytes int64)

// Disk verifies every layer of a cache disk. Damage is in the report; the error is
// for a verification that could not be finished.
func Disk(ctx context.Context, d *cachedisk.Disk, progress Progress) (*report.Verify, error) {
	start := time.Now()
	// The disk is data from elsewhere: nothing on it may lead out of it.
	root, err := os.OpenRoot(d.Dir)
	if err != nil {
		return nil, fmt.Errorf("verifying cache disk: %w", err)
	}
	defer root.Close()
	m := d.Manifest
	rep := &report.Verify{Dir: d.Dir, CacheID: d.ID, Layers: len(m.Layers)}
	damaged := make([]*report.DamagedLayer, len(m.Layers))
	var mu sync.Mutex
	done := 0
	g, ctx := errgroup.WithContext(ctx)
	g.SetLimit(Parallel)
	for i, l := range m.Layers {
		g.Go(func() error {
			if err := ctx.Err(); err != nil {
				return err
			}
			n, problems, err := layer(ctx, root, d, l)
			if err := errors.Join(ctx.Err(), err); err != nil {
				return err
			}
			mu.Lock()
			defer mu.Unlock()
			if len(problems) > 0 {
				damaged[i] = &report.DamagedLayer{ChainID: l.ChainID, DiffID: l.DiffID, Directory: m.LayerPath(l), Problems: problems}
			}
			done++
			rep.Bytes += n
			if progress != nil {
				progress(done, len(m.Layers), rep.Bytes)
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return nil, fmt.Errorf("verifying cache disk %s: %w", d.Dir, err)
	}
	for _, l := range damaged {
		if l != nil {
			rep.Damaged = append(rep.Damaged, *l)
		}
	}
	rep.Milliseconds = time.Since(start).Milliseconds()
	return rep, nil
}

// layer verifies one layer and says what is wrong with it. What may not be read is
// an error: it says nothing about the layer.
func layer(ctx context.Context, disk *os.Root, d *cachedisk.Disk, l manifest.Layer) (int64, []string, error) {
	dir := d.Manifest.LayerPath(l)
	failed := func(n int64, err error) (int64, []string, error) {
		if errors.Is(err, fs.ErrPermission) {
			return n, nil, fmt.Errorf("layer %s: %s: %w; run as root, in a container with CAP_DAC_READ_SEARCH", l.ChainID, dir, err)
		}
		return n, []string{err.Error()}, nil
	}
	root, err := disk.OpenRoot(dir)
	if err != nil {
		return failed(0, err)
	}
	defer root.Close()
	name := d.Manifest.TarSplitPath(l)
	f, err := openRegular(disk, name)
	if err != nil {
		return failed(0, fmt.Errorf("opening its recorded headers: %w", err))
	}
	defer f.Close()
	z, err := gzip.NewReader(bufio.NewReader(f))
	if err != nil {
		return failed(0, fmt.Errorf("reading its recorded headers %s: %w", name, err))
	}
	defer z.Close()

	digester := digest.SHA256.Digester()
	if l.DiffID.Algorithm().Available() {
		digester = l.DiffID.Algorithm().Digester()
	}
	pr, pw := io.Pipe()
	expected := make(chan tree, 1)
	go func() {
		t, err := readTree(pr)
		if err != nil {
			// The stream is hashed to its end all the same.
			_, _ = io.Copy(io.Discard, pr)
			t = nil
		}
		expected <- t
	}()
	count := &counter{ctx: ctx, w: io.MultiWriter(digester.Hash(), pw)}
	err = asm.WriteOutputTarStream(getter{root}, storage.NewJSONUnpacker(z), count)
	pw.CloseWithError(io.EOF)
	want := <-expected
	if err != nil {
		return failed(count.n, fmt.Errorf("rebuilding its tar stream: %w", err))
	}
	if got := digester.Digest(); got != l.DiffID {
		return failed(count.n, fmt.Errorf("its tar stream hashes to %s, not to its diff ID %s", got, l.DiffID))
	}
	if want == nil {
		return failed(count.n, errors.New("its tar stream cannot be read"))
	}
	problems, err := want.compare(filepath.Join(d.Dir, dir))
	if err != nil {
		return failed(count.n, err)
	}
	if more := len(problems) - maxProblems; more > 0 {
		problems = append(problems[:maxProblems], fmt.Sprintf("and %d more", more))
	}
	return count.n, problems, nil
}

// counter counts what passes and ends when the context does.
type counter struct {
	ctx context.Context
	w   io.Writer
	n   int64
}

func (c *counter) Write(p []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	n, err := c.w.Write(p)
	c.n += int64(n)
	return n, err
}

// getter opens a layer's files for tar-split.
type getter struct{ root *os.Root }

func (g getter) Get(name string) (io.ReadCloser, error) {
	return openRegular(g.root, clean(name))
}

// openRegular does not wait for the other end of a named pipe that lies where a
// file should.
func openRegular(root *os.Root, name string) (*os.File, error) {
	f, err := root.OpenFile(name, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	fi, err := f.Stat()
	if err == nil && !fi.Mode().IsRegular() {
		err = &fs.PathError{Op: "open", Path: name, Err: errors.New("not a regular file")}
	}
	if err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// clean is the name of a tar entry relative to the layer's root, "." for the root.
func clean(name string) string {
	if name = strings.TrimPrefix(path.Join("/", name), "/"); name == "" {
		return "."
	}
	return name
}

// readTree reads the headers of a tar stream.
func readTree(r io.Reader) (tree, error) {
	t := tree{}
	tr := tar.NewReader(bufio.NewReaderSize(r, 1<<16))
	for {
		hdr, err := tr.Next()
		if err == io.EOF {
			// Padding after the end belongs to the hash.
			_, err := io.Copy(io.Discard, r)
			return t, err
		}
		if err != nil {
			return nil, err
		}
		t.add(hdr)
	}
}
