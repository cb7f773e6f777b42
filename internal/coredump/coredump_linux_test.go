package coredump

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// aborts has this program end itself by SIGABRT, having forbidden its core if it says so.
const aborts = "COREDUMP_TEST_ABORTS"

func TestMain(m *testing.M) {
	if how := os.Getenv(aborts); how != "" {
		secret := bytes.Repeat([]byte("secret"), 1<<10)
		if how == "forbid" {
			if err := Forbid(); err != nil {
				fmt.Fprintln(os.Stderr, err)
				os.Exit(1)
			}
		}
		// What GOTRACEBACK=crash makes of it.
		_ = unix.Kill(os.Getpid(), unix.SIGABRT)
		runtime.KeepAlive(secret)
		select {}
	}
	os.Exit(m.Run())
}

// TestForbid has the kernel say of a process that ended by SIGABRT whether it wrote its core.
func TestForbid(t *testing.T) {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_CORE, &limit); err != nil {
		t.Fatal(err)
	}
	// The children inherit it.
	raised := unix.Rlimit{Cur: limit.Max, Max: limit.Max}
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &raised); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := unix.Setrlimit(unix.RLIMIT_CORE, &limit); err != nil {
			t.Error(err)
		}
	})
	dumps := func(how string) bool {
		var stderr bytes.Buffer
		cmd := exec.Command(os.Args[0])
		cmd.Env = append(os.Environ(), aborts+"="+how, "GOTRACEBACK=crash")
		cmd.Dir, cmd.Stderr = t.TempDir(), &stderr
		var exit *exec.ExitError
		if err := cmd.Run(); !errors.As(err, &exit) {
			t.Fatalf("it ended well: %v", err)
		}
		status := exit.Sys().(syscall.WaitStatus)
		if status.Signal() != unix.SIGABRT {
			t.Fatalf("%v\n%s", exit, &stderr)
		}
		return status.CoreDump()
	}
	// Where a core is a file and root runs the test, there is one without Forbid.
	pattern, err := os.ReadFile("/proc/sys/kernel/core_pattern")
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.HasPrefix(pattern, []byte("|")) && limit.Max == unix.RLIM_INFINITY && !dumps("allow") {
		t.Error("no core is written without Forbid either")
	}
	if dumps("forbid") {
		t.Error("the core of a process that forbids it was written")
	}
}
