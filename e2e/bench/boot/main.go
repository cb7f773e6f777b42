// Command boot measures once how long it takes from when a new node boots until an
// application runs on it, the image of a desktop and the page that its browser draws, in a
// cluster that is there already. bench runs it once a round; it is a program of its own since
// a cluster needs a network namespace.
//
//	boot -disk FILE -registry HOST:PORT
//
// There are two nodes, one after the other. One pulls the image. The other joins with the
// startup taint and a cache disk, which has the image by its name in the registry, and its
// pods wait for the agent. It prints, as JSON, when the API server told of what happened on
// each, in seconds since the machine was made:
//
//	{"pulled": {"ready": 5.1, ...}, "cached": {"ready": 5.2, "registered": 7.3, ...}}
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/selkies-project/packer-plugin-selkies/e2e/cluster"
	"github.com/selkies-project/packer-plugin-selkies/e2e/desktop"
	"github.com/selkies-project/packer-plugin-selkies/e2e/images"
	"github.com/selkies-project/packer-plugin-selkies/e2e/machine"
	"github.com/selkies-project/packer-plugin-selkies/e2e/registry"
)

func main() {
	disk := flag.String("disk", "", "`file` of the cache disk")
	address := flag.String("registry", "", "`host:port` of the registry that the disk was made from")
	flag.Parse()
	if *disk == "" || *address == "" {
		fmt.Fprintln(os.Stderr, "boot: give it both -disk and -registry")
		os.Exit(2)
	}
	cluster.Main(func(ctx context.Context, dir string) error {
		return cluster.BuildInjector(ctx, injectorIn(dir))
	}, func(ctx context.Context, dir string) (int, error) {
		moments, err := measure(ctx, dir, *address, cluster.Disk{Name: "cache", Image: *disk})
		if err != nil {
			return 1, err
		}
		return 0, json.NewEncoder(os.Stdout).Encode(moments)
	})
}

func injectorIn(dir string) string { return filepath.Join(dir, "injector") }

func measure(ctx context.Context, dir, address string, disk cluster.Disk) (_ map[string]moments, err error) {
	blobs, err := desktop.Blobs()
	if err != nil {
		return nil, err
	}
	reg, err := registry.Start(registry.Config{Addr: address, Dir: blobs})
	if err != nil {
		return nil, err
	}
	defer reg.Stop()
	list, err := desktop.Push(ctx, reg.Addr, blobs)
	if err != nil {
		return nil, err
	}
	// The desktop's blobs are kept, these are not.
	basics, err := registry.Start(registry.Config{Dir: filepath.Join(dir, "blobs")})
	if err != nil {
		return nil, err
	}
	defer basics.Stop()
	injector := basics.Addr + "/injector:1"
	if err := cluster.PushInjector(ctx, injectorIn(dir), injector); err != nil {
		return nil, err
	}
	sandbox, err := pushSandbox(ctx, basics)
	if err != nil {
		return nil, err
	}
	c, err := cluster.Start(ctx, cluster.Config{Dir: dir, Sandbox: sandbox})
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, c.Stop()) }()

	b := &boot{cluster: c, image: list[0], registries: []*registry.Registry{reg, basics}}
	pulled, err := b.measure(ctx, "pulled", nil)
	if err != nil {
		return nil, fmt.Errorf("with a pull: %w", err)
	}
	if got := reg.Reset(); got.BlobGets == 0 {
		return nil, errors.New("nothing was pulled from the registry")
	}
	if err := c.ApplyAgent(ctx, cluster.Agent{Component: "secondary-boot-disk", Image: injector}); err != nil {
		return nil, err
	}
	cached, err := b.measure(ctx, "cached", &disk)
	if err != nil {
		return nil, fmt.Errorf("with a cache disk: %w", err)
	}
	if got := reg.Reset(); got.BlobGets > 0 {
		return nil, fmt.Errorf("with a cache disk %d blobs were pulled: %s", got.BlobGets, strings.Join(got.Blobs, " "))
	}
	return map[string]moments{"pulled": pulled, "cached": cached}, nil
}

// pushSandbox pushes the image of pod sandboxes and returns its reference.
func pushSandbox(ctx context.Context, reg *registry.Registry) (string, error) {
	busybox, err := machine.Busybox(ctx)
	if err != nil {
		return "", err
	}
	pause, err := images.Pause(busybox)
	if err != nil {
		return "", err
	}
	refs, err := images.Push(ctx, reg.Addr, []images.Image{pause})
	if err != nil {
		return "", err
	}
	return refs[0], nil
}
