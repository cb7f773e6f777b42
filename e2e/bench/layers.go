package main

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/client"

	"github.com/selkies-project/packer-plugin-selkies/e2e/machine"
	"github.com/selkies-project/packer-plugin-selkies/e2e/registry"
)

// layers registers synthetic images with containerd: what a layer costs.
type layers struct {
	s      *session
	images int
	pull   bool // measure pulls too
	disk   *attached
	// registry serves refs, the images to pull.
	registry *registry.Registry
	refs     []string

	inject, cold, again            series
	floor, calls                   series
	transactions                   series
	first, all                     series // until images are usable, from inject's start
	coldRequests, coldBytes        series
	manifestBytes                  series
	pulled, pulledParallel, copied series
}

func newLayers(s *session, images int, pull bool) benchmark {
	return &layers{s: s, images: images, pull: pull}
}

func (l *layers) prepare(context.Context) error {
	n, err := l.s.containerd()
	if err != nil {
		return err
	}
	d, err := l.s.chainsDisk(l.images)
	if err != nil {
		return err
	}
	if l.disk, err = l.s.attach(n, d); err != nil || !l.pull {
		return err
	}
	c, err := l.s.chains()
	if err == nil {
		l.registry, l.refs = c.registry, c.refs[:l.images]
	}
	return err
}

func (l *layers) round(ctx context.Context) error {
	for _, step := range []func(context.Context) error{l.injectWarm, l.injectCold, l.pulls} {
		if err := step(ctx); err != nil {
			return err
		}
	}
	return nil
}

// injectWarm has the disk's metadata in the page cache, so that it is containerd and
// the node's disk which are measured.
func (l *layers) injectWarm(ctx context.Context) error {
	n := l.disk.node
	if err := n.fresh(ctx); err != nil {
		return err
	}
	if err := l.disk.warm(ctx); err != nil {
		return err
	}
	root := n.Path(containerdRoot)
	before, err := transactions(root)
	if err != nil {
		return err
	}
	began := time.Now()
	took, err := l.disk.inject(ctx)
	if err != nil {
		return err
	}
	after, err := transactions(root)
	if err != nil {
		return err
	}
	if err := l.usable(ctx, began); err != nil {
		return err
	}
	again, err := l.disk.injectAgain(ctx)
	if err != nil {
		return err
	}
	counts := []int{after[0] - before[0], after[1] - before[1]}
	least, err := floor(root, counts)
	if err != nil {
		return err
	}
	own, err := calls(root, l.disk.manifest)
	if err != nil {
		return err
	}
	l.calls.took(own)
	l.inject.took(took)
	l.again.took(again)
	l.floor.took(least)
	l.transactions.add(float64(counts[0] + counts[1]))
	return nil
}

// usable takes the time until the first image was usable, and all of them. An image
// record comes last; containerd notes when.
func (l *layers) usable(ctx context.Context, began time.Time) error {
	c, err := client.New(l.disk.node.Path(machine.Socket), client.WithDefaultNamespace("k8s.io"))
	if err != nil {
		return err
	}
	defer c.Close()
	records, err := c.ImageService().List(ctx)
	if err != nil {
		return err
	}
	var first, last time.Time
	for _, r := range records {
		if strings.HasPrefix(r.Name, "sha256:") {
			continue // the CRI's own
		}
		if first.IsZero() || r.CreatedAt.Before(first) {
			first = r.CreatedAt
		}
		if r.CreatedAt.After(last) {
			last = r.CreatedAt
		}
	}
	l.first.took(first.Sub(began))
	l.all.took(last.Sub(began))
	return nil
}

// injectCold reads everything from disks, as after a boot.
func (l *layers) injectCold(ctx context.Context) error {
	if err := l.disk.node.fresh(ctx); err != nil {
		return err
	}
	before, err := l.disk.reads()
	if err != nil {
		return err
	}
	took, err := l.disk.inject(ctx)
	if err != nil {
		return err
	}
	after, err := l.disk.reads()
	if err != nil {
		return err
	}
	size, err := l.disk.manifestSize()
	if err != nil {
		return err
	}
	l.cold.took(took)
	l.coldRequests.add(float64(after.requests - before.requests))
	l.coldBytes.add(float64(after.bytes - before.bytes))
	l.manifestBytes.add(float64(size))
	return nil
}

// pulls are what inject takes the place of: pulls from a registry on loopback, and a
// copy of the layers from the disk.
func (l *layers) pulls(ctx context.Context) error {
	if !l.pull {
		return nil
	}
	n := l.disk.node
	for _, p := range []struct {
		unpacks int
		series  *series
	}{{1, &l.pulled}, {parallelUnpacks, &l.pulledParallel}} {
		if err := n.freshWith(ctx, p.unpacks); err != nil {
			return err
		}
		if err := l.registry.Warm(); err != nil {
			return err
		}
		_, took, err := n.timed(ctx, append([]string{"sh", "-ec", pullAll, "pull"}, l.refs...)...)
		if err != nil {
			return err
		}
		p.series.took(took)
	}
	if err := n.fresh(ctx); err != nil {
		return err
	}
	took, err := l.disk.copyLayers(ctx)
	l.copied.took(took)
	return err
}

