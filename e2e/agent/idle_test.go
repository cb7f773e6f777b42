//go:build e2e

package agent_test

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/selkies-project/packer-plugin-selkies/e2e/machine"
)

// cost is what a process has used.
type cost struct {
	cpu      time.Duration
	switches int // voluntary: how often a thread went to sleep
	awake    int // seconds in which one did
	// resident and its part that is not of the program's file, in KiB
	resident, anonymous int
}

func (a *agent) cost(t testing.TB) cost {
	t.Helper()
	var c cost
	threads, err := os.ReadDir(fmt.Sprintf("/proc/%d/task", a.pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, thread := range threads {
		dir := fmt.Sprintf("/proc/%d/task/%s/", a.pid, thread.Name())
		// Nanoseconds on the processor come first.
		sched, err := os.ReadFile(dir + "schedstat")
		if err != nil {
			t.Fatal(err)
		}
		ns, err := strconv.ParseInt(strings.Fields(string(sched))[0], 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		c.cpu += time.Duration(ns)
		c.switches += field(t, dir+"status", "voluntary_ctxt_switches:")
	}
	status := fmt.Sprintf("/proc/%d/status", a.pid)
	c.resident, c.anonymous = field(t, status, "VmRSS:"), field(t, status, "RssAnon:")
	return c
}

// field is a number in a file like /proc/PID/status.
func field(t testing.TB, file, name string) int {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(text)) {
		if rest, ok := strings.CutPrefix(line, name); ok {
			v, err := strconv.Atoi(strings.Fields(rest)[0])
			if err != nil {
				t.Fatal(err)
			}
			return v
		}
	}
	t.Fatalf("%s has no %s", file, name)
	return 0
}

// TestIdle measures what an idle agent costs, over a minute.
func TestIdle(t *testing.T) {
	n := newNode(t, machine.Upstream)
	n.attach(t)
	a := n.start(t, "--check-interval=1m")
	n.waitReady(t)
	idle(t, a, time.Minute)
}

// BenchmarkIdle measures the same over ten minutes.
func BenchmarkIdle(b *testing.B) {
	n := newNode(b, machine.Upstream)
	n.attach(b)
	a := n.start(b, "--check-interval=1m")
	n.waitReady(b)
	for b.Loop() {
		c := idle(b, a, 10*time.Minute)
		b.ReportMetric(c.cpu.Seconds(), "cpu-s")
		b.ReportMetric(float64(c.awake), "awake-s")
		b.ReportMetric(float64(c.switches), "switches")
		b.ReportMetric(float64(c.resident), "KiB")
	}
}

func idle(t testing.TB, a *agent, length time.Duration) cost {
	t.Helper()
	time.Sleep(5 * time.Second) // the CRI's own changes have been looked at
	before := a.cost(t)
	last, awake := before, 0
	for end := time.Now().Add(length); time.Now().Before(end); {
		time.Sleep(time.Second)
		now := a.cost(t)
		if now.switches != last.switches {
			awake++
		}
		last = now
	}
	used := cost{last.cpu - before.cpu, last.switches - before.switches, awake, last.resident, last.anonymous}
	t.Logf("idle for %v: %v of CPU, awake in %d seconds, %d voluntary context switches, %d KiB resident, of which %d anonymous",
		length, used.cpu, used.awake, used.switches, used.resident, used.anonymous)
	return used
}
