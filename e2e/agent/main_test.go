//go:build e2e

// Package agent_test runs the node agent in machines with real containerds, Debian
// 12's 1.6 and the pinned 2.4, without a cluster, and with an API server that knows
// the machine as a node. e2e/cluster has whole clusters. A test has machines of its own and
// waits for the agent most of the time, so that they run in parallel.
package agent_test

import (
	"context"
	"fmt"
	"path/filepath"
	"testing"
	"time"

	"github.com/selkies-project/packer-plugin-selkies/e2e/cachedisk"
	"github.com/selkies-project/packer-plugin-selkies/e2e/cluster"
	"github.com/selkies-project/packer-plugin-selkies/e2e/host"
	"github.com/selkies-project/packer-plugin-selkies/e2e/images"
	"github.com/selkies-project/packer-plugin-selkies/e2e/machine"
	"github.com/selkies-project/packer-plugin-selkies/e2e/registry"
	"github.com/selkies-project/packer-plugin-selkies/manifest"
)

// world is what all tests share.
var world struct {
	reg      *registry.Registry
	injector string
	// disk is the image of a cache disk with all of refs, and pause what sandboxes run.
	disk  string
	refs  []string
	cache *manifest.Manifest
	pause string
}

// chains is how many images the disk has, depth how many layers each.
const chains, depth = 6, 5

func TestMain(m *testing.M) {
	build := func(ctx context.Context, dir string) error {
		return host.Build(ctx, "./injector", filepath.Join(dir, "selkies-image-injector"))
	}
	// In a network namespace of its own, for the API server's address.
	cluster.Main(build, func(ctx context.Context, dir string) (int, error) {
		world.injector = filepath.Join(dir, "selkies-image-injector")
		var err error
		if world.reg, err = registry.Start(registry.Config{Dir: filepath.Join(dir, "blobs")}); err != nil {
			return 1, err
		}
		defer world.reg.Stop()
		if err := buildDisk(ctx, dir); err != nil {
			return 1, fmt.Errorf("building a cache disk: %w", err)
		}
		return m.Run(), nil
	})
}

func buildDisk(ctx context.Context, dir string) error {
	busybox, err := machine.Busybox(ctx)
	if err != nil {
		return err
	}
	pause, err := images.Pause(busybox)
	if err != nil {
		return err
	}
	list, err := images.Chains(busybox, chains, depth)
	if err != nil {
		return err
	}
	if world.refs, err = images.Push(ctx, world.reg.Addr, append(list, pause)); err != nil {
		return err
	}
	world.pause = world.refs[chains]
	m, err := machine.Boot(ctx, machine.Config{Name: "builder"})
	if err != nil {
		return err
	}
	defer m.Close()
	world.disk = filepath.Join(dir, "disk")
	world.cache, err = cachedisk.Build(ctx, m, cachedisk.Config{
		Image: world.disk, References: world.refs, Created: time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC),
	})
	return err
}
