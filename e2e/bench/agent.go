package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/selkies-project/packer-plugin-selkies/e2e/machine"
)

// agent is the node agent's memory, after it has registered many layers, and the size
// of its program.
type agent struct {
	s      *session
	images int
	disk   *attached

	resident, peak, binary series
}

func newAgent(s *session, images int) benchmark { return &agent{s: s, images: images} }

func (a *agent) prepare(context.Context) error {
	n, err := a.s.containerd()
	if err != nil {
		return err
	}
	d, err := a.s.chainsDisk(a.images)
	if err != nil {
		return err
	}
	a.disk, err = a.s.attach(n, d)
	return err
}

func (a *agent) round(ctx context.Context) (err error) {
	n := a.disk.node
	if err := n.fresh(ctx); err != nil {
		return err
	}
	port, err := machine.FreePort()
	if err != nil {
		return err
	}
	address := fmt.Sprintf("127.0.0.1:%d", port)
	cmd := n.Command(ctx, "selkies-image-injector", "run", "--kubernetes=false", "--runtime=containerd",
		"--cache="+a.disk.dir, "--metrics-address="+address)
	if err := cmd.Start(); err != nil {
		return err
	}
	defer func() {
		// nsenter, and with it the agent.
		err = errors.Join(err, unix.Kill(-cmd.Process.Pid, unix.SIGTERM))
		_ = cmd.Wait()
	}()
	if err := ready(ctx, address); err != nil {
		return err
	}
	agent, err := onlyChild(cmd.Process.Pid)
	if err != nil {
		return err
	}
	for field, s := range map[string]*series{"VmRSS:": &a.resident, "VmHWM:": &a.peak} {
		kib, err := status(agent, field)
		if err != nil {
			return err
		}
		s.add(float64(kib << 10))
	}
	fi, err := os.Stat(a.s.injector)
	if err != nil {
		return err
	}
	a.binary.add(float64(fi.Size()))
	_, err = a.disk.injectAgain(ctx)
	return err
}

// ready waits until the agent has registered everything.
func ready(ctx context.Context, address string) error {
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+address+"/readyz", nil)
		if err != nil {
			return err
		}
		if resp, err := http.DefaultClient.Do(req); err == nil {
			resp.Body.Close()
			if resp.StatusCode == http.StatusOK {
				return nil
			}
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// onlyChild is the process that pid, which is nsenter, has started.
func onlyChild(pid int) (int, error) {
	data, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", pid, pid))
	if err != nil {
		return 0, err
	}
	return strconv.Atoi(strings.TrimSpace(string(data)))
}

// status is a number of /proc/PID/status.
func status(pid int, field string) (int, error) {
	data, err := os.ReadFile(filepath.Join("/proc", strconv.Itoa(pid), "status"))
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(data)) {
		if rest, ok := strings.CutPrefix(line, field); ok {
			return strconv.Atoi(strings.Fields(rest)[0])
		}
	}
	return 0, fmt.Errorf("process %d has no %s", pid, field)
}

func (a *agent) figures() []figure {
	of := fmt.Sprintf("%d layers", len(a.disk.manifest.Layers))
	return []figure{
		{name: "resident memory with " + of, unit: bytes, bound: 40e6, runs: a.resident},
		{name: "the most while it registered them", unit: bytes, bound: 40e6, runs: a.peak},
		{name: "the stripped program", unit: bytes, bound: 40e6, runs: a.binary},
	}
}
