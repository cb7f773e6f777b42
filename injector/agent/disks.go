package agent

import (
	"context"
	"errors"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/selkies-project/packer-plugin-selkies/injector/cachedisk"
	"github.com/selkies-project/packer-plugin-selkies/injector/report"
)

// generation is one that is registered on the node.
type generation struct {
	report.Generation
	// dead is since when its disk cannot be read, zero while it can.
	dead time.Time
	// problem says why not.
	problem error
	// seen is whether the disk could be read since the agent started.
	seen bool
	// kept is what was said last of images that could not be ejected.
	kept string
}

// alive says that its disk can be read.
func (g *generation) alive() { g.dead, g.problem, g.seen = time.Time{}, nil, true }

// sorted are the registered generations in a fixed order.
func (a *Agent) sorted() []*generation {
	return slices.SortedFunc(maps.Values(a.generations), func(x, y *generation) int {
		return strings.Compare(x.CacheID.String(), y.CacheID.String())
	})
}

// findDisks finds the disks that can be read: in their own directories or, where
// those are gone, on the mounts that registered layers are read through.
func (a *Agent) findDisks() error {
	disks, err := cachedisk.Find(a.Caches, a.HostRoot)
	for _, g := range a.sorted() {
		dir := cachedisk.HostPath(a.HostRoot, g.Dir)
		found := has(disks, g.CacheID)
		if g.problem = cachedisk.Probe(dir); g.problem == nil && !found {
			var d *cachedisk.Disk
			if d, g.problem = cachedisk.Open(dir); g.problem == nil {
				disks = append(disks, d)
			}
		}
		switch {
		case g.problem == nil:
			g.alive()
		case found && errors.Is(g.problem, cachedisk.ErrUnreadable):
			a.pending = reasonMount // worth telling also at the start
		case found:
			a.need(reasonMount)
		case g.dead.IsZero():
			g.dead = time.Now()
		}
	}
	if errors.Is(err, cachedisk.ErrAbsent) && len(disks) >= max(1, len(a.Caches)) {
		err = nil // its mount is there all the same
	}
	disks, foreign := cachedisk.Runnable(disks)
	names := map[string]bool{}
	for _, d := range disks {
		if !has(a.disks, d.ID) {
			a.need(reasonDisk)
		}
		for _, img := range d.Manifest.Images {
			for _, name := range img.Names {
				names[name] = true
			}
		}
	}
	a.disks = disks
	a.changes.follow(names)
	return errors.Join(err, foreign)
}

func has(disks []*cachedisk.Disk, id digest.Digest) bool {
	return slices.ContainsFunc(disks, func(d *cachedisk.Disk) bool { return d.ID == id })
}

// listGenerations asks the runtime what is registered.
func (a *Agent) listGenerations(ctx context.Context) error {
	list, err := a.runtime.Generations(ctx)
	if err != nil {
		return err
	}
	known := a.generations
	a.generations = map[digest.Digest]*generation{}
	for _, g := range list {
		if old := known[g.CacheID]; old != nil && old.Dir == g.Dir {
			a.generations[g.CacheID] = old
		} else {
			a.generations[g.CacheID] = &generation{Generation: g}
		}
	}
	return nil
}

// patience is how long the generation's disk may be unreadable. One that was not
// there since the agent started, as after a reboot, gets no longer than pods are
// kept waiting: those that the gate lets in then find its images gone and pull.
func (a *Agent) patience(g *generation) time.Duration {
	if g.seen {
		return a.GoneAfter
	}
	return min(a.GoneAfter, a.GateDeadline)
}

// eject removes what was registered from disks that are gone for good: as
// long as that stands, a pull succeeds without repairing anything. Images that a
// container uses, running or not, stay until a later pass finds them unused.
func (a *Agent) eject(ctx context.Context) error {
	var errs []error
	for _, g := range a.sorted() {
		if g.dead.IsZero() || time.Since(g.dead) < a.patience(g) {
			continue
		}
		errs = append(errs, a.ejectOne(ctx, g))
	}
	return errors.Join(errs...)
}

func (a *Agent) ejectOne(ctx context.Context, g *generation) error {
	if err := a.openRuntime(ctx); err != nil {
		return err
	}
	r, err := a.runtime.Eject(ctx, report.EjectOptions{Caches: []digest.Digest{g.CacheID}, LeaveUsed: true})
	if err != nil {
		return err
	}
	if err := a.listGenerations(ctx); err != nil {
		return err
	}
	for _, name := range r.Images {
		a.ejected[name] = true
		delete(a.there, name)
	}
	if len(r.Images) > 0 || a.generations[g.CacheID] == nil {
		a.metrics.ejected.Inc()
		a.warn(eventEjected, "cache %s: its disk is gone: ejected %d image names: %v", report.Short(g.CacheID), len(r.Images), g.problem)
		// Another disk may have some of them.
		a.registered = nil
		a.need(reasonDisk)
	}
	if kept := strings.Join(r.Kept, "; "); kept != g.kept && kept != "" {
		g.kept = kept
		a.Log.Warn("containers use layers of a disk that is gone; they are ejected when those are removed", "cache", g.CacheID, "kept", kept)
	}
	return nil
}
