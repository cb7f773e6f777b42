package docker

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/docker/docker/api/types/container"

	"github.com/selkies-project/packer-plugin-selkies/injector/cachedisk"
	"github.com/selkies-project/packer-plugin-selkies/injector/report"
)

// Inject registers the disks' images. A daemon that runs is restarted if something
// is missing. dockerd takes all images at once, so InjectOptions.First is no matter.
// Removed is none either: dockerd does not tell what someone removes.
func (r *Runtime) Inject(ctx context.Context, disks []*cachedisk.Disk, opt report.InjectOptions) (*report.Inject, error) {
	start := time.Now()
	disks = cachedisk.NewestFirst(disks)
	out := &report.Inject{Runtime: "docker"}
	var c *changes
	var err error
	if opt.DryRun {
		if c, err = r.plan(disks, r.checker()); err != nil {
			return nil, err
		}
		if refusal := r.refuse(ctx, disks, c); refusal != nil {
			out.Refusal = refusal.Error()
		}
	} else {
		unlock, e := r.lock(ctx)
		if e != nil {
			return nil, e
		}
		defer unlock()
		disks = slices.DeleteFunc(disks, func(d *cachedisk.Disk) bool { return opt.WasEjected(d.ID) })
		if c, err = r.inject(ctx, disks); err != nil {
			return nil, err
		}
	}
	for _, d := range c.disks {
		for _, img := range d.Images {
			opt.Report(img)
		}
	}
	out.Disks, out.Restart = c.disks, c.restart() && r.info != nil
	out.Milliseconds = time.Since(start).Milliseconds()
	return out, nil
}

// refuse says why the changes cannot be made now.
func (r *Runtime) refuse(ctx context.Context, disks []*cachedisk.Disk, c *changes) error {
	if err := c.checkFiles(disks); err != nil {
		return err
	}
	if err := r.checkRoom(c); err != nil {
		return err
	}
	if c.restart() && r.info != nil {
		return r.checkRestart(ctx)
	}
	return nil
}

func (r *Runtime) inject(ctx context.Context, disks []*cachedisk.Disk) (*changes, error) {
	if err := r.remount(disks); err != nil {
		return nil, err
	}
	check := r.checker()
	c, err := r.plan(disks, check)
	if err != nil {
		return nil, err
	}
	if err := r.refuse(ctx, disks, c); err != nil {
		return nil, err
	}
	if err := r.saveAll(c); err != nil {
		return nil, err
	}
	for _, d := range disks {
		if err := r.mount(d); err != nil {
			return nil, err
		}
	}
	if err := r.relinkLayers(c.relinks); err != nil {
		return nil, err
	}
	if !c.restart() {
		if err := r.addMetadata(c.metadata); err != nil {
			return nil, err
		}
		return c, r.resume(ctx)
	}
	if err := r.stage(c, r.opt.Link); err != nil {
		return nil, errors.Join(err, r.abandon(c))
	}
	err = r.whileStopped(ctx, func() error {
		if c, err = r.restage(c, disks, check); err != nil {
			return err
		}
		if err := r.checkStill(); err != nil {
			return err
		}
		if err := r.commit(c); err != nil {
			return err
		}
		return r.bindLayers(disks, check)
	})
	if err != nil {
		return nil, errors.Join(err, r.abandon(c))
	}
	return c, nil
}

func (s store) saveAll(c *changes) error {
	for _, rec := range c.records {
		if err := s.save(rec, c.known); err != nil {
			return err
		}
	}
	return nil
}

// restage looks again, now that the store stands still: a pull may have brought
// layers or names since c was staged, and dockerd, as it stopped, may have finished the
// removal of layers, whose directories c then lacks (see forgetRemovals).
func (r *Runtime) restage(c *changes, disks []*cachedisk.Disk, check checker) (*changes, error) {
	now, err := r.plan(disks, check)
	if err != nil || now.equal(c) && r.staged(c) {
		return c, err
	}
	r.opt.Log.Info("docker's store changed while layers were prepared; preparing them again")
	if err := r.abandon(c); err != nil {
		return c, err
	}
	if err := now.checkFiles(disks); err != nil {
		return now, err
	}
	if err := r.saveAll(now); err != nil {
		return now, err
	}
	return now, r.stage(now, r.opt.Link)
}

// bindLayers binds every layer of ours that is not linked: those that were just
// registered, and those whose mounts dockerd took down as it stopped (it unmounts
// all below its overlay2 directory).
func (r *Runtime) bindLayers(disks []*cachedisk.Disk, check checker) error {
	if r.opt.Link != LinkBind {
		return nil
	}
	c, err := r.plan(disks, check)
	if err != nil {
		return err
	}
	return r.relinkLayers(c.relinks)
}

// mount makes the disk readable on the host at the generation's mount point.
func (r *Runtime) mount(d *cachedisk.Disk) error {
	target := mountpoint(d.ID)
	if err := os.MkdirAll(r.host(target), 0o700); err != nil {
		return fmt.Errorf("making the mount point %s: %w", target, err)
	}
	return d.MountOnHost(r.opt.HostRoot, target)
}

// remount mounts the disks of generations that are registered, before anything that may
// be refused: after a reboot containers wait for nothing more.
func (r *Runtime) remount(disks []*cachedisk.Disk) error {
	for _, d := range disks {
		if _, err := os.Lstat(r.recordFile(d.ID)); err != nil {
			continue // also if it cannot be told: mounting is repeated later
		}
		if cachedisk.CheckOnHost(r.opt.HostRoot, mountpoint(d.ID), d.ID) == nil {
			continue
		}
		if err := r.checkLinked(d); err != nil {
			return err
		}
		if err := r.mount(d); err != nil {
			return err
		}
	}
	return nil
}

// checkRestart refuses to restart a daemon that runs containers which that would end.
func (r *Runtime) checkRestart(ctx context.Context) error {
	if err := r.checkStoppable(ctx); err != nil {
		return err
	}
	if r.info.LiveRestoreEnabled || r.opt.RestartRunning {
		return nil
	}
	running, err := r.cli.ContainerList(ctx, container.ListOptions{})
	if err != nil {
		return fmt.Errorf("listing docker's containers: %w", explain(err))
	}
	if len(running) == 0 {
		return nil
	}
	var names []string
	for _, c := range running {
		names = append(names, containerName(c))
	}
	return fmt.Errorf("registering needs a restart of docker, which would end the running containers %s; set \"live-restore\": true in daemon.json, stop them, or allow it with --docker-restart-running",
		strings.Join(names, ", "))
}

func containerName(c container.Summary) string {
	if len(c.Names) > 0 {
		return strings.TrimPrefix(c.Names[0], "/")
	}
	return c.ID
}
