//go:build e2e

package faults_test

import (
	"strings"
	"testing"
	"time"

	"github.com/selkies-project/packer-plugin-selkies/e2e/machine"
)

// loseDevice lets the device go for good under what is registered and a container of it,
// which start and end run: inject, eject and status end and say so, and when the container
// is gone, what is registered can be ejected without the disk.
func loseDevice(t *testing.T, n *cacheNode, runtime string, start, end func()) {
	t.Helper()
	n.mortalCache(t)
	runInjector(t, n.Machine, runtime, inject)
	start()
	if err := n.device.Kill(); err != nil {
		t.Fatal(err)
	}
	total.fault("cache disk's device gone for good, " + runtime)
	begun := time.Now()
	n.Refused(t, 1, []string{program, "--runtime", runtime, inject}, cacheDir, "not readable", "attach the disk again")
	n.Refused(t, 1, []string{program, "--runtime", runtime, eject}, "container", "uses layer", "remove")
	if out, err := n.Run(t.Context(), program, "--runtime", runtime, "status"); err == nil || !strings.Contains(err.Error(), "disk not readable") {
		t.Errorf("status says %s %v", out, err)
	}
	if took := time.Since(begun); took > runLimit {
		t.Errorf("without the disk inject, eject and status take %v", took)
	}
	end()
	runInjector(t, n.Machine, runtime, eject)
	n.replaceCache(t)
}

func (n *ctrdNode) loseDevice(t *testing.T) {
	t.Helper()
	loseDevice(t, n.cacheNode, "containerd", func() {
		n.Output(t, "ctr", "-n", "k8s.io", "run", "-d", "--net-host", world.refs[0], "user", "/bin/busybox", "sleep", "86400")
	}, func() {
		// It may have died by itself, of a page of its program that could not be read.
		_, _ = n.Run(t.Context(), "ctr", "-n", "k8s.io", "tasks", "kill", "-s", "SIGKILL", "user")
		n.Output(t, "timeout", "60", "sh", "-c", "until ctr -n k8s.io tasks ls | grep -q STOPPED; do sleep 0.1; done")
		n.Output(t, "ctr", "-n", "k8s.io", "tasks", "rm", "user")
		n.Output(t, "ctr", "-n", "k8s.io", "containers", "rm", "user")
	})
	n.compare(t, n.empty, "the disk's device gone under a container, then eject")
	n.recover(t, inject, "the disk's device gone and back")
	n.checkVisible(t)
	n.recover(t, eject, "the disk's device gone and back, then inject")
}

func (n *dockerNode) loseDevice(t *testing.T) {
	t.Helper()
	loseDevice(t, n.cacheNode, "docker", func() {
		n.Output(t, "docker", "run", "-d", "--name", "user", "--network", "none", world.refs[0], "/bin/busybox", "sleep", "86400")
	}, func() { n.Output(t, "docker", "rm", "-f", "user") })
	n.recover(t, eject, "the disk's device gone under a container", false)
	n.recover(t, inject, "the disk's device gone and back", false)
	n.checkVisible(t)
	n.recover(t, eject, "the disk's device gone and back, then inject", false)
}

// TestDeviceGone is loseDevice on each runtime.
func TestDeviceGone(t *testing.T) {
	t.Parallel()
	t.Run("containerd", func(t *testing.T) {
		n := newCtrdNode(t, machine.Upstream)
		n.start(t)
		n.learn(t)
		n.loseDevice(t)
		n.hang(t)
	})
	t.Run("docker", func(t *testing.T) {
		n := newDockerNode(t)
		n.start(t)
		n.learn(t)
		n.loseDevice(t)
	})
}
