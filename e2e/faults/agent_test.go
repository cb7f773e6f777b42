//go:build e2e

package faults_test

import (
	"fmt"
	"io"
	"net/http"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/selkies-project/packer-plugin-selkies/e2e/machine"
)

// The agent looks at everything every two seconds here. What it says of it, it says within
// the time that it waits for an answer (docs/agent.md) and a little more, on a busy machine:
// of containerd ten seconds, of a device forty, of Docker sixty.
const (
	interval   = 2 * time.Second
	sayLimit   = 2 * time.Minute
	probeLimit = 5 * time.Second // of a request to its HTTP server
)

// agent is an injector that runs for good.
type agent struct {
	*injection
	address string
}

// startAgent starts the agent on a node and waits until all is registered.
func startAgent(t *testing.T, m *machine.Machine, runtime string) *agent {
	t.Helper()
	port, err := machine.FreePort()
	if err != nil {
		t.Fatal(err)
	}
	a := &agent{address: fmt.Sprintf("127.0.0.1:%d", port)}
	a.injection = startInjector(t, m, runtime, "run", "--kubernetes=false", "--cache", cacheDir,
		"--metrics-address", a.address, "--check-interval", interval.String(), "--gone-after", "3s")
	t.Cleanup(func() {
		_ = a.kill() // or it has ended
		if t.Failed() {
			t.Logf("the agent says:\n%s", a.stderr.String())
		}
	})
	deadline := time.Now().Add(sayLimit)
	for _, err := a.get(t, "/healthz"); err != nil; _, err = a.get(t, "/healthz") {
		if time.Now().After(deadline) {
			t.Fatal(err)
		}
		time.Sleep(200 * time.Millisecond)
	}
	a.until(t, "ready 1")
	return a
}

// get asks its HTTP server, which answers at once whatever else hangs.
func (a *agent) get(t *testing.T, path string) (string, error) {
	t.Helper()
	c := http.Client{Timeout: probeLimit}
	resp, err := c.Get("http://" + a.address + path)
	if err != nil {
		return "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err == nil && resp.StatusCode != http.StatusOK {
		err = fmt.Errorf("%s answers %s: %s", path, resp.Status, body)
	}
	return string(body), err
}

// until waits until its metrics have all lines, and gives the time that it took. It has to
// be alive and well meanwhile.
func (a *agent) until(t *testing.T, lines ...string) time.Duration {
	t.Helper()
	for start := time.Now(); ; time.Sleep(200 * time.Millisecond) {
		metrics, err := a.get(t, "/metrics")
		if err == nil {
			_, err = a.get(t, "/healthz")
		}
		if err != nil {
			t.Fatal(err)
		}
		missing := ""
		for _, line := range lines {
			if !strings.Contains(metrics, "selkies_image_cache_"+line+"\n") {
				missing = line
			}
		}
		took := time.Since(start)
		if missing == "" {
			return took
		}
		if took > sayLimit {
			t.Fatalf("%v later the metrics do not have %s: %s", took, missing, metrics)
		}
	}
}

// said wants words in its log, in the place of its condition without a cluster.
func (a *agent) said(t *testing.T, words ...string) {
	t.Helper()
	for _, w := range words {
		if !strings.Contains(a.stderr.String(), w) {
			t.Errorf("the agent does not say %q", w)
		}
	}
}

// stop ends it in order.
func (a *agent) stop(t *testing.T) {
	t.Helper()
	if err := a.terminate(); err != nil {
		t.Fatal(err)
	}
	if status := a.wait(t); status != 0 {
		t.Errorf("after SIGTERM the exit status of the agent is %d", status)
	}
}

// gone are the metrics of a disk that cannot be read.
func gone(t *testing.T) []string {
	t.Helper()
	id, err := world.cache.ID()
	if err != nil {
		t.Fatal(err)
	}
	return []string{"ready 0", fmt.Sprintf("disk_readable{cache_id=%q} 0", id)}
}

// underAgent stops containerd under the agent, then has the disk's device hang and go for
// good, and gives it another one.
func (n *ctrdNode) underAgent(t *testing.T) {
	t.Helper()
	n.mortalCache(t)
	a := startAgent(t, n.Machine, "containerd")
	n.compare(t, n.full, "run")

	if err := n.signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	t.Logf("that containerd is stopped it says after %v", a.until(t, "ready 0"))
	a.said(t, "reason=RuntimeUnavailable")
	if err := n.signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	total.fault("containerd stopped for good under run")
	a.until(t, "ready 1")
	n.compare(t, n.full, "containerd stopped under run and continued")

	if err := n.device.Hang(); err != nil {
		t.Fatal(err)
	}
	t.Logf("that the device hangs it says after %v", a.until(t, gone(t)...))
	a.said(t, "the device does not answer")
	if err := n.device.Kill(); err != nil {
		t.Fatal(err)
	}
	total.fault("cache disk's device gone for good under run, containerd")
	a.until(t, "ejected_total 1")
	a.said(t, "reason=Ejected")
	n.compare(t, n.empty, "the device gone under run")
	n.replaceCache(t)
	a.until(t, "ready 1")
	n.compare(t, n.full, "the device gone under run, and another one")
	n.checkVisible(t)
	a.stop(t)
	n.recover(t, eject, "run")
}

// underAgent has the disk's device go for good under the agent, stops dockerd, and gives it
// another disk: that is when the agent has something to ask of Docker.
func (n *dockerNode) underAgent(t *testing.T) {
	t.Helper()
	n.mortalCache(t)
	a := startAgent(t, n.Machine, "docker")
	same(t, "after run", n.full, n.store(t))

	if err := n.device.Kill(); err != nil {
		t.Fatal(err)
	}
	total.fault("cache disk's device gone for good under run, docker")
	t.Logf("that the device is gone it says after %v", a.until(t, gone(t)...))
	a.until(t, "ejected_total 1")
	a.said(t, "reason=Ejected")
	same(t, "the device gone under run", n.empty, n.store(t))

	n.signal(t, syscall.SIGSTOP)
	n.replaceCache(t)
	start := time.Now()
	for !strings.Contains(a.stderr.String(), "reason=RuntimeUnavailable") {
		a.until(t, "ready 0")
		if time.Since(start) > sayLimit {
			t.Fatal("the agent does not say that docker is stopped")
		}
		time.Sleep(200 * time.Millisecond)
	}
	t.Logf("that docker is stopped it says after %v", time.Since(start))
	n.signal(t, syscall.SIGCONT)
	total.fault("dockerd stopped for good under run")
	a.until(t, "ready 1")
	same(t, "dockerd stopped under run and continued", n.full, n.store(t))
	n.checkVisible(t)
	a.stop(t)
	n.recover(t, eject, "run", false)
}

// TestAgent is underAgent on each runtime. It waits for minutes, so that the short form has
// none.
func TestAgent(t *testing.T) {
	t.Parallel()
	if *faults < 50 {
		return
	}
	t.Run("containerd", func(t *testing.T) {
		t.Parallel()
		n := newCtrdNode(t, machine.Upstream)
		n.start(t)
		n.learn(t)
		n.underAgent(t)
	})
	t.Run("docker", func(t *testing.T) {
		t.Parallel()
		n := newDockerNode(t)
		n.start(t)
		n.learn(t)
		n.underAgent(t)
	})
}
