package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/selkies-project/packer-plugin-selkies/e2e/desktop"
	"github.com/selkies-project/packer-plugin-selkies/e2e/host"
	"github.com/selkies-project/packer-plugin-selkies/e2e/machine"
	"github.com/selkies-project/packer-plugin-selkies/e2e/registry"
)

// mountPoint is where the cache disk is mounted on the node, as GKE mounts a
// secondary boot disk.
const mountPoint = "/mnt/disks/gke-secondary-disks/" + diskName

// measurement is how long it took to make the images known and to start a container
// of each, and what the registry served meanwhile.
type measurement struct {
	get, start time.Duration
	served     registry.Count
}

// runtime is a container runtime of a node: how it is started, how it pulls an image,
// what the injector calls it, and how it runs a container.
type runtime struct {
	name   string
	inject string
	start  func(ctx context.Context, node *machine.Machine) error
	pull   []string
	run    func(n int, w desktop.Image) []string

	result struct{ pull, inject measurement }
}

func newContainerd() *runtime {
	return &runtime{
		name:   "containerd 2.4",
		inject: "containerd",
		start: func(ctx context.Context, node *machine.Machine) error {
			return node.StartContainerd(ctx, machine.Containerd{Release: machine.Upstream})
		},
		pull: []string{"ctr", "-n", "k8s.io", "images", "pull", "--plain-http"},
		run: func(n int, w desktop.Image) []string {
			args := []string{"ctr", "-n", "k8s.io", "run", mode(w), "--net-host", w.Ref, fmt.Sprintf("demo-%d", n)}
			return append(args, w.Command...)
		},
	}
}

func newDocker() *runtime {
	return &runtime{
		name:   "Docker 20.10",
		inject: "docker",
		start: func(ctx context.Context, node *machine.Machine) error {
			return node.StartDocker(ctx, machine.Docker{Release: machine.Debian})
		},
		pull: []string{"docker", "pull", "-q"},
		run: func(n int, w desktop.Image) []string {
			args := []string{"docker", "run", mode(w), "--network=host", fmt.Sprintf("--name=demo-%d", n), w.Ref}
			return append(args, w.Command...)
		},
	}
}

// mode is the option of ctr and docker for a container that ends, or that stays.
func mode(w desktop.Image) string {
	if w.Command == nil {
		return "--detach"
	}
	return "--rm"
}

// pullOn times pulling and starting the images on a new node.
func (d *demo) pullOn(r *runtime) func(context.Context) error {
	return func(ctx context.Context) (err error) {
		r.result.pull, err = d.measure(ctx, r, func(node *machine.Machine) error {
			for _, i := range d.images {
				if _, err := node.Run(ctx, append(r.pull, i.Ref)...); err != nil {
					return err
				}
			}
			return nil
		})
		return err
	}
}

// injectOn times injecting and starting the images on a new node.
func (d *demo) injectOn(r *runtime) func(context.Context) error {
	return func(ctx context.Context) (err error) {
		r.result.inject, err = d.measure(ctx, r, func(node *machine.Machine) error {
			return show(node.Command(ctx, "selkies-image-injector", "inject", "--runtime="+r.inject))
		})
		return err
	}
}

// bootNode boots a node with the cache disk attached and mounted, as GKE does it.
func (d *demo) bootNode(ctx context.Context) (*machine.Machine, error) {
	node, err := machine.Boot(ctx, machine.Config{Name: "node"})
	if err != nil {
		return nil, err
	}
	if err = node.Install(d.injector(), "/usr/local/bin/selkies-image-injector"); err == nil {
		err = node.AttachDisk(d.disk.Path, diskName)
	}
	if err == nil {
		_, err = node.Run(ctx, "mkdir", "-p", mountPoint)
	}
	if err == nil {
		_, err = node.Run(ctx, "mount", "-o", "ro,noload", "/dev/disk/by-id/google-"+diskName, mountPoint)
	}
	if err != nil {
		return nil, errors.Join(err, node.Close())
	}
	return node, nil
}

// measure times, on a new node and from cold caches, how long get takes to make the
// images known there and how long a container of each takes to start, and counts
// what the registry serves.
func (d *demo) measure(ctx context.Context, r *runtime, get func(*machine.Machine) error) (m measurement, err error) {
	node, err := d.bootNode(ctx)
	if err != nil {
		return m, err
	}
	defer func() { err = errors.Join(err, node.Close()) }()
	if err := r.start(ctx, node); err != nil {
		return m, err
	}
	// As a new node's are; but a real registry has its blobs in the memory of other
	// machines.
	if err := errors.Join(host.DropCaches(), d.registry.Warm()); err != nil {
		return m, err
	}
	d.registry.Reset()
	began := time.Now()
	if err := get(node); err != nil {
		return m, fmt.Errorf("%s: %w", r.name, err)
	}
	m.get = time.Since(began)
	for n, w := range d.images {
		out, err := node.Run(ctx, r.run(n, w)...)
		if err != nil {
			return m, fmt.Errorf("%s: starting %s: %w", r.name, w.Ref, err)
		}
		if !strings.Contains(out, w.Want) {
			return m, fmt.Errorf("%s: %s said %q, not %q", r.name, w.Ref, out, w.Want)
		}
		fmt.Printf("    %s runs\n", w.Ref)
	}
	m.start = time.Since(began) - m.get
	m.served = d.registry.Reset()
	return m, nil
}
