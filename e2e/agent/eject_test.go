//go:build e2e

package agent_test

import (
	"strings"
	"testing"
	"time"

	"github.com/selkies-project/packer-plugin-selkies/e2e/machine"
)

// TestEject ejects beside a running agent, so slowly that passes begin in the middle of
// it. What is ejected stays so, with --restore-removed too, until the agent starts
// again.
func TestEject(t *testing.T) {
	t.Parallel()
	for name, flags := range map[string][]string{"as it is": nil, "restoring": {"--restore-removed"}} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			n := newNode(t, machine.Upstream)
			n.attach(t)
			a := n.start(t, flags...)
			n.waitReady(t)
			normal := a.slowContainerd(t)
			start := time.Now()
			n.Output(t, program, "eject", "--runtime=containerd")
			took := time.Since(start)
			normal()
			t.Logf("eject took %v", took)
			if took < 2*time.Second {
				t.Error("no pass can have begun meanwhile: this shows nothing")
			}
			n.waitMetric(t, `images{state="removed"}`, is(chains+1))
			n.nothingRegistered(t)
			n.waitMetric(t, `disk_readable{cache_id="`+cacheID(t)+`"}`, is(-1))
			time.Sleep(4 * time.Second) // two passes
			n.nothingRegistered(t)
			if log := a.log.String(); strings.Contains(log, "reason=Healed") {
				t.Error("the agent healed what was ejected")
			}
			a.stop(t)
			n.start(t, flags...)
			n.waitReady(t)

			// An eject that is refused leaves all as it was.
			n.background(t, world.refs[0], "user")
			n.Refused(t, 1, []string{program, "eject", "--runtime=containerd"}, "remove the container first")
			n.remove(t, world.refs[1])
			if flags != nil {
				waitFor(t, "the removed image", func() bool { return n.has(t, world.refs[1]) })
			} else {
				n.waitMetric(t, `images{state="removed"}`, is(1))
			}
			n.ctr(t, "tasks", "kill", "-s", "SIGKILL", "user")
		})
	}
}

// TestRemoveAll removes all images one by one, as a prune does, for longer than the agent
// takes to answer.
func TestRemoveAll(t *testing.T) {
	t.Parallel()
	n := newNode(t, machine.Upstream)
	n.attach(t)
	a := n.start(t)
	n.waitReady(t)
	normal := a.slowContainerd(t)
	n.Output(t, "sh", "-c", "ctr -n k8s.io images rm $(ctr -n k8s.io images ls -q)")
	normal()
	n.waitMetric(t, `images{state="removed"}`, is(chains+1))
	if out := n.ctr(t, "images", "ls", "-q"); out != "" {
		t.Errorf("images that were removed are back: %s", out)
	}
}

// nothingRegistered fails the test if containerd has an image, or the disk a mount there.
func (n *node) nothingRegistered(t testing.TB) {
	t.Helper()
	if out := n.ctr(t, "images", "ls", "-q"); out != "" {
		t.Errorf("what was ejected is there: %s", out)
	}
	if got := n.mounts(t); got != 0 {
		t.Errorf("%d mounts below containerd's directory, want none", got)
	}
}
