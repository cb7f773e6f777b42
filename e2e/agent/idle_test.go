//go:build e2e

package agent_test

import (
	"fmt"
	"testing"
	"time"

	"github.com/selkies-project/packer-plugin-selkies/e2e/idle"
	"github.com/selkies-project/packer-plugin-selkies/e2e/machine"
)

// TestIdle measures what an idle agent costs, over a minute. TestKubernetes does so with an
// API server.
func TestIdle(t *testing.T) {
	t.Parallel()
	idleCost(t, time.Minute)
}

// BenchmarkIdle measures the same over ten minutes.
func BenchmarkIdle(b *testing.B) {
	for b.Loop() {
		idleCost(b, 10*time.Minute).Report(b)
	}
}

func idleCost(t testing.TB, length time.Duration) idle.Cost {
	t.Helper()
	n := newNode(t, machine.Upstream)
	n.attach(t)
	a := n.start(t, "--check-interval=1m")
	n.waitReady(t)
	return a.idle(t, length)
}

// proc is the agent's directory in /proc.
func (a *agent) proc() string { return fmt.Sprintf("/proc/%d", a.pid) }

func (a *agent) idle(t testing.TB, length time.Duration) idle.Cost {
	t.Helper()
	return idle.Measure(t, length, a.proc())[0]
}
