package agent

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/selkies-project/packer-plugin-selkies/injector/report"
)

// openRuntime connects to the runtime if it is not connected, and starts watching.
func (a *Agent) openRuntime(ctx context.Context) error {
	if a.runtime != nil {
		return nil
	}
	rt, err := a.Open(ctx)
	if err != nil {
		return err
	}
	a.runtime = rt
	if err := a.listGenerations(ctx); err != nil {
		a.closeRuntime()
		return err
	}
	// Before anything is registered, so that no change is missed.
	if w, ok := rt.(watcher); ok {
		follow := w.Watch(ctx)
		go func() {
			err := follow(a.changes.add)
			if ctx.Err() == nil {
				a.changes.end(err)
			}
		}()
	}
	return nil
}

// checkRuntime asks a runtime that is watched whether it still answers: of one that hangs
// the watch tells nothing. It is connected to again in the next pass.
func (a *Agent) checkRuntime(ctx context.Context) error {
	w, ok := a.runtime.(watcher)
	if !ok {
		return nil
	}
	err := w.Check(ctx)
	if err != nil && ctx.Err() == nil {
		a.closeRuntime()
		a.need(reasonRuntime)
	}
	return err
}

func (a *Agent) closeRuntime() {
	if a.runtime != nil {
		a.runtime.Close()
		a.runtime = nil
	}
}

// releaseRuntime closes a runtime that is not watched.
func (a *Agent) releaseRuntime() {
	if _, watched := a.runtime.(watcher); !watched {
		a.closeRuntime()
	}
}

// register registers what is missing, the images that pods wait for first. The disks
// are mounted before any image is registered.
func (a *Agent) register(ctx context.Context) error {
	if err := a.openRuntime(ctx); err != nil {
		return err
	}
	if len(a.disks) == 0 {
		// A containerd whose state was emptied has mounts in its way all the same.
		if _, err := a.runtime.Inject(ctx, nil, report.InjectOptions{}); err != nil {
			return err
		}
		a.pending, a.registered, a.registerError = "", nil, nil
		return nil
	}
	opt := report.InjectOptions{First: a.wanted, Finished: a.finished, Ejected: a.wasEjected}
	if !a.RestoreRemoved {
		// Of what is being removed meanwhile no event has told yet.
		opt.Removed = maps.Clone(a.there)
		maps.Copy(opt.Removed, a.removed)
	}
	start := time.Now()
	r, err := a.runtime.Inject(ctx, a.disks, opt)
	if ctx.Err() != nil {
		return ctx.Err()
	}
	if a.changes.away() {
		// What containerd had lost looks as though someone had removed it. The next pass,
		// which is about to come, knows better.
		return nil
	}
	a.registerError = err
	if r == nil {
		return err
	}
	if e := a.listGenerations(ctx); e != nil {
		return e
	}
	a.tell(r, time.Since(start))
	a.noteRemoved(r)
	a.registered, a.there = r, names(r)
	if err != nil {
		return nil // said by registerError; the next pass tries again
	}
	a.pending = ""
	for _, d := range a.disks {
		if g := a.generations[d.ID]; g != nil {
			g.alive()
		}
	}
	return nil
}

// names are those of the images that the node has after a registration.
func names(r *report.Inject) map[string]bool {
	there := map[string]bool{}
	for _, d := range r.Disks {
		for _, img := range d.Images {
			if img.State != report.Registered && img.State != report.Present {
				continue
			}
			for _, name := range img.Names {
				there[name] = true
			}
		}
	}
	return there
}

// finished tells of one image. Several goroutines call it.
func (a *Agent) finished(img report.Image) {
	a.health.beat(a.CheckInterval)
	switch {
	case img.State == report.Failed:
		a.Log.Error(report.Title(img.Names)+": not registered", "error", img.Reason)
	case img.State == report.Registered || a.registered == nil:
		percent := 100
		if img.Layers > 0 {
			percent = 100 * img.Cached / img.Layers
		}
		attrs := []any{"state", img.State, "milliseconds", img.Milliseconds}
		if img.Reason != "" {
			attrs = append(attrs, "note", img.Reason)
		}
		a.Log.Info(fmt.Sprintf("%s: %d/%d layers (%d%%) from the cache", report.Title(img.Names), img.Cached, img.Layers, percent), attrs...)
	}
}

// tell reports a registration: the first one, or that it healed something.
func (a *Agent) tell(r *report.Inject, took time.Duration) {
	var names []string
	layers := 0
	for _, d := range r.Disks {
		layers += d.Registered
		for _, img := range d.Images {
			if img.State == report.Registered {
				names = append(names, report.Title(img.Names))
			}
		}
	}
	healed := len(names)
	if a.pending == reasonMount && a.deadMounts() != "" {
		healed = max(1, healed)
	}
	if healed == 0 {
		return
	}
	a.took = took
	took = took.Round(time.Millisecond)
	if a.pending == reasonStart || a.pending == reasonDisk || a.registered == nil && len(names) > 0 {
		a.inform(eventRegistered, "registered %d images (%d layers) in %v", len(names), layers, took)
		return
	}
	a.metrics.heals.WithLabelValues(string(a.pending)).Add(float64(healed))
	if len(names) == 0 {
		a.inform(eventHealed, "mounted the cache disk again: %s", a.deadMounts())
		return
	}
	a.inform(eventHealed, "registered again (%s): %s", a.pending.text(), list(names))
}

// deadMounts says why the mounts that are replaced could not be read. One that went with
// its generation's registrations, by an eject, is none of them.
func (a *Agent) deadMounts() string {
	var why []string
	for _, g := range a.sorted() {
		if g.problem != nil && has(a.disks, g.CacheID) {
			why = append(why, oneLine(g.problem))
		}
	}
	return strings.Join(why, "; ")
}

// text says what the reason means.
func (r reason) text() string {
	return map[reason]string{
		reasonRuntime: "the container runtime had lost them",
		reasonMount:   "the disk's mount was gone",
		reasonPin:     "a pull had replaced their labels",
		reasonRemoved: "they had been removed",
	}[r]
}

// noteRemoved reports images that someone has removed since the last time.
func (a *Agent) noteRemoved(r *report.Inject) {
	removed := map[string]bool{}
	for _, d := range r.Disks {
		for _, img := range d.Images {
			for _, name := range img.Removed {
				removed[name] = true
			}
		}
	}
	var fresh []string
	for _, name := range slices.Sorted(maps.Keys(removed)) {
		if !a.told[name] {
			fresh = append(fresh, name)
		}
	}
	// What is there again, by a pull, is no longer missed.
	a.removed, a.told = maps.Clone(removed), removed
	if len(fresh) > 0 {
		a.warn(eventRemoved, "removed by someone and left so, until the agent starts again: %s", list(fresh))
	}
}

// list names no more than fit a message.
func list(names []string) string {
	const most = 5
	if len(names) <= most {
		return strings.Join(names, ", ")
	}
	return fmt.Sprintf("%s and %d more", strings.Join(names[:most], ", "), len(names)-most)
}
