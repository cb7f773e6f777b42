package containerd

import (
	"context"
	"fmt"
	"path/filepath"
	"sync"
	"time"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/opencontainers/go-digest"

	"github.com/selkies-project/packer-plugin-selkies/injector/cachedisk"
)

// anchor is the snapshot on which the disk of one generation is mounted. No
// container uses it; it keeps the mount where every layer's link finds it.
type anchor struct {
	name    string
	cache   digest.Digest
	created time.Time
	// dir is its labelDir.
	dir string
	// alive says why the disk cannot be read there, or nil; asked once.
	alive func() error
}

func anchorName(cache digest.Digest) string { return "selkies-image-cache-" + cache.String() }

// anchorOf reads an anchor back from its snapshot; nil if info is none.
func (r *Runtime) anchorOf(info snapshots.Info) *anchor {
	cache := digest.Digest(info.Labels[labelCache])
	if info.Labels[labelAnchor] == "" || info.Labels[labelDir] == "" || info.Kind != snapshots.KindCommitted {
		return nil
	}
	// Without a time it is older than any other.
	created, _ := time.Parse(time.RFC3339, info.Labels[labelCreated])
	a := &anchor{name: info.Name, cache: cache, created: created, dir: info.Labels[labelDir]}
	a.alive = sync.OnceValue(func() error {
		return cachedisk.CheckOnHost(r.opt.HostRoot, r.mountPoint(a), cache)
	})
	return a
}

// mountPoint is the host path that the anchor's disk is mounted on.
func (r *Runtime) mountPoint(a *anchor) string {
	return filepath.Join(r.root, "snapshots", a.dir, "fs")
}

// known are the anchors that the node has, by generation.
func (r *Runtime) known(ctx context.Context) (map[digest.Digest]*anchor, error) {
	anchors := map[digest.Digest]*anchor{}
	err := r.snapshots.Walk(ctx, func(_ context.Context, info snapshots.Info) error {
		if a := r.anchorOf(info); a != nil {
			anchors[a.cache] = a
		}
		return nil
	})
	if err != nil {
		return nil, fmt.Errorf("listing snapshots: %w", r.explain(err))
	}
	return anchors, nil
}

// remount mounts the disks whose anchors the node has, before anything else is done:
// after a reboot containers wait for nothing more. What fails here is tried again, and
// reported, by ensureAnchor.
func (r *Runtime) remount(ctx context.Context, disks []*cachedisk.Disk) error {
	anchors, err := r.known(ctx)
	if err != nil {
		return err
	}
	for _, d := range disks {
		a := anchors[d.ID]
		if a == nil {
			continue
		}
		if err := r.mount(d, a); err != nil {
			r.opt.Log.Debug("mounting a cache disk first", "error", err)
		}
	}
	return nil
}

// ensureAnchor makes the disk's anchor and mounts the disk on it, whichever is
// missing.
func (r *Runtime) ensureAnchor(ctx context.Context, run string, d *cachedisk.Disk) (*anchor, error) {
	name := anchorName(d.ID)
	labels := map[string]string{
		labelCache:   d.ID.String(),
		labelAnchor:  "true",
		labelCreated: d.Manifest.Created.UTC().Format(time.RFC3339),
		// Nothing refers to it, and it has to stay.
		"containerd.io/gc.root": d.Manifest.Created.UTC().Format(time.RFC3339),
	}
	if _, err := r.commit(ctx, run, name, "", labels, syncDir); err != nil {
		return nil, err
	}
	info, err := r.snapshots.Stat(ctx, name)
	if err != nil {
		return nil, fmt.Errorf("looking up snapshot %s: %w", name, err)
	}
	a := r.anchorOf(info)
	if a == nil {
		return nil, fmt.Errorf("snapshot %s is not the anchor that its name says: remove it with ctr snapshots rm", name)
	}
	if err := r.mount(d, a); err != nil {
		return nil, err
	}
	a.alive = func() error { return nil }
	return a, nil
}

// mount mounts the disk on its anchor, if it is not.
func (r *Runtime) mount(d *cachedisk.Disk, a *anchor) error {
	if cachedisk.CheckOnHost(r.opt.HostRoot, r.mountPoint(a), d.ID) == nil {
		return nil
	}
	if err := r.checkPlaced(d, a); err != nil {
		return err
	}
	return d.MountOnHost(r.opt.HostRoot, r.mountPoint(a))
}
