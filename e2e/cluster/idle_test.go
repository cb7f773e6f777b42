//go:build e2e

package cluster_test

import (
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/selkies-project/packer-plugin-selkies/e2e/cluster"
	"github.com/selkies-project/packer-plugin-selkies/e2e/idle"
)

// BenchmarkIdle measures what the agent and the gate cost on a node where nothing happens,
// over ten minutes. kubelet's probes of the agent are part of it.
func BenchmarkIdle(b *testing.B) {
	n := readyNode(b, cluster.NodeConfig{}, cluster.Agent{})
	// The gate has a user of its own.
	pids := strings.Fields(n.Output(b, "sh", "-c", `for p in $(pidof selkies-image-injector); do [ ! -O /proc/$p ] || echo $p; done
		for p in $(pidof selkies-image-injector); do [ -O /proc/$p ] || echo $p; done`))
	if len(pids) != 2 {
		b.Fatalf("the agent and the gate are the processes %v", pids)
	}
	proc := func(pid string) string { return n.Path(filepath.Join("/proc", pid)) }
	for b.Loop() {
		idle.Measure(b, 10*time.Minute, proc(pids[0]), proc(pids[1]))[0].Report(b)
	}
}
