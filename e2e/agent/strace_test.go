//go:build e2e

package agent_test

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
)

// slowContainerd has every disk sync of the containerd beside the agent take long, until
// normal is called.
func (a *agent) slowContainerd(t testing.TB) (normal func()) {
	t.Helper()
	pid, err := a.beside("containerd")
	if err != nil {
		t.Fatal(err)
	}
	return strace(t, pid, "fdatasync,fsync", "delay_enter=30ms")
}

// strace tampers with system calls of a process, until stop is called or the process has
// ended.
func strace(t testing.TB, pid, calls, how string) (stop func()) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "strace", "-f", "-qq", "-o", os.DevNull, "-e", "trace="+calls, "-e", "inject="+calls+":"+how, "-p", pid)
	var said bytes.Buffer
	cmd.Stderr = &said
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	wait(t, "strace to be attached", func() error {
		status, err := os.ReadFile("/proc/" + pid + "/status")
		if err == nil && !strings.Contains(string(status), fmt.Sprintf("TracerPid:\t%d\n", cmd.Process.Pid)) {
			err = errors.New("not yet")
		}
		return err
	})
	return func() {
		t.Helper()
		if err := cmd.Process.Signal(syscall.SIGINT); err != nil && !errors.Is(err, os.ErrProcessDone) {
			t.Fatal(err)
		}
		if err := cmd.Wait(); err != nil && !errors.As(err, new(*exec.ExitError)) {
			t.Fatalf("%v: %s", err, said.String())
		}
	}
}

// id is the agent's process ID on the host.
func (a *agent) id() string { return strconv.Itoa(a.pid) }

// beside is the ID, on the host, of the agent's machine's process of that name.
func (a *agent) beside(name string) (string, error) {
	namespace, err := os.Readlink(a.proc() + "/ns/pid")
	if err != nil {
		return "", err
	}
	all, err := filepath.Glob("/proc/[0-9]*/comm")
	if err != nil {
		return "", err
	}
	for _, file := range all {
		comm, _ := os.ReadFile(file) // processes end
		dir := filepath.Dir(file)
		if ns, _ := os.Readlink(dir + "/ns/pid"); ns == namespace && strings.TrimSpace(string(comm)) == name {
			return filepath.Base(dir), nil
		}
	}
	return "", fmt.Errorf("no process %s", name)
}
