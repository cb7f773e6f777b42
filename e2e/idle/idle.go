// Package idle measures what a process costs that has nothing to do.
package idle

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"
)

// Cost is what a process has used in a time, and its memory at the end of it.
type Cost struct {
	CPU      time.Duration
	Switches int // voluntary: how often a thread went to sleep
	Awake    int // seconds in which one did
	// Resident and its part that is not of the program's file, in KiB.
	Resident, Anonymous int
}

func (c Cost) String() string {
	return fmt.Sprintf("%v of CPU, awake in %d seconds, %d voluntary context switches, %d KiB resident, of which %d anonymous",
		c.CPU, c.Awake, c.Switches, c.Resident, c.Anonymous)
}

// Report makes the cost the result of a benchmark.
func (c Cost) Report(b *testing.B) {
	b.Helper()
	b.ReportMetric(c.CPU.Seconds(), "cpu-s")
	b.ReportMetric(float64(c.Awake), "awake-s")
	b.ReportMetric(float64(c.Switches), "switches")
	b.ReportMetric(float64(c.Resident), "KiB")
}

// settle is for what a process that has just said that it is ready still does.
const settle = 5 * time.Second

// mostAwake and mostCPU are what a process may use in a minute and be called idle. Both
// count what it does itself, however busy the machine is.
const (
	mostAwake = 10 // seconds
	mostCPU   = 150 * time.Millisecond
)

// Measure watches processes, each named by its directory in a /proc, for a time, and fails
// the test if one is not idle.
func Measure(t testing.TB, length time.Duration, procs ...string) []Cost {
	t.Helper()
	time.Sleep(settle)
	before, last, awake := make([]Cost, len(procs)), make([]Cost, len(procs)), make([]int, len(procs))
	for i, proc := range procs {
		before[i] = used(t, proc)
		last[i] = before[i]
	}
	for end := time.Now().Add(length); time.Now().Before(end); {
		time.Sleep(time.Second)
		for i, proc := range procs {
			now := used(t, proc)
			if now.Switches != last[i].Switches {
				awake[i]++
			}
			last[i] = now
		}
	}
	costs := make([]Cost, len(procs))
	for i, end := range last {
		c := Cost{end.CPU - before[i].CPU, end.Switches - before[i].Switches, awake[i], end.Resident, end.Anonymous}
		t.Logf("idle for %v: %v", length, c)
		if minutes := length.Minutes(); float64(c.Awake) > mostAwake*minutes || c.CPU.Minutes() > mostCPU.Minutes()*minutes {
			t.Errorf("that is not idle: more than %d seconds awake or %v of CPU a minute", mostAwake, mostCPU)
		}
		costs[i] = c
	}
	return costs
}

// used is what the process has used since its start.
func used(t testing.TB, proc string) Cost {
	t.Helper()
	var c Cost
	threads, err := filepath.Glob(filepath.Join(proc, "task", "*"))
	if err != nil || len(threads) == 0 {
		t.Fatalf("%s has no threads: %v", proc, err)
	}
	for _, thread := range threads {
		// Nanoseconds on the processor come first.
		sched, err := os.ReadFile(filepath.Join(thread, "schedstat"))
		if err != nil {
			t.Fatal(err)
		}
		ns, err := strconv.ParseInt(strings.Fields(string(sched))[0], 10, 64)
		if err != nil {
			t.Fatal(err)
		}
		c.CPU += time.Duration(ns)
		c.Switches += field(t, filepath.Join(thread, "status"), "voluntary_ctxt_switches:")
	}
	status := filepath.Join(proc, "status")
	c.Resident, c.Anonymous = field(t, status, "VmRSS:"), field(t, status, "RssAnon:")
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
