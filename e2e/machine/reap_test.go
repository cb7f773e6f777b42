//go:build e2e

package machine_test

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/moby/sys/mountinfo"

	"github.com/selkies-project/packer-plugin-selkies/e2e/machine"
)

// TestMain makes this binary a process that boots a machine and waits to be killed.
func TestMain(m *testing.M) {
	if os.Getenv("E2E_BOOT_AND_WAIT") == "" {
		os.Exit(m.Run())
	}
	booted, err := machine.Boot(context.Background(), machine.Config{Name: "orphan"})
	if err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
	fmt.Println(booted.Dir)
	select {}
}

// TestReap kills a process that has booted a machine: the next one to boot one
// removes it, mounts, processes and all.
func TestReap(t *testing.T) {
	t.Run("process", func(t *testing.T) { testReap(t, false) })
	t.Run("process and nspawn", func(t *testing.T) { testReap(t, true) })
}

func testReap(t *testing.T, nspawn bool) {
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), "E2E_BOOT_AND_WAIT=1")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	dir, err := bufio.NewReader(out).ReadString('\n')
	dir = strings.TrimSpace(dir)
	if killed := cmd.Process.Kill(); err != nil || killed != nil {
		t.Fatal(err, killed)
	}
	if err := cmd.Wait(); err == nil {
		t.Fatal("the process was not killed")
	}
	if nspawn {
		pid, err := os.ReadFile(dir + "/pid")
		if err != nil {
			t.Fatal(err)
		}
		if out, err := exec.Command("kill", "-KILL", string(pid)).CombinedOutput(); err != nil {
			t.Fatal(err, string(out))
		}
	}
	if mounted, err := mountinfo.Mounted(dir + "/root"); err != nil || !mounted {
		t.Fatalf("no machine was left in %q: %v", dir, err)
	}

	if err := machine.Reap(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%s is still there: %v", dir, err)
	}
	if out, _ := exec.Command("pgrep", "-f", dir).Output(); len(out) > 0 {
		t.Errorf("processes of the machine are left: %s", out)
	}
}
