//go:build e2e

package machine_test

import (
	"context"
	"errors"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/selkies-project/packer-plugin-selkies/e2e/host"
	"github.com/selkies-project/packer-plugin-selkies/e2e/machine"
)

func TestMachine(t *testing.T) {
	port, err := machine.FreePort()
	if err != nil {
		t.Fatal(err)
	}
	m := machine.New(t, machine.Config{Name: "first", SSHPort: port, Files: map[string]string{"/etc/e2e": "hello"}})
	other := machine.New(t, machine.Config{Name: "second"})

	for want, m := range map[string]*machine.Machine{"first": m, "second": other} {
		if got := strings.TrimSpace(m.Output(t, "hostname")); got != want {
			t.Errorf("host name is %q, want %q", got, want)
		}
	}
	if got := m.Output(t, "cat", "/etc/e2e"); got != "hello" {
		t.Errorf("file in the machine has %q", got)
	}

	t.Run("ssh", func(t *testing.T) {
		cmd := exec.CommandContext(t.Context(), "ssh", "-F", "none", "-i", m.SSHKey, "-p", strconv.Itoa(port),
			"-o", "StrictHostKeyChecking=no", "-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR",
			"root@127.0.0.1", "hostname")
		if out, err := host.Output(cmd); err != nil || strings.TrimSpace(out) != "first" {
			t.Errorf("ssh: %q, %v", out, err)
		}
	})
	t.Run("error", func(t *testing.T) {
		_, err := m.Run(t.Context(), "ls", "/nonexistent")
		var status *exec.ExitError
		if !errors.As(err, &status) || status.ExitCode() != 2 || !strings.Contains(err.Error(), "/nonexistent': No such file") {
			t.Errorf("error is %v", err)
		}
	})
	t.Run("cancel kills in the machine", func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		cmd := m.Command(ctx, "sh", "-c", "echo started; exec sleep 4242")
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		if _, err := out.Read(make([]byte, 16)); err != nil {
			t.Fatal(err)
		}
		cancel()
		if err := cmd.Wait(); err == nil {
			t.Error("no error from a killed command")
		}
		// Wait knows of the way to it only: the command itself may still be ending.
		left := "?"
		for end := time.Now().Add(10 * time.Second); left != "" && time.Now().Before(end); {
			left = m.Output(t, "sh", "-c", "grep -lz '[4]242' /proc/[0-9]*/cmdline || true")
		}
		if left != "" {
			t.Errorf("still running: %s", left)
		}
	})
	t.Run("disk", func(t *testing.T) {
		image := filepath.Join(t.TempDir(), "disk")
		if err := host.NewDisk(image, 64<<20); err != nil {
			t.Fatal(err)
		}
		disk, err := host.AttachLoop(image, false)
		if err != nil {
			t.Fatal(err)
		}
		defer disk.Close()
		if err := m.AttachDisk(disk.Path, "cache"); err != nil {
			t.Fatal(err)
		}
		m.Output(t, "sh", "-ec", `mkfs.ext4 -q /dev/disk/by-id/google-cache; mkdir /mnt/cache
			mount /dev/disk/by-id/google-cache /mnt/cache; echo data >/mnt/cache/file; umount /mnt/cache`)
		if err := m.DetachDisk(disk.Path, "cache"); err != nil {
			t.Fatal(err)
		}
		if err := disk.Close(); err != nil {
			t.Fatal(err)
		}

		disk, err = host.AttachLoop(image, true)
		if err != nil {
			t.Fatal(err)
		}
		defer disk.Close()
		if err := other.AttachDisk(disk.Path, "cache"); err != nil {
			t.Fatal(err)
		}
		other.Output(t, "sh", "-ec", "mkdir /mnt/cache; mount -o ro,noload "+disk.Path+" /mnt/cache")
		if data, err := os.ReadFile(other.Path("/mnt/cache/file")); err != nil || string(data) != "data\n" {
			t.Errorf("file on the disk: %q, %v", data, err)
		}
		if _, err := other.Run(t.Context(), "mount", "-o", "remount,rw", "/mnt/cache"); err == nil {
			t.Error("a read-only disk could be made writable")
		}
		other.Output(t, "umount", "/mnt/cache")
	})
	t.Run("reboot", func(t *testing.T) {
		id := m.Output(t, "cat", "/proc/1/stat")
		m.Output(t, "touch", "/run/before", "/var/lib/docker/before", "/root/before")
		if err := m.Reboot(t.Context()); err != nil {
			t.Fatal(err)
		}
		if m.Output(t, "cat", "/proc/1/stat") == id {
			t.Error("same init after the reboot")
		}
		m.Output(t, "sh", "-c", "test ! -e /run/before && test -e /var/lib/docker/before && test -e /root/before")
		conn, err := net.Dial("tcp", net.JoinHostPort("127.0.0.1", strconv.Itoa(port)))
		if err != nil {
			t.Fatal(err)
		}
		conn.Close()
	})
	t.Run("kill and start", func(t *testing.T) {
		if err := m.Kill(); err != nil {
			t.Fatal(err)
		}
		if _, err := os.Stat(m.Path("/var/lib/docker/before")); err != nil {
			t.Error(err)
		}
		if err := m.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := m.Poweroff(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := m.Start(t.Context()); err != nil {
			t.Fatal(err)
		}
	})
	t.Run("close", func(t *testing.T) {
		for range 2 {
			if err := m.Close(); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := os.Stat(m.Dir); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s is still there: %v", m.Dir, err)
		}
		other.Output(t, "true")
	})
}

// TestRuntimes starts every runtime that tests use and a container in it.
func TestRuntimes(t *testing.T) {
	const archive = `mkdir -p /tmp/i/bin && cp /bin/busybox /tmp/i/bin/ && tar -C /tmp/i -c . | docker import - busybox >/dev/null`
	const run = "docker run --rm --network host busybox /bin/busybox echo hello"
	tests := []struct {
		name       string
		containerd machine.Release
		docker     machine.Docker
		driver     string
	}{
		{"Debian", machine.Debian, machine.Docker{Release: machine.Debian}, "overlay2"},
		{"Docker 20.10 on containerd 2.4", machine.Upstream, machine.Docker{Release: machine.Debian}, "overlay2"},
		{"Moby 29, graph driver", machine.Upstream, machine.Docker{Release: machine.Upstream}, "overlay2"},
		{"Moby 29, image store", machine.Upstream, machine.Docker{Release: machine.Upstream, ImageStore: true}, "overlayfs"},
	}
	m := machine.New(t, machine.Config{Name: "runtimes"})
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if err := m.StartContainerd(t.Context(), machine.Containerd{Release: tt.containerd}); err != nil {
				t.Fatal(err)
			}
			if err := m.StartDocker(t.Context(), tt.docker); err != nil {
				t.Fatal(err)
			}
			m.Output(t, "ctr", "version")
			if got := strings.TrimSpace(m.Output(t, "docker", "info", "-f", "{{.Driver}}")); got != tt.driver {
				t.Errorf("driver is %s, want %s", got, tt.driver)
			}
			if got := m.Output(t, "sh", "-ec", archive+"; "+run); got != "hello\n" {
				t.Errorf("the container said %q", got)
			}
		})
	}
}
