//go:build e2e

package agent_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/selkies-project/packer-plugin-selkies/e2e/cluster"
	"github.com/selkies-project/packer-plugin-selkies/e2e/host"
	"github.com/selkies-project/packer-plugin-selkies/e2e/machine"
)

const (
	cacheDir = "/mnt/disks/cache"
	stateDir = "/var/lib/containerd"
	program  = "/usr/local/bin/selkies-image-injector"
)

// node is a machine with a running containerd.
type node struct {
	*machine.Machine
	port    int // of the agent's metrics
	runtime string
}

func newNode(t testing.TB, release machine.Release) *node {
	t.Helper()
	port, err := machine.FreePort()
	if err != nil {
		t.Fatal(err)
	}
	n := &node{Machine: machine.New(t, machine.Config{Name: "node"}), port: port, runtime: "containerd"}
	if err := n.Install(world.injector, program); err != nil {
		t.Fatal(err)
	}
	if err := n.StartContainerd(t.Context(), machine.Containerd{Release: release, Sandbox: world.pause}); err != nil {
		t.Fatal(err)
	}
	return n
}

func onEach(t *testing.T, f func(t *testing.T, n *node)) {
	for _, r := range []machine.Release{machine.Debian, machine.Upstream} {
		t.Run(string(r), func(t *testing.T) {
			t.Parallel()
			f(t, newNode(t, r))
		})
	}
}

// attach mounts the cache disk.
func (n *node) attach(t testing.TB) (detach func()) {
	t.Helper()
	return n.MountDisk(t, world.disk, cacheDir, "ro,noload")
}

// agent is a running agent.
type agent struct {
	n   *node
	cmd *exec.Cmd
	log host.Said
	pid int // on the host
}

// args are those of an agent with times for tests, without a cluster unless more
// says otherwise.
func (n *node) args(more ...string) []string {
	return append([]string{"run", "--kubernetes=false", "--runtime=" + n.runtime, "--cache", cacheDir,
		"--metrics-address", n.addr(), "--check-interval=2s"}, more...)
}

func (n *node) addr() string { return "127.0.0.1:" + strconv.Itoa(n.port) }

// start starts an agent, which the test's end kills.
func (n *node) start(t testing.TB, more ...string) *agent {
	t.Helper()
	return n.launch(t, n.args(more...)...)
}

// launch starts any command of the injector that stays.
func (n *node) launch(t testing.TB, args ...string) *agent {
	t.Helper()
	a := &agent{n: n}
	a.cmd = n.Command(context.Background(), program, args...)
	a.cmd.Stdout, a.cmd.Stderr = &a.log, &a.log
	if err := a.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if a.cmd.ProcessState == nil {
			a.kill(t)
		}
		if t.Failed() {
			t.Logf("the agent's log:\n%s", a.log.String())
		}
	})
	wait(t, "the agent's process", func() error {
		// nsenter forks to enter the PID namespace.
		out, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%[1]d/children", a.cmd.Process.Pid))
		if err == nil {
			a.pid, err = strconv.Atoi(strings.TrimSpace(string(out)))
		}
		return err
	})
	return a
}

// stopTime is five seconds for work that is in the way, and a margin. After ten kubelet
// kills.
const stopTime = 8 * time.Second

