package machine

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
)

// Signal sends a signal to every process of the machine with the name that the kernel
// has of it, at most 15 bytes, and says how many there were.
func (m *Machine) Signal(signal syscall.Signal, name string) (int, error) {
	pids, err := m.processes(name)
	if err != nil {
		return 0, err
	}
	sent := 0
	for _, pid := range pids {
		switch err := syscall.Kill(pid, signal); err {
		case nil:
			sent++
		case syscall.ESRCH: // it has just ended
		default:
			return sent, fmt.Errorf("sending %s to %s: %w", signal, name, err)
		}
	}
	return sent, nil
}

// processes are the process IDs on the host. Those of a container in the machine are
// none of it.
func (m *Machine) processes(name string) ([]int, error) {
	if m.leader == 0 {
		return nil, fmt.Errorf("looking for %s: the machine is off", name)
	}
	namespace, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/pid", m.leader))
	if err != nil {
		return nil, err
	}
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return nil, err
	}
	var pids []int
	for _, dir := range dirs {
		comm, err := os.ReadFile(filepath.Join(dir, "comm"))
		if err != nil || strings.TrimSpace(string(comm)) != name {
			continue // or it has just ended
		}
		if ns, err := os.Readlink(filepath.Join(dir, "ns/pid")); err != nil || ns != namespace {
			continue
		}
		pid, err := strconv.Atoi(filepath.Base(dir))
		if err != nil {
			return nil, err
		}
		pids = append(pids, pid)
	}
	return pids, nil
}
