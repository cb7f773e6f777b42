//go:build e2e

// Package kustomize_test applies the manifests of example/kustomize to a real API
// server, and runs the injector's image in pods on real nodes with exactly the
// privileges that they give it.
package kustomize_test

import (
	"context"
	"fmt"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"github.com/selkies-project/packer-plugin-selkies/e2e/cachedisk"
	"github.com/selkies-project/packer-plugin-selkies/e2e/cluster"
	"github.com/selkies-project/packer-plugin-selkies/e2e/host"
	"github.com/selkies-project/packer-plugin-selkies/e2e/images"
	"github.com/selkies-project/packer-plugin-selkies/e2e/machine"
	"github.com/selkies-project/packer-plugin-selkies/e2e/registry"
)

// world is what all tests share.
var world struct {
	cluster *cluster.Cluster
	// injector is the reference of the injector's image, cached that of the only image
	// on the disk image disk.
	injector, cached string
	disk             string
}

func TestMain(m *testing.M) {
	cluster.Main(buildImage, func(ctx context.Context, dir string) (int, error) { return run(ctx, dir, m) })
}

// buildImage makes the injector's image as a release is made, for one platform.
func buildImage(ctx context.Context, dir string) error {
	src, err := host.Source(ctx)
	if err != nil {
		return err
	}
	return imageProgram(ctx, src, filepath.Join(dir, "image"), "-platforms", "linux/amd64")
}

// imageProgram runs injector/image in a copy of this module.
func imageProgram(ctx context.Context, src, output string, args ...string) error {
	cmd := exec.CommandContext(ctx, "go", append([]string{"run", "./injector/image", "-output", output}, args...)...)
	cmd.Dir = src
	_, err := host.Output(cmd)
	return err
}

func run(ctx context.Context, dir string, m *testing.M) (int, error) {
	reg, err := registry.Start(registry.Config{Dir: filepath.Join(dir, "blobs")})
	if err != nil {
		return 1, err
	}
	defer reg.Stop()
	sandbox, err := push(ctx, reg, filepath.Join(dir, "image"))
	if err != nil {
		return 1, fmt.Errorf("pushing images: %w", err)
	}
	world.disk = filepath.Join(dir, "disk")
	if err := buildDisk(ctx); err != nil {
		return 1, fmt.Errorf("building the cache disk: %w", err)
	}
	if world.cluster, err = cluster.Start(ctx, cluster.Config{Dir: dir, Sandbox: sandbox}); err != nil {
		return 1, err
	}
	defer world.cluster.Stop()
	return m.Run(), nil
}

// push fills the registry and returns the reference of the sandboxes' image.
func push(ctx context.Context, reg *registry.Registry, built string) (sandbox string, err error) {
	busybox, err := machine.Busybox(ctx)
	if err != nil {
		return "", err
	}
	all, err := images.Catalogue(busybox)
	if err != nil {
		return "", err
	}
	pause, err := images.Pause(busybox)
	if err != nil {
		return "", err
	}
	all = slices.DeleteFunc(all, func(i images.Image) bool { return i.Repository != "odd-files" })
	refs, err := images.Push(ctx, reg.Addr, append([]images.Image{pause}, all...))
	if err != nil {
		return "", err
	}
	world.cached = refs[1]

	index, err := layout.ImageIndexFromPath(built)
	if err != nil {
		return "", err
	}
	m, err := index.IndexManifest()
	if err != nil {
		return "", err
	}
	if index, err = index.ImageIndex(m.Manifests[0].Digest); err != nil {
		return "", err
	}
	ref, err := name.ParseReference(reg.Addr + "/selkies-image-injector:test")
	if err != nil {
		return "", err
	}
	world.injector = ref.String()
	return refs[0], remote.WriteIndex(ref, index, remote.WithContext(ctx))
}

func buildDisk(ctx context.Context) error {
	m, err := machine.Boot(ctx, machine.Config{Name: "builder"})
	if err != nil {
		return err
	}
	defer m.Close()
	_, err = cachedisk.Build(ctx, m, cachedisk.Config{Image: world.disk, References: []string{world.cached}})
	return err
}
