package agent

import (
	"context"
	"slices"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
)

const (
	// firstPass is how long an agent that starts when the deadline is near, or has passed,
	// gets for its first pass before it opens the gate: the disk may have come late.
	firstPass = 20 * time.Second
	// gateDelay is how much longer than the deadline KeepGate waits, so that an agent that
	// runs is first. It bounds how long one that ends again and again keeps the gate shut.
	gateDelay = 30 * time.Second
)

// gate keeps pods off the node until its images are registered, or until the deadline:
// then they pull as they would without a cache. In a cluster the deadline counts from
// when the node joined.
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
	if a.node.passed(ctx, a.gate.deadline, min(firstPass, a.gate.deadline), a.gate.done) && a.gate.open() {
		a.Log.Info("the gate is open: its deadline has passed", "after", a.gate.deadline)
		a.node.open()
	}
}

// passed waits for a deadline, from when the node joined the cluster or, if that is not
// known or was later, from now, but on a node that is tainted at least for a while. It is
// false if the context ends or stop is closed before.
func (n *node) passed(ctx context.Context, deadline, atLeast time.Duration, stop <-chan struct{}) bool {
	start := time.Now()
	timer := time.NewTimer(deadline)
	defer timer.Stop()
	var joined <-chan time.Time // never, without a cluster
	if n != nil {
		joined = n.joined
	}
	for {
		select {
		case <-ctx.Done():
			return false
		case <-stop:
			return false
		case <-timer.C:
			return true
		case at := <-joined:
			if !n.tainted() {
				atLeast = 0 // nothing waits, and an update of the agent goes on to the next node
			}
			timer.Reset(time.Until(due(start, at, deadline, atLeast)))
		}
	}
}

// due is when the deadline passes on a node that joined at a time which its own clock may
// see in the future.
func due(start, joined time.Time, deadline, atLeast time.Duration) time.Time {
	wait := min(joined.Add(deadline).Sub(start), deadline)
	return start.Add(max(wait, atLeast))
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

// KeepGate opens the gate gateDelay after the deadline and keeps it open until the
// context ends, on a node whose agent may be unable to start, or ends again and again:
// kubelet starts no pod whose volume claim cannot be attached. Of the configuration it
// reads what concerns the cluster and the gate.
func KeepGate(ctx context.Context, c Config) error {
	if err := c.ValidateGate(); err != nil {
		return err
	}
	n, err := newNode(c)
	if err != nil {
		return err
	}
	go n.run(ctx)
	deadline := c.GateDeadline + gateDelay
	if !n.passed(ctx, deadline, 0, nil) {
		return nil
	}
	if n.tainted() {
		c.Log.Warn("opening the gate, which the agent has not opened", "after", deadline)
		n.event(true, eventGateDeadline, "no agent opened the gate within "+deadline.String()+"; pods pull their images")
	}
	n.open()
	<-ctx.Done()
	return nil
}

// tainted says whether the gate was shut when the watch last told of the node.
func (n *node) tainted() bool {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.now != nil && slices.ContainsFunc(n.now.Spec.Taints, func(t corev1.Taint) bool { return t.Key == n.taint })
}
