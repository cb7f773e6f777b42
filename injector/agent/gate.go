package agent

import (
	"context"
	"sync"
	"time"
)

// gate keeps pods off the node until its images are registered, but never longer
// than the deadline: then they pull as they would without a cache.
type gate struct {
	deadline time.Duration
	once     sync.Once
	done     chan struct{}
	// seen is done until the loop has seen it open, nil from then on.
	seen chan struct{}
}

func newGate(deadline time.Duration) *gate {
	done := make(chan struct{})
	return &gate{deadline: deadline, done: done, seen: done}
}

// openAtDeadline opens the gate at the deadline, whatever the passes do.
func (a *Agent) openAtDeadline(ctx context.Context) {
	g := a.gate
	timer := time.NewTimer(g.deadline)
	defer timer.Stop()
	select {
	case <-ctx.Done():
	case <-g.done:
	case <-timer.C:
		if g.open() {
			a.Log.Warn("the gate is open: its deadline has passed", "after", g.deadline)
			a.node.open()
		}
	}
}

// open opens it and says whether it was shut.
func (g *gate) open() (first bool) {
	g.once.Do(func() { close(g.done); first = true })
	return first
}

func (g *gate) isOpen() bool {
	select {
	case <-g.done:
		return true
	default:
		return false
	}
}

// opened can be received from when the gate has opened, until see.
func (g *gate) opened() <-chan struct{} { return g.seen }

func (g *gate) see() { g.seen = nil }
