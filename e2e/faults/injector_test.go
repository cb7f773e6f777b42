//go:build e2e

package faults_test

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/selkies-project/packer-plugin-selkies/e2e/host"
	"github.com/selkies-project/packer-plugin-selkies/e2e/machine"
)

const (
	cacheDir = "/cache" // where the injector looks by itself
	program  = "/usr/local/bin/selkies-image-injector"
)

// runLimit is far more than any run of the injector takes, also if what it asks hangs:
// it is bounded by deadlines of its own.
const runLimit = 10 * time.Minute

// injection is a run of the injector on a node.
type injection struct {
	cmd    *exec.Cmd
	stdout host.Said
	stderr host.Said
	ended  chan struct{}
	killed bool
}

// startInjector starts the injector with a runtime and a command.
func startInjector(t *testing.T, m *machine.Machine, runtime string, args ...string) *injection {
	t.Helper()
	i, err := newInjection(m, runtime, args...)
	if err != nil {
		t.Fatal(err)
	}
	return i
}

func newInjection(m *machine.Machine, runtime string, args ...string) (*injection, error) {
	i := &injection{ended: make(chan struct{})}
	i.cmd = m.Command(context.Background(), program, append([]string{"--runtime", runtime}, args...)...)
	// The race detector sleeps a second at the end, in which nothing is left to strike.
	i.cmd.Env = append(i.cmd.Env, "GORACE=atexit_sleep_ms=0")
	i.cmd.Stdout, i.cmd.Stderr = &i.stdout, &i.stderr
	if err := i.cmd.Start(); err != nil {
		return nil, err
	}
	go func() {
		_ = i.cmd.Wait() // its status is asked later
		close(i.ended)
	}()
	return i, nil
}

// kill kills it, and says errNotRunning where it has ended by itself.
func (i *injection) kill() error {
	if err := syscall.Kill(-i.cmd.Process.Pid, syscall.SIGKILL); err != nil && err != syscall.ESRCH {
		return err
	}
	<-i.ended
	if i.killed = i.cmd.ProcessState.Sys().(syscall.WaitStatus).Signal() == syscall.SIGKILL; !i.killed {
		return errNotRunning
	}
	return nil
}

// terminate asks it to end, as kubelet does: the injector alone, not nsenter that started it.
func (i *injection) terminate() error {
	children, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%[1]d/children", i.cmd.Process.Pid))
	if err != nil {
		return err
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(children)))
	if err != nil {
		return fmt.Errorf("nsenter has the children %q", children)
	}
	return syscall.Kill(pid, syscall.SIGTERM)
}

// runsFor waits until it has run for that long, and says if it still does.
func (i *injection) runsFor(d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-i.ended:
		return false
	case <-timer.C:
		return true
	}
}

// end waits for the end and gives the exit status, -1 for one that was killed. The error
// is for an injector that hangs, crashes, races, or fails without saying why.
func (i *injection) end() (status int, err error) {
	timer := time.NewTimer(runLimit)
	defer timer.Stop()
	select {
	case <-i.ended:
	case <-timer.C:
		_ = syscall.Kill(-i.cmd.Process.Pid, syscall.SIGQUIT) // for the stacks
		<-i.ended
		return -1, fmt.Errorf("%v hangs: %s", i.cmd.Args, i.stderr.String())
	}
	said := i.stderr.String()
	if strings.Contains(said, "DATA RACE") || strings.Contains(said, "goroutine ") {
		return -1, fmt.Errorf("%v: %s", i.cmd.Args, said)
	}
	if i.killed {
		return -1, nil
	}
	status = i.cmd.ProcessState.ExitCode()
	if status == 0 {
		return 0, nil
	}
	if status != 1 || said == "" {
		return status, fmt.Errorf("%v: exit status %d: %s", i.cmd.Args, status, said)
	}
	for line := range strings.Lines(said) {
		if err := host.CheckLine(strings.TrimSuffix(line, "\n")); err != nil {
			return status, fmt.Errorf("%v: %w", i.cmd.Args, err)
		}
	}
	// Before the error may come lines of the log.
	if !strings.HasPrefix(i.last(), "selkies-image-injector: ") {
		return status, fmt.Errorf("%v fails without an error: %s", i.cmd.Args, said)
	}
	return status, nil
}

// last is the last line that it has said, when it has ended.
func (i *injection) last() string {
	lines := strings.Split(strings.TrimSuffix(i.stderr.String(), "\n"), "\n")
	return lines[len(lines)-1]
}

// wait is end for a test, which fails by the error.
func (i *injection) wait(t *testing.T) (status int) {
	t.Helper()
	status, err := i.end()
	if err != nil {
		t.Error(err)
	}
	return status
}

// runInjector runs the injector without a fault; it must succeed.
func runInjector(t *testing.T, m *machine.Machine, runtime string, args ...string) (took time.Duration) {
	t.Helper()
	start := time.Now()
	i := startInjector(t, m, runtime, args...)
	if i.wait(t) != 0 {
		t.Fatalf("%v: %s", args, i.stderr.String())
	}
	if said := i.stderr.String(); said != "" {
		t.Logf("%v: %s", args, said)
	}
	return time.Since(start)
}

// pick is one of a list.
func pick[T any](r *rand.Rand, list []T) T { return list[r.IntN(len(list))] }

// draw is one of a list of faults, every third time its first: a killed injector is what
// happens the most.
func draw[T any](r *rand.Rand, faults []T) T {
	if r.IntN(3) == 0 {
		return faults[0]
	}
	return pick(r, faults)
}
