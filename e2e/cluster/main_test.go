//go:build e2e

// Package cluster_test runs pods on the nodes of a real cluster.
package cluster_test

import (
	"context"
	"os"
	"path/filepath"
	"testing"

	"github.com/selkies-project/packer-plugin-selkies/e2e/cluster"
	"github.com/selkies-project/packer-plugin-selkies/e2e/images"
	"github.com/selkies-project/packer-plugin-selkies/e2e/machine"
	"github.com/selkies-project/packer-plugin-selkies/e2e/registry"
)

// world is what all tests share.
var world struct {
	cluster *cluster.Cluster
	reg     *registry.Registry
}

func TestMain(m *testing.M) {
	build := func(context.Context, string) error { return nil }
	cluster.Main(build, func(ctx context.Context, dir string) (int, error) { return run(ctx, dir, m) })
}

func run(ctx context.Context, dir string, m *testing.M) (int, error) {
	blobs := filepath.Join(dir, "blobs")
	if err := os.Mkdir(blobs, 0o755); err != nil {
		return 1, err
	}
	var err error
	if world.reg, err = registry.Start(registry.Config{Dir: blobs}); err != nil {
		return 1, err
	}
	defer world.reg.Stop()
	sandbox, err := push(ctx)
	if err != nil {
		return 1, err
	}
	if world.cluster, err = cluster.Start(ctx, cluster.Config{Dir: dir, Sandbox: sandbox}); err != nil {
		return 1, err
	}
	defer world.cluster.Stop()
	return m.Run(), nil
}

// push fills the registry and returns the reference of the sandboxes' image.
func push(ctx context.Context) (sandbox string, err error) {
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
	refs, err := images.Push(ctx, world.reg.Addr, append([]images.Image{pause}, all...))
	if err != nil {
		return "", err
	}
	return refs[0], nil
}

// ref is an image's reference in the test registry.
func ref(image string) string { return world.reg.Addr + "/" + image }
