//go:build e2e

// Package cluster_test runs the node agent, and pods of the images that it registers,
// on the nodes of a real cluster. Tests that have the agent's DaemonSet, or that count
// what is asked of the registry, run alone; the others wait for pods most of the time
// and run in parallel.
package cluster_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"github.com/selkies-project/packer-plugin-selkies/e2e/cachedisk"
	"github.com/selkies-project/packer-plugin-selkies/e2e/cluster"
	"github.com/selkies-project/packer-plugin-selkies/e2e/host"
	"github.com/selkies-project/packer-plugin-selkies/e2e/images"
	"github.com/selkies-project/packer-plugin-selkies/e2e/machine"
	"github.com/selkies-project/packer-plugin-selkies/e2e/prometheus"
	"github.com/selkies-project/packer-plugin-selkies/e2e/registry"
)

// world is what all tests share.
var world struct {
	cluster *cluster.Cluster
	reg     *registry.Registry
	// source is the folder of the module.
	source string
	// first and second are disk images of cache disks, which have cached[first] and
	// cached[second].
	first, second string
}

// Images in the registry.
const (
	sandbox    = "pause:latest"     // of pod sandboxes, on no cache disk
	plain      = "oci:latest"       // on no cache disk
	other      = "zstd:latest"      // on no cache disk
	app        = "shared:1"         // four layers, on both cache disks
	appNext    = "shared:2"         // the same and one more, on the second cache disk
	unreadable = "odd-files:latest" // with a file without permissions, on the second cache disk
	indexed    = "platforms:latest" // behind an index, on the first cache disk
	moving     = "unstable:latest"  // as app, on the first cache disk; a test moves the tag
	injector   = "injector:1"
	injectorV2 = "injector:2" // the same program, another image
)

var cached = map[string][]string{"first": {app, indexed, moving}, "second": {app, appNext, unreadable}}

func TestMain(m *testing.M) {
	cluster.Main(func(ctx context.Context, dir string) error {
		if _, err := prometheus.Programs(ctx); err != nil {
			return err
		}
		return cluster.BuildInjector(ctx, filepath.Join(dir, "injector"))
	}, func(ctx context.Context, dir string) (int, error) {
		stop, err := setUp(ctx, dir)
		defer stop()
		if err != nil {
			return 1, err
		}
		return m.Run(), nil
	})
}

// setUp fills the registry, makes the cache disks and starts the control plane. stop
// is never nil.
func setUp(ctx context.Context, dir string) (stop func(), err error) {
	stop = func() {}
	if world.source, err = host.Source(ctx); err != nil {
		return stop, err
	}
	blobs := filepath.Join(dir, "blobs")
	if err := os.Mkdir(blobs, 0o755); err != nil {
		return stop, err
	}
	if world.reg, err = registry.Start(registry.Config{Dir: blobs}); err != nil {
		return stop, err
	}
	stop = func() { world.reg.Stop() }
	if err := push(ctx, filepath.Join(dir, "injector")); err != nil {
		return stop, fmt.Errorf("pushing images: %w", err)
	}
	if err := buildDisks(ctx, dir); err != nil {
		return stop, fmt.Errorf("building cache disks: %w", err)
	}
	if world.cluster, err = cluster.Start(ctx, cluster.Config{Dir: dir, Sandbox: ref(sandbox)}); err != nil {
		return stop, err
	}
	stop = func() { world.cluster.Stop(); world.reg.Stop() }
	// Its namespace and permissions, which all tests use.
	_, err = world.cluster.Kubectl(ctx, "apply", "-k", filepath.Join(world.source, "example/kustomize/base/access"))
	return stop, err
}

func buildDisks(ctx context.Context, dir string) error {
	m, err := machine.Boot(ctx, machine.Config{Name: "builder"})
	if err != nil {
		return err
	}
	defer m.Close()
	world.first, world.second = filepath.Join(dir, "first"), filepath.Join(dir, "second")
	for _, file := range []string{world.first, world.second} {
		var refs []string
		for _, image := range cached[filepath.Base(file)] {
			refs = append(refs, ref(image))
		}
		if _, err := cachedisk.Build(ctx, m, cachedisk.Config{Image: file, References: refs}); err != nil {
			return err
		}
	}
	return nil
}

func push(ctx context.Context, injectorLayout string) error {
	busybox, err := machine.Busybox(ctx)
	if err != nil {
		return err
	}
	all, err := images.Catalogue(busybox)
	if err != nil {
		return err
	}
	pause, err := images.Pause(busybox)
	if err != nil {
		return err
	}
	if _, err := images.Push(ctx, world.reg.Addr, append(all, pause)); err != nil {
		return err
	}
	if err := tag(ctx, app, moving); err != nil {
		return err
	}
	if err := cluster.PushInjector(ctx, injectorLayout, ref(injector)); err != nil {
		return err
	}
	return pushAnnotated(ctx, injector, injectorV2)
}

// pushAnnotated makes another image of one that is behind an index.
func pushAnnotated(ctx context.Context, image, as string) error {
	from, err := name.ParseReference(ref(image))
	if err != nil {
		return err
	}
	to, err := name.ParseReference(ref(as))
	if err != nil {
		return err
	}
	index, err := remote.Index(from, remote.WithContext(ctx))
	if err != nil {
		return err
	}
	next := mutate.Annotations(index, map[string]string{"generation": "2"}).(v1.ImageIndex)
	return remote.WriteIndex(to, next, remote.WithContext(ctx))
}

// ref is an image's reference in the test registry.
func ref(image string) string { return world.reg.Addr + "/" + image }
