package machine

import (
	"context"
	"errors"
	"io"
	"io/fs"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/selkies-project/packer-plugin-selkies/e2e/host"
)

// New boots a machine for a test, which fails where it cannot, and closes it at
// the test's end. The log of a failed test has the machine's journal.
func New(t testing.TB, config Config) *Machine {
	t.Helper()
	m, err := Boot(t.Context(), config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() && m.leader != 0 {
			// The test's own context has ended.
			cmd := m.Command(context.Background(), "journalctl", "-q", "--no-pager", "-b", "-n", "40", "-p", "notice")
			out, _ := cmd.CombinedOutput()
			t.Logf("end of the journal of %s:\n%s", config.Name, out)
		}
		if err := m.Close(); err != nil {
			t.Error(err)
		}
	})
	return m
}

// Output runs a command in the machine, and fails the test with its error output
// where it fails.
func (m *Machine) Output(t testing.TB, args ...string) string {
	t.Helper()
	out, err := m.Run(t.Context(), args...)
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// MountDisk attaches a disk image, read-only if the options of its mount begin with
// ro, and mounts it at dir. detach takes the disk away, as the test's end does, but
// not what is mounted of it.
func (m *Machine) MountDisk(t testing.TB, image, dir, options string) (detach func()) {
	t.Helper()
	loop, err := host.AttachLoop(image, strings.HasPrefix(options, "ro"))
	if err != nil {
		t.Fatal(err)
	}
	return m.MountDevice(t, loop.Path, loop, dir, options)
}

// MountDevice is MountDisk for a device that is attached to the host, and which detach
// closes.
func (m *Machine) MountDevice(t testing.TB, path string, device io.Closer, dir, options string) (detach func()) {
	t.Helper()
	name := filepath.Base(path)
	detach = sync.OnceFunc(func() {
		// A reboot has detached it.
		if err := m.DetachDisk(path, name); err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Error(err)
		}
		if err := device.Close(); err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(detach)
	if err := m.AttachDisk(path, name); err != nil {
		t.Fatal(err)
	}
	m.Output(t, "mkdir", "-p", dir)
	m.Output(t, "mount", "-o", options, path, dir)
	return detach
}

// Refused runs a command in the machine that must end with the exit status given and
// say nothing but one line on standard error, which has every one of words.
func (m *Machine) Refused(t testing.TB, status int, args []string, words ...string) {
	t.Helper()
	cmd := m.Command(t.Context(), args[0], args[1:]...)
	var stdout, stderr strings.Builder
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	err := cmd.Run()
	if cmd.ProcessState.ExitCode() != status {
		t.Fatalf("%q: %v, want exit status %d; it says %s%s", args, err, status, &stdout, &stderr)
	}
	for _, w := range words {
		if !strings.Contains(stderr.String(), w) {
			t.Errorf("%q: %q does not have %q", args, &stderr, w)
		}
	}
	if strings.Count(stderr.String(), "\n") != 1 || stdout.Len() > 0 {
		t.Errorf("%q: not one line on stderr: %q; on stdout: %q", args, &stderr, &stdout)
	}
}
