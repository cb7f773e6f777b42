package main

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/selkies-project/packer-plugin-selkies/e2e/cachedisk"
	"github.com/selkies-project/packer-plugin-selkies/e2e/host"
	"github.com/selkies-project/packer-plugin-selkies/e2e/machine"
	"github.com/selkies-project/packer-plugin-selkies/manifest"
)

// disk is a cache disk: an image file, and its layer manifest.
type disk struct {
	file     string
	manifest *manifest.Manifest
}

// chainsDisk is a cache disk with the first n chains.
func (s *session) chainsDisk(n int) (*disk, error) {
	busybox, err := machine.Busybox(s.ctx)
	if err != nil {
		return nil, err
	}
	content := []string{busybox, strconv.Itoa(n), strconv.Itoa(depth)}
	return s.keptDisk(fmt.Sprintf("chains-%d", n), content, 2<<30, func() ([]string, error) {
		c, err := s.chains()
		if err != nil {
			return nil, err
		}
		return c.refs[:n], nil
	})
}

// desktopDisk is a cache disk with the images of a desktop.
func (s *session) desktopDisk() (*disk, error) {
	d, err := s.desktops()
	if err != nil {
		return nil, err
	}
	var refs, content []string
	for _, i := range d.images {
		refs = append(refs, i.Ref)
		content = append(content, strconv.FormatInt(i.Packed, 10))
	}
	return s.keptDisk("desktop", content, 8<<30, func() ([]string, error) { return refs, nil })
}

// keptDisk is a cache disk that is made once and kept in the cache folder; content is
// what stands for its contents there. The names of its images have the port that the
// registry had then.
func (s *session) keptDisk(name string, content []string, size int64, refs func() ([]string, error)) (*disk, error) {
	cache, err := host.Cache("bench")
	if err != nil {
		return nil, err
	}
	key := sha256.Sum256([]byte(strings.Join(content, " ")))
	d := &disk{file: filepath.Join(cache, fmt.Sprintf("%s-%.8x.img", name, key))}
	if _, err := os.Stat(d.file); errors.Is(err, os.ErrNotExist) {
		if err := s.makeDisk(d.file, size, refs); err != nil {
			return nil, fmt.Errorf("making a cache disk: %w", err)
		}
	}
	err = onMount(s.ctx, d.file, "ro,noload", func(dir string) error {
		d.manifest, err = manifest.Read(dir)
		return err
	})
	return d, err
}

func (s *session) makeDisk(file string, size int64, refs func() ([]string, error)) error {
	list, err := refs()
	if err != nil {
		return err
	}
	s.progress("filling a cache disk with %d images (once; kept in %s)", len(list), file)
	m, err := machine.Boot(s.ctx, machine.Config{Name: "builder"})
	if err != nil {
		return err
	}
	made := filepath.Join(s.dir, "made.img")
	_, err = cachedisk.Build(s.ctx, m, cachedisk.Config{Image: made, Size: size, References: list})
	if err := errors.Join(err, m.Close()); err != nil {
		return err
	}
	return os.Rename(made, file)
}

// onMount calls f with the directory that a disk image is mounted on.
func onMount(ctx context.Context, file, options string, f func(dir string) error) error {
	dir, err := os.MkdirTemp("", "bench-")
	if err != nil {
		return err
	}
	if _, err := host.Output(exec.CommandContext(ctx, "mount", "-o", "loop,"+options, file, dir)); err != nil {
		return errors.Join(err, os.Remove(dir))
	}
	err = f(dir)
	_, unmount := host.Output(exec.CommandContext(context.WithoutCancel(ctx), "umount", dir))
	return errors.Join(err, unmount, os.Remove(dir))
}
