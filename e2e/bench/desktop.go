package main

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/selkies-project/packer-plugin-selkies/e2e/desktop"
)

// firstPage measures the image of a desktop: how long until a container of it has started,
// and until its browser has drawn a page, each with a runtime that is new, and cold caches.
type firstPage struct {
	s      *session
	peers  peers
	image  desktop.Image // in the registry
	cached desktop.Image // on the cache disk, whose names may have another port
	disk   *attached

	ways   []way // in the order of the table, inject first
	copied series
}

// peers is a runtime, with the ways in which it gets an image besides inject.
type peers struct {
	node func(*session) (*node, error)
	run  func(ref string, command ...string) []string
	save func(ref string) []string // writes archive
	// ways begins with a pull.
	ways func(*firstPage) []way
}

// way is one in which a node gets the image.
type way struct {
	name    string
	unpacks int
	ref     string
	get     func(context.Context) error

	// got, started and drawn count from the beginning.
	got, started, drawn series
}

var containerdPeers = peers{
	node: func(s *session) (*node, error) { return s.containerd() },
	run: func(ref string, command ...string) []string {
		return append([]string{"ctr", "-n", "k8s.io", "run", "--rm", "--net-host", ref, "bench"}, command...)
	},
	save: func(ref string) []string { return []string{"ctr", "-n", "k8s.io", "images", "export", archive, ref} },
	ways: func(b *firstPage) []way {
		pull := b.command("ctr", "-n", "k8s.io", "images", "pull", "--plain-http", b.image.Ref)
		return []way{
			{name: "pull", unpacks: 1, ref: b.image.Ref, get: pull},
			{name: fmt.Sprintf("pull, unpacking %d at once", parallelUnpacks), unpacks: parallelUnpacks, ref: b.image.Ref, get: pull},
			{name: "ctr images import of an archive", unpacks: 1, ref: b.image.Ref, get: b.command("ctr", "-n", "k8s.io", "images", "import", archive)},
		}
	},
}

var dockerPeers = peers{
	node: func(s *session) (*node, error) { return s.docker() },
	run: func(ref string, command ...string) []string {
		return append([]string{"docker", "run", "--rm", "--network=host", ref}, command...)
	},
	save: func(ref string) []string { return []string{"docker", "save", "-o", archive, ref} },
	ways: func(b *firstPage) []way {
		return []way{
			{name: "pull", unpacks: 1, ref: b.image.Ref, get: b.command("docker", "pull", "-q", b.image.Ref)},
			{name: "docker load of an archive", unpacks: 1, ref: b.image.Ref, get: b.command("docker", "load", "-q", "-i", archive)},
		}
	},
}

// archive is where a node has the image as its runtime writes it to a file: ctr's has the
// registry's compressed layers, Docker's the same uncompressed.
const archive = "/mnt/desktop.tar"

func newDesktop(s *session, p peers) benchmark { return &firstPage{s: s, peers: p} }

func (b *firstPage) prepare(ctx context.Context) error {
	n, err := b.peers.node(b.s)
	if err != nil {
		return err
	}
	d, err := b.s.desktopDisk()
	if err != nil {
		return err
	}
	if b.disk, err = b.s.attach(n, d); err != nil {
		return err
	}
	all, err := b.s.desktops()
	if err != nil {
		return err
	}
	b.image = all.images[0]
	b.cached = b.image
	if b.cached.Ref, err = d.name(b.image.Ref); err != nil {
		return err
	}
	inject := func(ctx context.Context) error {
		_, err := b.disk.inject(ctx)
		return err
	}
	b.ways = append([]way{{name: "inject", unpacks: 1, ref: b.cached.Ref, get: inject}}, b.peers.ways(b)...)
	return b.writeArchive(ctx)
}

// name is that of a disk's image in the repository and with the tag of ref, whatever
// registry it came from.
func (d *disk) name(ref string) (string, error) {
	_, rest, _ := strings.Cut(ref, "/")
	for _, img := range d.manifest.Images {
		for _, n := range img.Names {
			if strings.HasSuffix(n, "/"+rest) {
				return n, nil
			}
		}
	}
	return "", fmt.Errorf("the cache disk has no %s", rest)
}

// writeArchive has the node pull the image and write its archive.
func (b *firstPage) writeArchive(ctx context.Context) error {
	if err := b.ways[1].get(ctx); err != nil {
		return err
	}
	return b.command(b.peers.save(b.image.Ref)...)(ctx)
}

func (b *firstPage) command(args ...string) func(context.Context) error {
	return func(ctx context.Context) error {
		_, err := b.disk.node.Run(ctx, args...)
		return err
	}
}

func (b *firstPage) round(ctx context.Context) error {
	for i := range b.ways {
		if err := b.measure(ctx, &b.ways[i]); err != nil {
			return fmt.Errorf("%s: %w", b.ways[i].name, err)
		}
	}
	if err := b.disk.node.fresh(ctx); err != nil {
		return err
	}
	took, err := b.disk.copyLayers(ctx)
	b.copied.took(took)
	return err
}

func (b *firstPage) measure(ctx context.Context, w *way) error {
	n := b.disk.node
	if err := n.freshWith(ctx, w.unpacks); err != nil {
		return err
	}
	all, err := b.s.desktops()
	if err != nil {
		return err
	}
	// A real registry has its blobs in the memory of other machines.
	if err := all.registry.Warm(); err != nil {
		return err
	}
	began := time.Now()
	if err := w.get(ctx); err != nil {
		return err
	}
	w.got.took(time.Since(began))
	if _, err := n.Run(ctx, b.peers.run(w.ref, "/bin/true")...); err != nil {
		return err
	}
	w.started.took(time.Since(began))
	out, err := n.Run(ctx, b.peers.run(w.ref, b.image.Command...)...)
	if err == nil && !strings.Contains(out, b.image.Want) {
		err = fmt.Errorf("%s said %q, not %q", w.ref, out, b.image.Want)
	}
	w.drawn.took(time.Since(began))
	return err
}

func (b *firstPage) figures() []figure {
	inject, pull := b.ways[0], b.ways[1]
	var f []figure
	for _, w := range b.ways {
		whole, to := [3]series{inject.got, inject.started, inject.drawn}, "inject"
		bound := 0.0
		if w.name == inject.name {
			whole, to, bound = [3]series{pull.got, pull.started, pull.drawn}, "pull", 0.02
		}
		f = append(f,
			figure{name: w.name, unit: seconds, runs: w.got, ratios: []ratio{{to, 0, w.got.over(whole[0])}}},
			figure{name: w.name + " and started", unit: seconds, runs: w.started, ratios: []ratio{{to + " and started", bound, w.started.over(whole[1])}}},
			figure{name: w.name + ", started, and a page drawn by the browser", unit: seconds, runs: w.drawn, ratios: []ratio{{to + " and drawn", 0, w.drawn.over(whole[2])}}},
		)
	}
	return append(f, figure{name: "cp -a of all layers on the disk", unit: seconds, runs: b.copied,
		ratios: []ratio{{"inject", 0, b.copied.over(inject.got)}}})
}
