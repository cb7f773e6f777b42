package agent

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"sync/atomic"
	"time"
)

// health is what the probes are told.
type health struct {
	// ready is whether the gate is open and a pass has ended since. It says nothing of
	// images: a node without a disk must not hold up a rollout to all the others.
	ready atomic.Bool
	// due is when the loop is stuck. It has a monotonic reading, since the clock may jump.
	due atomic.Pointer[time.Time]
}

// leastStuck is more than any pass takes: a look at a device that hangs, and a
// registration on a disk that is slow.
const leastStuck = 10 * time.Minute

// beat says that the loop is at work.
func (h *health) beat(interval time.Duration) {
	due := time.Now().Add(max(leastStuck, 3*interval))
	h.due.Store(&due)
}

// live answers whether the loop, which has beaten, is at work.
func (h *health) live(w http.ResponseWriter, _ *http.Request) {
	overdue := time.Since(*h.due.Load())
	answer(w, overdue < 0, "ok", fmt.Sprintf("stuck: a pass should have ended %v ago", overdue.Round(time.Second)))
}

// serve serves the probes and the metrics, once the address is free: while one
// agent takes over from another on the host's network, it may not be. Without it
// the agent works all the same.
func (a *Agent) serve(ctx context.Context) {
	if a.MetricsAddress == "" || a.serving {
		return
	}
	l, err := new(net.ListenConfig).Listen(ctx, "tcp", a.MetricsAddress)
	if err != nil {
		a.Log.Warn("not serving metrics and probes; trying again", "error", err)
		return
	}
	a.serving = true
	mux := http.NewServeMux()
	mux.Handle("GET /metrics", a.metrics.handler())
	mux.HandleFunc("GET /healthz", a.health.live)
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		answer(w, a.health.ready.Load(), "ok", "the gate is shut or the first pass has not ended; see the log or the node's condition")
	})
	server := &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second, IdleTimeout: 2 * time.Minute}
	context.AfterFunc(ctx, func() { server.Close() })
	go server.Serve(l) //nolint:errcheck // it ends with the context
}

func answer(w http.ResponseWriter, good bool, yes, no string) {
	if !good {
		http.Error(w, no, http.StatusServiceUnavailable)
		return
	}
	fmt.Fprintln(w, yes)
}
