//go:build e2e

// Package hostile_test gives the injector cache disks that are out to harm the node: to
// lead it out of the disk, to exhaust it, to lie to it; and file systems that the kernel
// finds damaged. What the injector opens and looks at is taken down by strace, in a
// machine with a real containerd and a real Docker.
package hostile_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/selkies-project/packer-plugin-selkies/e2e/cachedisk"
	"github.com/selkies-project/packer-plugin-selkies/e2e/host"
	"github.com/selkies-project/packer-plugin-selkies/e2e/images"
	"github.com/selkies-project/packer-plugin-selkies/e2e/machine"
	"github.com/selkies-project/packer-plugin-selkies/e2e/registry"
	"github.com/selkies-project/packer-plugin-selkies/manifest"
)

// world is what all tests share: a node, and a good cache disk that nobody writes to.
var world struct {
	node     *machine.Machine
	injector string // on the host
	disk     string // its image
	built    *manifest.Manifest
	refs     []string
}

const (
	injector = "/usr/local/bin/selkies-image-injector"
	cacheDir = "/mnt/disks/cache"
	// outside is where hostile disks lead. It has what they would want to be read.
	outside = "/srv/outside"
)

// inside are more such directories, below those in which the injector has work to do, and
// one of the kernel's.
var inside = struct{ run, docker, containerd, proc string }{
	"/run/outside", "/var/lib/docker/outside", "/var/lib/containerd/outside", "/proc/sysvipc",
}

func TestMain(m *testing.M) {
	host.Main(func(ctx context.Context, dir string) (status int, err error) {
		if err := setUp(ctx, dir); err != nil {
			return 1, err
		}
		defer world.node.Close()
		return m.Run(), nil
	})
}

func setUp(ctx context.Context, dir string) (err error) {
	world.injector = filepath.Join(dir, "selkies-image-injector")
	if err := host.Build(ctx, "./injector", world.injector); err != nil {
		return err
	}
	reg, err := registry.Start(registry.Config{Dir: filepath.Join(dir, "blobs")})
	if err != nil {
		return err
	}
	defer reg.Stop()
	busybox, err := machine.Busybox(ctx)
	if err != nil {
		return err
	}
	all, err := images.Catalogue(busybox)
	if err != nil {
		return err
	}
	for _, i := range all {
		if i.Repository != "odd-files" && i.Repository != "oci" && i.Repository != "platforms" {
			continue
		}
		refs, err := images.Push(ctx, reg.Addr, []images.Image{i})
		if err != nil {
			return err
		}
		world.refs = append(world.refs, refs...)
	}
	if world.node, err = machine.Boot(ctx, machine.Config{Name: "node"}); err != nil {
		return err
	}
	world.disk = filepath.Join(dir, "disk")
	world.built, err = cachedisk.Build(ctx, world.node, cachedisk.Config{Image: world.disk, References: world.refs, Blobs: true})
	if err == nil {
		err = prepareNode(ctx)
	}
	if err != nil {
		world.node.Close()
	}
	return err
}

// prepareNode starts both runtimes and makes outside.
func prepareNode(ctx context.Context) error {
	n := world.node
	if err := n.Install(world.injector, injector); err != nil {
		return err
	}
	if err := n.StartContainerd(ctx, machine.Containerd{Release: machine.Debian}); err != nil {
		return err
	}
	if err := n.StartDocker(ctx, machine.Docker{Release: machine.Debian}); err != nil {
		return err
	}
	for _, dir := range []string{outside, inside.run, inside.docker, inside.containerd} {
		if err := n.WriteFile(dir+"/secret", []byte("secret"), 0o600); err != nil {
			return err
		}
		if err := os.MkdirAll(n.Path(dir+"/diff"), 0o755); err != nil {
			return err
		}
		// A manifest that would be accepted.
		if err := cachedisk.WriteManifest(n.Path(dir), world.built); err != nil {
			return err
		}
	}
	return nil
}

// attach mounts a disk on the node as GKE does, until the test's end. The superblock
// does not decide what an error does: it could have the kernel panic.
func attach(t *testing.T, image string) { attachAt(t, image, cacheDir) }

func attachAt(t *testing.T, image, dir string) {
	t.Helper()
	world.node.MountDisk(t, image, dir, "ro,noload,errors=continue")
	t.Cleanup(func() {
		// The test's own context has ended.
		if _, err := world.node.Run(context.Background(), "umount", dir); err != nil {
			t.Error(err)
		}
	})
}

// layer is the manifest's layer number i from the top of the image odd-files, which has
// three.
func layer(t *testing.T, i int) manifest.Layer {
	t.Helper()
	for _, img := range world.built.Images {
		if !strings.Contains(img.Names[0], "/odd-files") {
			continue
		}
		chain, err := img.ChainIDs()
		if err != nil {
			t.Fatal(err)
		}
		for _, l := range world.built.Layers {
			if l.ChainID == chain[len(chain)-1-i] {
				return l
			}
		}
	}
	t.Fatal("no odd-files")
	return manifest.Layer{}
}

// layerPath is the path of a file of the layer, relative to the disk's root.
func layerPath(l manifest.Layer, name string) string {
	return filepath.Join(world.built.LayerPath(l), name)
}

// registered is all that the runtimes know of images, for nothing may become of a disk
// that is refused.
func registered(t *testing.T) string {
	t.Helper()
	n := world.node
	return fmt.Sprint(n.Output(t, "ctr", "-n", "k8s.io", "images", "ls", "-q"), n.Output(t, "ctr", "-n", "k8s.io", "snapshots", "ls"),
		n.Output(t, "ctr", "-n", "k8s.io", "content", "ls", "-q"), n.Output(t, "docker", "images", "-aq"))
}
