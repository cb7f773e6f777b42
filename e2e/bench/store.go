package main

import (
	"context"
	_ "embed"
	"fmt"
	"path/filepath"
)

// store registers synthetic images in the store of Docker's overlay2 graph driver.
type store struct {
	s      *session
	images int
	disk   *attached

	inject, again, restart, daemon series
	bind, injectBind               series
}

func newStore(s *session, images int) benchmark { return &store{s: s, images: images} }

//go:embed bind.sh
var bindScript string

func (b *store) prepare(context.Context) error {
	n, err := b.s.docker()
	if err != nil {
		return err
	}
	d, err := b.s.chainsDisk(b.images)
	if err != nil {
		return err
	}
	b.disk, err = b.s.attach(n, d)
	return err
}

func (b *store) round(ctx context.Context) error {
	for _, step := range []func(context.Context) error{b.stopped, b.running, b.binds, b.script} {
		if err := step(ctx); err != nil {
			return err
		}
	}
	return nil
}

// stopped injects while there is no dockerd: the work alone.
func (b *store) stopped(ctx context.Context) error {
	if err := b.freshStopped(ctx); err != nil {
		return err
	}
	took, err := b.disk.inject(ctx)
	if err != nil {
		return err
	}
	again, err := b.disk.injectAgain(ctx)
	if err != nil {
		return err
	}
	b.inject.took(took)
	b.again.took(again)
	return b.works(ctx)
}

// running injects with a dockerd that has to be restarted for it. Then it is restarted
// for nothing.
func (b *store) running(ctx context.Context) error {
	n := b.disk.node
	if err := n.fresh(ctx); err != nil {
		return err
	}
	if err := b.disk.warm(ctx); err != nil {
		return err
	}
	took, err := b.disk.inject(ctx)
	if err != nil {
		return err
	}
	if err := n.forgetStarts(ctx); err != nil {
		return err
	}
	_, daemon, err := n.timed(ctx, "systemctl", "restart", "docker.service")
	b.restart.took(took)
	b.daemon.took(daemon)
	return err
}

// binds injects with bind mounts for links.
func (b *store) binds(ctx context.Context) error {
	if err := b.freshStopped(ctx); err != nil {
		return err
	}
	took, err := b.disk.inject(ctx, "--link=bind")
	b.injectBind.took(took)
	return err
}

func (b *store) script(ctx context.Context) error {
	if err := b.freshStopped(ctx); err != nil {
		return err
	}
	args := []string{"sh", "-c", bindScript, "bind.sh", filepath.Join(b.disk.dir, b.disk.manifest.Store.Root), dockerRoot}
	for _, l := range b.disk.manifest.Layers {
		args = append(args, l.Directory)
	}
	_, took, err := b.disk.node.timed(ctx, args...)
	if err != nil {
		return err
	}
	b.bind.took(took)
	return b.works(ctx)
}

// freshStopped has dockerd make its store, and stops it. What is read is in memory.
func (b *store) freshStopped(ctx context.Context) error {
	if err := b.disk.node.fresh(ctx); err != nil {
		return err
	}
	if _, err := b.disk.node.Run(ctx, "systemctl", "stop", "docker.socket", "docker.service"); err != nil {
		return err
	}
	return b.disk.warm(ctx)
}

// works starts dockerd and a container of the last image, so that what was timed is
// known to have been done.
func (b *store) works(ctx context.Context) error {
	n := b.disk.node
	if err := n.startDockerd(ctx); err != nil {
		return err
	}
	ref := b.disk.manifest.Images[len(b.disk.manifest.Images)-1].Names[0]
	out, err := n.Run(ctx, "docker", "run", "--rm", "--network=none", ref, "/bin/echo", "it works")
	if err == nil && out != "it works\n" {
		err = fmt.Errorf("%s said %q", ref, out)
	}
	return err
}

func (b *store) figures() []figure {
	of := fmt.Sprintf("%d layers", len(b.disk.manifest.Layers))
	return []figure{
		{name: "inject with dockerd stopped, " + of, unit: seconds, bound: 0.5, runs: b.inject,
			ratios: []ratio{{"a script's bind mounts", 0.1, b.inject.over(b.bind)}, {"inject --link=bind", 0, b.inject.over(b.injectBind)}}},
		{name: "inject again, nothing to do", unit: seconds, bound: 0.1, runs: b.again},
		{name: "inject with dockerd running", unit: seconds, runs: b.restart, ratios: []ratio{{"a restart", 0, b.restart.over(b.daemon)}}},
		{name: "restart of dockerd with the images", unit: seconds, runs: b.daemon},
		{name: "bind mounts by a script, metadata copied", unit: seconds, runs: b.bind, ratios: []ratio{{"inject", 0, b.bind.over(b.inject)}}},
		{name: "inject --link=bind", unit: seconds, runs: b.injectBind, ratios: []ratio{{"inject", 0, b.injectBind.over(b.inject)}}},
	}
}
