package agent

import (
	"maps"
	"slices"
	"sync"

	"github.com/selkies-project/packer-plugin-selkies/injector/report"
)

// reason says why images have to be registered, as the metric of heals has it.
type reason string

const (
	reasonStart   reason = "start"
	reasonRuntime reason = "runtime" // containerd was away, and may have lost its state
	reasonDisk    reason = "disk"    // a disk has come or gone
	reasonMount   reason = "mount"   // a disk's mount was dead or gone
	reasonPin     reason = "pin"     // a pull took our labels from an image
	reasonRemoved reason = "removed" // an image was removed, and is to be restored
)

// changes are what containerd has told of since the last pass.
type changes struct {
	signal chan struct{}

	mu sync.Mutex
	// names are those of the images of the disks: others do not matter.
	names   map[string]bool
	removed map[string]bool
	altered bool
	ended   error // of the watch
}

func newChanges() *changes {
	return &changes{signal: make(chan struct{}, 1), removed: map[string]bool{}}
}

func (c *changes) follow(names map[string]bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.names = names
}

func (c *changes) add(ch report.Change) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if !c.names[ch.Name] {
		return
	}
	if ch.Removed {
		c.removed[ch.Name] = true
	} else {
		c.altered = true
	}
	c.notify()
}

func (c *changes) end(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.ended = err
	c.notify()
}

func (c *changes) notify() {
	select {
	case c.signal <- struct{}{}:
	default:
	}
}

// away says whether the watch has ended since the last pass began.
func (c *changes) away() bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.ended != nil
}

// take gives the changes and forgets them.
func (c *changes) take() (removed []string, altered bool, ended error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	removed, altered, ended = slices.Sorted(maps.Keys(c.removed)), c.altered, c.ended
	c.removed, c.altered, c.ended = map[string]bool{}, false, nil
	return removed, altered, ended
}

// takeChanges makes work of what containerd has told.
func (a *Agent) takeChanges() {
	removed, altered, ended := a.changes.take()
	if ended != nil {
		a.Log.Warn("containerd is away; connecting again", "error", ended)
		a.closeRuntime()
		clear(a.there) // it may have lost its state
		a.need(reasonRuntime)
	}
	if altered {
		a.need(reasonPin)
	}
	for _, name := range removed {
		if !a.ejected[name] {
			a.removed[name] = true
			a.need(reasonRemoved)
		}
	}
	clear(a.ejected) // their events came long before this pass
}

// need has images registered in this pass. The first reason counts.
func (a *Agent) need(r reason) {
	if a.pending == "" {
		a.pending = r
	}
}
