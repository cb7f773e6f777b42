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

// BenchmarkIdle measures what the agent costs on a node where nothing happens, over
// ten minutes. kubelet's probes of the agent are part of it.
func BenchmarkIdle(b *testing.B) {
	n := readyNode(b, cluster.NodeConfig{}, agentConfig{})
	// The gate has a user of its own.
	pid := strings.TrimSpace(n.Output(b, "sh", "-c", "for p in $(pidof selkies-image-injector); do [ ! -O /proc/$p ] || echo $p; done"))
	for b.Loop() {
		idle.Measure(b, n.Path(filepath.Join("/proc", pid)), 10*time.Minute).Report(b)
	}
}
