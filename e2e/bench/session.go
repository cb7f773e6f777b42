package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/selkies-project/packer-plugin-selkies/e2e/desktop"
	"github.com/selkies-project/packer-plugin-selkies/e2e/host"
	"github.com/selkies-project/packer-plugin-selkies/e2e/images"
	"github.com/selkies-project/packer-plugin-selkies/e2e/machine"
	"github.com/selkies-project/packer-plugin-selkies/e2e/registry"
)

// session is what the benchmarks of one run share. What not all of them need is made by
// the first that does.
type session struct {
	ctx      context.Context
	dir      string // of this run, on a real file system
	injector string
	began    time.Time

	containerd, docker func() (*node, error)
	desktops           func() (*desktopImages, error)
	chains             func() (*chains, error)

	cleanup []func() error
}

// needed is the room that everything took at most, at once.
const needed = 25e9

func newSession(ctx context.Context) (*session, error) {
	if err := host.Check(); err != nil {
		return nil, err
	}
	top, err := host.Cache("bench")
	if err != nil {
		return nil, err
	}
	var st unix.Statfs_t
	if err := unix.Statfs(top, &st); err != nil {
		return nil, err
	}
	if free := st.Bavail * uint64(st.Bsize); free < needed {
		return nil, fmt.Errorf("%s has %s free, %s are needed: set SELKIES_BUILD_CACHE to a folder with more",
			top, format(bytes, float64(free)), format(bytes, needed))
	}
	lock, err := host.Lock(filepath.Join(top, ".lock"))
	if err != nil {
		return nil, err
	}
	s := &session{ctx: ctx, dir: filepath.Join(top, "run"), began: time.Now()}
	s.cleanup = append(s.cleanup, lock.Close, func() error { return os.RemoveAll(s.dir) })
	s.injector = filepath.Join(s.dir, "selkies-image-injector")
	if err = errors.Join(os.RemoveAll(s.dir), os.Mkdir(s.dir, 0o755)); err == nil {
		// As make injector does it.
		err = host.Build(ctx, "./injector", s.injector, "-trimpath")
	}
	if err != nil {
		return nil, errors.Join(err, s.close())
	}
	s.containerd = sync.OnceValues(func() (*node, error) { return s.newNode(containerdRoot) })
	s.docker = sync.OnceValues(func() (*node, error) { return s.newNode(dockerRoot) })
	s.desktops = sync.OnceValues(s.newDesktopImages)
	s.chains = sync.OnceValues(s.newChains)
	return s, nil
}

func (s *session) close() error {
	var errs []error
	for _, f := range slices.Backward(s.cleanup) {
		errs = append(errs, f())
	}
	return errors.Join(errs...)
}

func (s *session) progress(format string, a ...any) {
	fmt.Fprintf(os.Stderr, "%5.0f s  %s\n", time.Since(s.began).Seconds(), fmt.Sprintf(format, a...))
}

// desktopImages are the images of a desktop, in a registry.
type desktopImages struct {
	registry *registry.Registry
	images   []desktop.Image
}

func (s *session) newDesktopImages() (*desktopImages, error) {
	blobs, err := desktop.Blobs()
	if err != nil {
		return nil, err
	}
	reg, err := registry.Start(registry.Config{Dir: blobs})
	if err != nil {
		return nil, err
	}
	s.cleanup = append(s.cleanup, reg.Stop)
	list, err := desktop.Push(s.ctx, reg.Addr, blobs)
	return &desktopImages{reg, list}, err
}

// chains are synthetic images in a registry: small layers, none of them but the base
// shared.
type chains struct {
	busybox  string
	registry *registry.Registry
	refs     []string
}

const (
	// depth is how many layers each of them has: ten of its own.
	depth = 11
	// most is how many of them a benchmark takes.
	most = 200
)

func (s *session) newChains() (*chains, error) {
	c := &chains{}
	var err error
	if c.busybox, err = machine.Busybox(s.ctx); err != nil {
		return nil, err
	}
	blobs, err := host.Cache("bench/blobs")
	if err != nil {
		return nil, err
	}
	if c.registry, err = registry.Start(registry.Config{Dir: blobs}); err != nil {
		return nil, err
	}
	s.cleanup = append(s.cleanup, c.registry.Stop)
	list, err := images.Chains(c.busybox, most, depth)
	if err != nil {
		return nil, err
	}
	c.refs, err = images.Push(s.ctx, c.registry.Addr, list)
	return c, err
}

// layersOf is how many different layers the first n of the chains have.
func layersOf(n int) int { return n*(depth-1) + 1 }
