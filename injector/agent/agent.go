// Package agent is what runs on a node for good: it registers the images of the
// node's cache disks, opens the gate that keeps pods waiting for them, and then
// watches, heals and reports. No container needs it: its end harms nothing.
//
// It works in passes. A pass looks at everything and repairs what is missing, so
// that it does not matter what has happened, or in which order. There is one
// whenever containerd tells of a change that needs an answer, and one per
// CheckInterval; an idle node is woken by nothing else.
//
// An image that someone removes while the agent runs stays removed, unless
// RestoreRemoved is set, until the agent starts again: what is on the disk is
// registered then. What the command eject removes stays away too, RestoreRemoved or
// not: it leaves a note (see ejected.go). An image that a pull leads to another digest is the node's from then on, pinned or not.
//
// In a cluster (see node.go) it needs, of the API server:
//
//	""  nodes         list, watch   its own, by field selector metadata.name
//	""  nodes         patch         labels and the startup taint
//	""  nodes/status  patch         the condition
//	""  pods          list          its own node's, by field selector spec.nodeName, at start;
//	                                without it the order of registration is another
//	""  events        create, patch in the namespace default
package agent

import (
	"context"
	"errors"
	"runtime"
	"runtime/debug"
	"sync"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/selkies-project/packer-plugin-selkies/injector/cachedisk"
	"github.com/selkies-project/packer-plugin-selkies/injector/report"
)

const (
	// firstRetry is the wait after the first pass that could not do its work. It
	// doubles up to lastRetry, or to CheckInterval when the gate is open.
	firstRetry = time.Second
	lastRetry  = 4 * time.Second
	// settle is how long changes to images are collected before they are answered:
	// a pull makes several.
	settle = time.Second
	// endTime is how long an interrupted piece of work may take to leave no lease.
	endTime = 5 * time.Second
)

// Agent is the state of one run. Everything without a lock of its own belongs to
// the goroutine of the passes.
type Agent struct {
	Config
	started time.Time
	metrics *metrics
	node    *node // nil without a cluster
	gate    *gate
	health  health
	changes *changes
	proofs  *proofs
	reading sync.Mutex // held while a disk is read ahead
	wanted  func(context.Context) []string

	// runtime is open while it is watched.
	runtime Runtime
	// pending says why images have to be registered; empty if nothing is known to be
	// missing.
	pending reason
	// disks are those that can be read, found by the last pass.
	disks []*cachedisk.Disk
	// registered is what the last registration found, and its error.
	registered    *report.Inject
	registerError error
	generations   map[digest.Digest]*generation
	// readBegun are the disks that are, or were, read ahead.
	readBegun map[digest.Digest]bool
	// there are the image names that the last registration left on the node, removed those
	// that others removed, ejected those that the agent removed in its last pass.
	there, removed, ejected map[string]bool
	// told are the removed names that were reported, published the reason that was.
	told      map[string]bool
	published string
	// took is how long the last registration that had something to do took.
	took    time.Duration
	last    outcome
	retry   time.Duration
	serving bool // probes and metrics
}

// Run does the agent's work until the context ends.
func Run(ctx context.Context, c Config) error {
	a, err := newAgent(c)
	if err != nil {
		return err
	}
	if a.node != nil {
		go a.node.askWanted(ctx)
		go a.node.run(ctx)
	}
	if err := forgetEjected(c.HostRoot); err != nil {
		return err
	}
	go a.openAtDeadline(ctx)
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		a.loop(ctx)
	}()
	<-ctx.Done()
	// What hangs, such as a dead disk, must not keep the process.
	select {
	case <-ended:
	case <-time.After(endTime):
		a.Log.Warn("ending in the middle of a piece of work; the next run completes it")
	}
	return nil
}

func newAgent(c Config) (*Agent, error) {
	if err := c.Validate(); err != nil {
		return nil, err
	}
	a := &Agent{
		Config:      c,
		started:     time.Now(),
		metrics:     newMetrics(),
		gate:        newGate(c.GateDeadline),
		changes:     newChanges(),
		proofs:      newProofs(cachedisk.HostPath(c.HostRoot, notesDir)),
		pending:     reasonStart,
		generations: map[digest.Digest]*generation{},
		there:       map[string]bool{},
		removed:     map[string]bool{},
		ejected:     map[string]bool{},
		readBegun:   map[digest.Digest]bool{},
	}
	a.wanted = func(context.Context) []string { return nil }
	if c.Kubernetes {
		var err error
		if a.node, err = newNode(c); err != nil {
			return nil, err
		}
		a.wanted = a.node.wantedImages
	}
	return a, nil
}

func (a *Agent) loop(ctx context.Context) {
	a.health.beat(a.CheckInterval)
	for ctx.Err() == nil {
		a.serve(ctx)
		a.pass(ctx)
		if ctx.Err() == nil {
			a.publish()
			a.verify(ctx)
		}
		a.wait(ctx)
	}
	if a.runtime != nil {
		a.runtime.Close()
	}
}

// pass looks at everything once and repairs what is missing.
func (a *Agent) pass(ctx context.Context) {
	a.health.beat(a.CheckInterval)
	a.takeChanges()
	err := a.checkRuntime(ctx)
	if err == nil && a.pending != "" {
		err = a.openRuntime(ctx)
	}
	diskErr := a.findDisks()
	a.readAhead(ctx)
	if err == nil {
		err = a.eject(ctx)
		if a.pending != "" {
			err = errors.Join(err, a.register(ctx))
		}
	}
	// It waits for a minute now, and a pass takes several times what it keeps.
	// Twice: what is pooled, such as JSON's buffers, outlives one collection.
	runtime.GC()
	debug.FreeOSMemory()
	a.last = a.conclude(diskErr, err)
	a.releaseRuntime()
}

// wait returns when there is something to do. It is the only place where an idle
// agent waits for a time.
func (a *Agent) wait(ctx context.Context) {
	timer := time.NewTimer(a.interval())
	defer timer.Stop()
	select {
	case <-ctx.Done():
	case <-timer.C:
	case <-a.gate.opened():
		a.gate.see()
	case <-a.changes.signal:
		select {
		case <-ctx.Done():
		case <-time.After(settle):
		}
	}
}

// interval is the time to the next pass.
func (a *Agent) interval() time.Duration {
	if a.last.settled {
		a.retry = 0
		return a.CheckInterval
	}
	longest := lastRetry
	if a.gate.isOpen() {
		longest = a.CheckInterval
	}
	a.retry = min(max(firstRetry, 2*a.retry), longest)
	return a.retry
}
