//go:build e2e

package faults_test

import (
	"fmt"
	"math/rand/v2"
	"net/http"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/selkies-project/packer-plugin-selkies/e2e/buildvm"
	"github.com/selkies-project/packer-plugin-selkies/e2e/machine"
	"github.com/selkies-project/packer-plugin-selkies/e2e/nodestate"
	"github.com/selkies-project/packer-plugin-selkies/e2e/registry"
)

// hang stops containerd for good before runs that look for a runtime themselves. They end
// soon, and say why.
func (n *ctrdNode) hang(t *testing.T) {
	t.Helper()
	if err := n.signal(syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	var runs []*injection
	for _, command := range []string{inject, eject, "plan", "status"} {
		runs = append(runs, startInjector(t, n.Machine, "auto", command))
	}
	for _, i := range runs {
		if status := i.wait(t); status != 1 || !strings.Contains(i.last(), "asking containerd at "+machine.Socket) || !strings.Contains(i.last(), "restart it") {
			t.Errorf("%v, containerd stopped: exit status %d: %s", i.cmd.Args, status, i.stderr.String())
		}
	}
	if err := n.signal(syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	total.fault("containerd stopped for good")
	n.recover(t, inject, "containerd stopped for good")
	n.recover(t, eject, "containerd stopped for good, then inject")
}

// TestContainerdHang stops containerd for good: inject ends by itself, and says why. Each round
// waits for minutes, so that the short form has none.
func TestContainerdHang(t *testing.T) {
	t.Parallel()
	times := *faults / 50
	if times == 0 {
		return
	}
	n := newCtrdNode(t, machine.Debian)
	n.MountDisk(t, newStore(t), nodestate.ContainerdDir, "rw")
	n.start(t)
	n.learn(t)
	rounds(t, times, func(t *testing.T, r *rand.Rand) {
		i := startInjector(t, n.Machine, "containerd", inject)
		after := time.Duration(r.Int64N(int64(n.took[inject])))
		if i.runsFor(after) {
			what := fmt.Sprintf("containerd stopped for good %v into inject", after.Round(time.Millisecond))
			t.Log(what)
			if err := n.signal(syscall.SIGSTOP); err != nil {
				t.Fatal(err)
			}
			status := i.wait(t)
			if err := n.signal(syscall.SIGCONT); err != nil {
				t.Fatal(err)
			}
			switch said := i.stderr.String(); {
			case status == 0: // it was about to end
				n.compare(t, n.full, what)
			case status != 1 || !strings.Contains(said, "answer"):
				t.Errorf("%s: exit status %d: %s", what, status, said)
			default:
				total.fault("containerd stopped for good")
			}
			n.checkVisible(t)
			n.recover(t, inject, what)
		} else {
			i.wait(t)
		}
		runInjector(t, n.Machine, "containerd", eject)
	})
}

// TestDockerHang stops dockerd for good: before a run, which ends soon and says why, and, in
// the long form, in the middle of one.
func TestDockerHang(t *testing.T) {
	t.Parallel()
	n := newDockerNode(t)
	n.start(t)
	n.signal(t, syscall.SIGSTOP)
	var runs []*injection
	for _, command := range []string{inject, eject, "plan", "status"} {
		runs = append(runs, startInjector(t, n.Machine, "docker", command))
	}
	for _, i := range runs {
		if status := i.wait(t); status != 1 || !strings.Contains(i.last(), "docker") || !strings.Contains(i.last(), "does not answer") {
			t.Errorf("%v, dockerd stopped: exit status %d: %s", i.cmd.Args, status, i.stderr.String())
		}
	}
	n.signal(t, syscall.SIGCONT)
	total.fault("dockerd stopped for good")
	if *faults < 100 {
		return
	}
	n.learn(t)
	rounds(t, *faults/100, func(t *testing.T, r *rand.Rand) {
		command := pick(r, []string{inject, eject})
		took := n.took[injectRunning]
		if command == eject {
			took = n.took[eject]
			runInjector(t, n.Machine, "docker", inject)
		}
		i := startInjector(t, n.Machine, "docker", command)
		after := time.Duration(r.Int64N(int64(took)))
		if i.runsFor(after) {
			what := fmt.Sprintf("dockerd stopped for good %v into %s", after.Round(time.Millisecond), command)
			stopped := n.signal(t, syscall.SIGSTOP)
			start := time.Now()
			status := i.wait(t)
			t.Logf("%s: %v later exit status %d %s", what, time.Since(start).Round(time.Second), status, i.last())
			n.signal(t, syscall.SIGCONT)
			if stopped && status == 1 {
				total.fault("dockerd stopped for good")
				if !strings.Contains(i.last(), "docker") {
					t.Errorf("%s: %s", what, i.stderr.String())
				}
			}
			n.up(t)
			n.checkVisible(t)
			n.recover(t, inject, what, command == eject)
		} else {
			i.wait(t)
		}
		n.up(t)
		n.recover(t, eject, "dockerd stopped for good, then inject", true)
	})
}

// signal sends a signal to dockerd, and says whether there is one.
func (n *dockerNode) signal(t *testing.T, s syscall.Signal) bool {
	t.Helper()
	reached, err := n.Signal(s, "dockerd")
	if err != nil {
		t.Fatal(err)
	}
	return reached > 0
}

// hangLimit is for builds whose Docker has stopped for good.
const hangLimit = 10 * time.Minute

// TestBuildHang stops the dockerd of a build, and that of the VM before a build without a
// disk of its own. That takes minutes, so that the short form has none.
func TestBuildHang(t *testing.T) {
	t.Parallel()
	if *faults < 100 {
		return
	}
	b := newBuilds(t)
	rounds(t, *faults/100, func(t *testing.T, r *rand.Rand) {
		d := buildvm.OpenDisk(t, b.vm, b.copyOf(t, b.blank))
		u := b.start(t, d, "verify = true", "max_pull_attempts = 1")
		after := b.took/4 + time.Duration(r.Int64N(int64(b.took/2)))
		what := fmt.Sprintf("dockerd of a build stopped for good %v into it", after.Round(time.Millisecond))
		struck := false
		if u.runsFor(after) {
			_, err := b.vm.Run(t.Context(), "systemctl", "kill", "--signal=SIGSTOP", dockerdUnit)
			struck = err == nil
		}
		start := time.Now()
		u.waitFor(t, what, hangLimit)
		status := u.cmd.ProcessState.ExitCode()
		t.Logf("%s: struck %t, exit status %d %v later", what, struck, status, time.Since(start).Round(time.Second))
		if status != 0 {
			u.checkError(t, what)
		}
		b.waitClean(t, what, u)
		if struck && status != 0 {
			total.fault("dockerd of a build stopped for good")
		}
		checkCache(t, d, what)
		b.plain(t, d, b.refs)
		total.state()
	})

	if _, err := b.vm.Signal(syscall.SIGSTOP, "dockerd"); err != nil {
		t.Fatal(err)
	}
	out, err := b.vm.Build(t, buildvm.Images(b.refs...))
	if _, err := b.vm.Signal(syscall.SIGCONT, "dockerd"); err != nil {
		t.Fatal(err)
	}
	if err == nil || !strings.Contains(out, "connecting to Docker on the build VM: nothing has come from Docker") {
		t.Errorf("a build whose Docker is stopped ends with %v: %s", err, out)
	}
	total.fault("dockerd of the build VM stopped for good")
}

// TestBuildStall has Docker's download of an image stall, and Packer set no limit: the
// provisioner's own ends it. That takes five minutes, so that the short form has none.
func TestBuildStall(t *testing.T) {
	t.Parallel()
	if *faults < 50 {
		return
	}
	b := newBuilds(t)
	b.reg.Disturb(func(req *http.Request) registry.Fault {
		if strings.Contains(req.URL.Path, "/blobs/") && strings.HasPrefix(req.UserAgent(), "docker/") {
			return registry.Stall
		}
		return ""
	})
	const what = "registry: stalls for longer than the provisioner waits"
	d := buildvm.OpenDisk(t, b.vm, b.copyOf(t, b.blank))
	// Of more images than are pulled at once each lot has the time.
	one := *b
	one.refs = b.refs[:1]
	u := one.start(t, d, "max_pull_attempts = 1")
	u.waitFor(t, what, hangLimit)
	b.reg.Disturb(nil)
	b.waitClean(t, what, u)
	if out := u.out.String(); u.cmd.ProcessState.ExitCode() == 0 || !strings.Contains(out, "nothing has come from the registry for 5m0s") {
		t.Errorf("%s: the build says: %s", what, out)
	}
	u.checkError(t, what)
	total.fault(what)
	checkCache(t, d, what)
	b.plain(t, d, b.refs)
	total.state()
	if diff := cmp.Diff(b.want, normal(t, d)); diff != "" {
		t.Errorf("%s, then a plain build: %s", what, diff)
	}
}
