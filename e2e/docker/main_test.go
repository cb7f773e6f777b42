//go:build e2e

// Package docker_test registers cache disks with real Docker daemons under real
// systemd: Debian 12's 20.10 and the pinned Moby 29, both with the overlay2 graph
// driver.
package docker_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/selkies-project/packer-plugin-selkies/e2e/cachedisk"
	"github.com/selkies-project/packer-plugin-selkies/e2e/host"
	"github.com/selkies-project/packer-plugin-selkies/e2e/images"
	"github.com/selkies-project/packer-plugin-selkies/e2e/machine"
	"github.com/selkies-project/packer-plugin-selkies/e2e/registry"
	"github.com/selkies-project/packer-plugin-selkies/manifest"
)

// world is what all tests share: a registry with the catalogue, and two generations
// of a cache disk, files that nobody writes to from here on.
var world struct {
	reg      *registry.Registry
	injector string
	refs     []string // on the first disk
	newer    string   // on the second, in their place the older one's layers
	first    disk
	second   disk
}

// disk is a cache disk.
type disk struct {
	image    string
	manifest *manifest.Manifest
}

func (d disk) id(t *testing.T) string {
	t.Helper()
	id, err := d.manifest.ID()
	if err != nil {
		t.Fatal(err)
	}
	return id.String()
}

func TestMain(m *testing.M) {
	host.Main(func(ctx context.Context, dir string) (status int, err error) {
		world.injector = filepath.Join(dir, "selkies-image-injector")
		if err := host.Build(ctx, "./injector", world.injector); err != nil {
			return 1, err
		}
		if world.reg, err = registry.Start(registry.Config{Dir: filepath.Join(dir, "blobs")}); err != nil {
			return 1, err
		}
		defer world.reg.Stop()
		if err := push(ctx); err != nil {
			return 1, err
		}
		if err := buildDisks(ctx, dir); err != nil {
			return 1, fmt.Errorf("building cache disks: %w", err)
		}
		return m.Run(), nil
	})
}

func push(ctx context.Context) error {
	busybox, err := machine.Busybox(ctx)
	if err != nil {
		return err
	}
	all, err := images.Catalogue(busybox)
	if err != nil {
		return err
	}
	// Docker 20.10, which fills the disk, does not know zstd.
	all = slices.DeleteFunc(all, func(i images.Image) bool { return i.Zstd })
	refs, err := images.Push(ctx, world.reg.Addr, all)
	if err != nil {
		return err
	}
	for _, r := range refs {
		if strings.HasSuffix(r, "/shared:2") {
			world.newer = r
		} else {
			world.refs = append(world.refs, r)
		}
	}
	return nil
}

func buildDisks(ctx context.Context, dir string) error {
	m, err := machine.Boot(ctx, machine.Config{Name: "builder"})
	if err != nil {
		return err
	}
	defer m.Close()
	created := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	for _, g := range []struct {
		disk *disk
		name string
		refs []string
	}{
		{&world.first, "first", world.refs},
		{&world.second, "second", []string{ref("shared:1"), ref("two-tags:one"), world.newer}},
	} {
		g.disk.image = filepath.Join(dir, g.name)
		g.disk.manifest, err = cachedisk.Build(ctx, m, cachedisk.Config{Image: g.disk.image, References: g.refs, Created: created})
		if err != nil {
			return err
		}
		created = created.AddDate(0, 1, 0)
	}
	return nil
}

// ref is a reference in the test registry.
func ref(image string) string { return world.reg.Addr + "/" + image }

// checksum is of a disk image's contents. Zeros are not read where the file has
// holes, and not hashed where it has none, since that may change by itself.
func checksum(t *testing.T, file string) string {
	t.Helper()
	f, err := os.Open(file)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	h := sha256.New()
	block, zeros := make([]byte, 4096), make([]byte, 4096)
	for end := int64(0); ; {
		start, err := f.Seek(end, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return hex.EncodeToString(h.Sum(nil))
		}
		if err == nil {
			end, err = f.Seek(start, unix.SEEK_HOLE)
		}
		for at := start; err == nil && at < end; at += int64(len(block)) {
			if _, err = f.ReadAt(block, at); err == nil && !bytes.Equal(block, zeros) {
				fmt.Fprintf(h, "%d:", at)
				h.Write(block)
			}
		}
		if err != nil {
			t.Fatal(err)
		}
	}
}
