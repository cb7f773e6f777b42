//go:build e2e

// Package docker_test registers cache disks with real Docker daemons under real
// systemd: Debian 12's 20.10 and the pinned Moby 29, both with the overlay2 graph
// driver.
package docker_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"

	"github.com/selkies-project/packer-plugin-selkies/e2e/cachedisk"
	"github.com/selkies-project/packer-plugin-selkies/e2e/host"
	"github.com/selkies-project/packer-plugin-selkies/e2e/images"
	"github.com/selkies-project/packer-plugin-selkies/e2e/machine"
	"github.com/selkies-project/packer-plugin-selkies/e2e/registry"
	"github.com/selkies-project/packer-plugin-selkies/manifest"
)

// world is what all tests share: a registry with the catalogue, two generations of a
// cache disk, and one more that Moby 29 has filled, files that nobody writes to from
// here on.
var world struct {
	reg      *registry.Registry
	injector string
	refs     []string // on the first disk
	newer    string   // on the second, in their place the older one's layers
	first    disk
	second   disk
	zstd     string // with hub on modern, beside those on the first
	hub      string // short name of an image of Docker Hub
	modern   disk   // has blobs as well
}

// hub is the repository whose images stand for Docker Hub's, on the test registry.
const hub = "library/hub"

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
	// Unlike any other, or it would have their names too.
	hubs, err := mutate.Config(all[0].Image, v1.Config{Labels: map[string]string{"from": hub}})
	if err != nil {
		return err
	}
	all = append(all, images.Image{Repository: hub, Tags: []string{"1"}, Image: hubs})
	for _, i := range all {
		refs, err := images.Push(ctx, world.reg.Addr, []images.Image{i})
		if err != nil {
			return err
		}
		switch {
		case i.Repository == hub:
			world.hub = "hub:1"
		case i.Zstd: // Docker 20.10, which fills the first disk, does not know it
			world.zstd = refs[0]
		case i.Repository == "shared" && i.Tags[0] == "2":
			world.newer = refs[0]
		default:
			world.refs = append(world.refs, refs...)
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
		disk    *disk
		name    string
		refs    []string
		release machine.Release
		blobs   bool
	}{
		{&world.first, "first", world.refs, machine.Debian, false},
		{&world.second, "second", []string{ref("shared:1"), ref("two-tags:one"), world.newer}, machine.Debian, false},
		{&world.modern, "modern", append(slices.Clone(world.refs), world.zstd, ref(hub+":1")), machine.Upstream, true},
	} {
		g.disk.image = filepath.Join(dir, g.name)
		g.disk.manifest, err = cachedisk.Build(ctx, m, cachedisk.Config{
			Image: g.disk.image, References: g.refs, Created: created, Release: g.release, Blobs: g.blobs,
		})
		if err != nil {
			return err
		}
		created = created.AddDate(0, 1, 0)
	}
	return renameHub(ctx, world.modern, dir)
}

// renameHub gives the images of hub the names that Docker Hub's have: the manifest of
// a disk which a build machine filled that reaches Docker Hub.
func renameHub(ctx context.Context, d disk, dir string) error {
	for i := range d.manifest.Images {
		names := d.manifest.Images[i].Names
		for j, n := range names {
			if rest, ok := strings.CutPrefix(n, ref(hub)); ok {
				names[j] = "docker.io/" + hub + rest
			}
		}
	}
	return d.writeManifest(ctx, filepath.Join(dir, "mnt"))
}

// writeManifest replaces the layer manifest on the disk. It makes the directory
// mountPoint.
func (d disk) writeManifest(ctx context.Context, mountPoint string) error {
	if err := os.Mkdir(mountPoint, 0o755); err != nil {
		return err
	}
	if _, err := host.Output(exec.CommandContext(ctx, "mount", "-o", "loop", d.image, mountPoint)); err != nil {
		return err
	}
	err := cachedisk.WriteManifest(mountPoint, d.manifest)
	_, unmount := host.Output(exec.CommandContext(ctx, "umount", mountPoint))
	return errors.Join(err, unmount)
}

// copy is a disk of the test's own.
func (d disk) copy(t *testing.T) disk {
	t.Helper()
	c := disk{filepath.Join(t.TempDir(), "disk"), d.manifest}
	if _, err := host.Output(exec.CommandContext(t.Context(), "cp", "--sparse=always", d.image, c.image)); err != nil {
		t.Fatal(err)
	}
	return c
}

// short is how a person is told the disk's cache ID.
func (d disk) short(t *testing.T) string { return strings.TrimPrefix(d.id(t), "sha256:")[:12] }

// ref is a reference in the test registry.
func ref(image string) string { return world.reg.Addr + "/" + image }