// stop ends the agent in order, and soon.
func (a *agent) stop(t testing.TB) {
	t.Helper()
	start := time.Now()
	if err := syscall.Kill(a.pid, syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := a.cmd.Wait(); err != nil {
		t.Errorf("after SIGTERM the agent ended with %v", err)
	}
	took := time.Since(start).Round(time.Millisecond)
	t.Logf("ended %v after SIGTERM", took)
	if took > stopTime {
		t.Errorf("the agent took %v to end", took)
	}
}

// kill ends the agent as it stands.
func (a *agent) kill(t testing.TB) {
	t.Helper()
	if err := syscall.Kill(-a.cmd.Process.Pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if err := a.cmd.Wait(); err != nil && !errors.As(err, new(*exec.ExitError)) {
		t.Fatal(err)
	}
}

// waitKilled waits until something has killed the agent.
func (a *agent) waitKilled(t testing.TB) {
	t.Helper()
	wait(t, "the agent to be killed", func() error {
		if err := syscall.Kill(a.pid, 0); !errors.Is(err, syscall.ESRCH) {
			return fmt.Errorf("it lives: %w", err)
		}
		return nil
	})
	if err := a.cmd.Wait(); err != nil && !errors.As(err, new(*exec.ExitError)) {
		t.Fatal(err)
	}
}

// get asks the agent's HTTP server.
func (n *node) get(t testing.TB, path string) (status int, body string, err error) {
	t.Helper()
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://"+n.addr()+path, nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return 0, "", err
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	return resp.StatusCode, string(text), err
}

// waitReady waits until all images are registered.
func (n *node) waitReady(t testing.TB) {
	t.Helper()
	n.waitMetric(t, "ready", is(1))
}

// waitReadyz waits for what the readiness probe is told.
func (n *node) waitReadyz(t testing.TB, want int) {
	t.Helper()
	wait(t, fmt.Sprintf("/readyz to answer %d", want), func() error {
		status, body, err := n.get(t, "/readyz")
		if err == nil && status != want {
			err = fmt.Errorf("it answers %d %s", status, body)
		}
		return err
	})
}

// metric is the value of the metric, named with its labels; -1 without it or
// without an agent that answers.
func (n *node) metric(t testing.TB, name string) float64 {
	t.Helper()
	_, body, err := n.get(t, "/metrics")
	if err != nil {
		return -1
	}
	for line := range strings.Lines(body) {
		if rest, ok := strings.CutPrefix(line, "selkies_image_cache_"+name+" "); ok {
			v, err := strconv.ParseFloat(strings.TrimSpace(rest), 64)
			if err != nil {
				t.Fatal(err)
			}
			return v
		}
	}
	return -1
}

func (n *node) waitMetric(t testing.TB, name string, good func(float64) bool) {
	t.Helper()
	wait(t, "the metric "+name, func() error {
		if v := n.metric(t, name); !good(v) {
			return fmt.Errorf("it is %v", v)
		}
		return nil
	})
}

func is(want float64) func(float64) bool      { return func(v float64) bool { return v == want } }
func atLeast(want float64) func(float64) bool { return func(v float64) bool { return v >= want } }

// ctr runs containerd's own client.
func (n *node) ctr(t testing.TB, args ...string) string {
	t.Helper()
	return n.Output(t, append([]string{"ctr", "-n", "k8s.io"}, args...)...)
}

// cri is a connection to containerd's CRI plugin, which answers.
func (n *node) cri(t testing.TB) cri.ImageServiceClient {
	t.Helper()
	conn, err := grpc.NewClient("unix://"+n.Path(machine.Socket), grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close() })
	c := cri.NewImageServiceClient(conn)
	wait(t, "the CRI", func() error {
		_, err := c.ImageFsInfo(t.Context(), &cri.ImageFsInfoRequest{})
		return err
	})
	return c
}

func spec(ref string) *cri.ImageSpec { return &cri.ImageSpec{Image: ref} }

func (n *node) pull(t testing.TB, ref string) {
	t.Helper()
	if _, err := n.cri(t).PullImage(t.Context(), &cri.PullImageRequest{Image: spec(ref)}); err != nil {
		t.Fatal(err)
	}
}

func (n *node) remove(t testing.TB, ref string) {
	t.Helper()
	if _, err := n.cri(t).RemoveImage(t.Context(), &cri.RemoveImageRequest{Image: spec(ref)}); err != nil {
		t.Fatal(err)
	}
}

// has says whether containerd has an image of that name.
func (n *node) has(t testing.TB, ref string) bool {
	t.Helper()
	return n.ctr(t, "images", "ls", "-q", "name=="+ref) != ""
}

// pinned says whether the image has the agent's pin.
func (n *node) pinned(t testing.TB, ref string) bool {
	t.Helper()
	return strings.Contains(n.ctr(t, "images", "ls", "name=="+ref), "io.cri-containerd.pinned=pinned")
}

// runs starts a container of the image that ends by itself.
func (n *node) runs(t testing.TB, ref string) {
	t.Helper()
	// By its exit status: ctr 1.6 loses the output of what ends at once.
	n.ctr(t, "run", "--rm", "--net-host", ref, "test-"+strconv.FormatInt(time.Now().UnixNano(), 36), "/bin/busybox", "test", "-x", "/bin/busybox")
}

// background starts a container of the image that stays.
func (n *node) background(t testing.TB, ref, id string) {
	t.Helper()
	n.ctr(t, "run", "-d", "--net-host", ref, id, "/bin/busybox", "sleep", "86400")
}

// wait asks f until it gives no error.
func wait(t testing.TB, what string, f func() error) {
	t.Helper()
	cluster.Wait(t, what, func(context.Context) error { return f() })
}

func waitFor(t testing.TB, what string, f func() bool) {
	t.Helper()
	wait(t, what, func() error {
		if !f() {
			return errors.New("not yet")
		}
		return nil
	})
}