// parallelUnpacks is how many layers containerd unpacks at once where it does that.
const parallelUnpacks = 4

const pullAll = `for ref; do ctr -n k8s.io images pull --plain-http "$ref" >/dev/null; done`

func (l *layers) figures() []figure {
	n := l.layers()
	of := fmt.Sprintf("%d layers", n)
	bound := func(images int, bound float64) float64 {
		if l.images == images {
			return bound
		}
		return 0
	}
	f := []figure{
		{name: "inject, " + of, unit: seconds, runs: l.inject, ratios: []ratio{
			{"the floor", 1.5, l.inject.over(l.floor)}, {"containerd's calls", 0, l.inject.over(l.calls)}}},
		{name: "inject, per layer", unit: seconds, runs: l.inject.per(n)},
		{name: "floor: as many bbolt transactions", unit: seconds, runs: l.floor},
		{name: "containerd's calls: its own code for the layers, in one process", unit: seconds, runs: l.calls,
			ratios: []ratio{{"the floor", 0, l.calls.over(l.floor)}}},
		{name: "transactions", unit: count, runs: l.transactions, ratios: []ratio{{"the layers", 0, l.transactions.per(n)}}},
		{name: "inject again, nothing to do", unit: seconds, bound: bound(60, 0.1), runs: l.again},
		{name: "first image usable", unit: seconds, runs: l.first,
			ratios: []ratio{{fmt.Sprintf("all %d images usable", l.images), bound(60, 0.1), l.first.over(l.all)}}},
		{name: "all images usable", unit: seconds, runs: l.all},
		{name: "inject, cold caches", unit: seconds, runs: l.cold, ratios: []ratio{{"warm caches", 0, l.cold.over(l.inject)}}},
		{name: "read from the cold cache disk", unit: bytes, runs: l.coldBytes,
			ratios: []ratio{{"the layer manifest", 0, l.coldBytes.over(l.manifestBytes)}}},
		{name: "the same in requests", unit: count, runs: l.coldRequests, ratios: []ratio{{"the layers", 0, l.coldRequests.per(n)}}},
	}
	if !l.pull {
		return f
	}
	f[0].ratios = append(f[0].ratios, ratio{"pull", 0, l.inject.over(l.pulled)})
	return append(f,
		figure{name: "pull", unit: seconds, runs: l.pulled, ratios: []ratio{{"inject", 0, l.pulled.over(l.inject)}}},
		figure{name: fmt.Sprintf("pull, unpacking %d at once", parallelUnpacks), unit: seconds, runs: l.pulledParallel,
			ratios: []ratio{{"inject", 0, l.pulledParallel.over(l.inject)}}},
		figure{name: "cp -a of all layers on the disk", unit: seconds, runs: l.copied, ratios: []ratio{{"inject", 0, l.copied.over(l.inject)}}},
	)
}

// growth is what a layer costs among many, in terms of what it costs among few. What a
// run costs however few layers it has is a part of that, but not of what each further
// layer costs.
func growth(sizes []*layers) []figure {
	few, many := sizes[0], sizes[len(sizes)-1]
	a, b := few.layers(), many.layers()
	bound := 0.0
	if few.images == 10 && many.images == most {
		bound = 1.2
	}
	f := []figure{
		{name: fmt.Sprintf("inject per layer, %d layers", b), unit: seconds, runs: many.inject.per(b),
			ratios: []ratio{{fmt.Sprintf("that with %d", a), bound, many.inject.per(b).over(few.inject.per(a))}}},
		{name: fmt.Sprintf("floor per layer, %d layers", b), unit: seconds, runs: many.floor.per(b),
			ratios: []ratio{{fmt.Sprintf("that with %d", a), 0, many.floor.per(b).over(few.floor.per(a))}}},
		{name: fmt.Sprintf("requests to the cold disk per layer, %d layers", b), unit: count, runs: many.coldRequests.per(b),
			ratios: []ratio{{fmt.Sprintf("that with %d", a), 0, many.coldRequests.per(b).over(few.coldRequests.per(a))}}},
	}
	if len(sizes) == 3 {
		middle := sizes[1]
		last := each(middle, many)
		f = append(f, figure{name: fmt.Sprintf("inject, each further layer, %d to %d layers", middle.layers(), b), unit: seconds, runs: last,
			ratios: []ratio{{fmt.Sprintf("that of %d to %d", a, middle.layers()), bound, last.over(each(few, middle))}}})
	}
	return f
}

func (l *layers) layers() int { return len(l.disk.manifest.Layers) }

// each is what each layer takes that one has more than the other.
func each(few, many *layers) series {
	var s series
	for i := range min(len(few.inject), len(many.inject)) {
		s.add((many.inject[i] - few.inject[i]) / float64(many.layers()-few.layers()))
	}
	return s
}
