//go:build e2e

// Package systemd_test boots machines with the example units: a cached image is
// there when the machine has booted.
package systemd_test

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/selkies-project/packer-plugin-selkies/e2e/cachedisk"
	"github.com/selkies-project/packer-plugin-selkies/e2e/host"
	"github.com/selkies-project/packer-plugin-selkies/e2e/images"
	"github.com/selkies-project/packer-plugin-selkies/e2e/machine"
	"github.com/selkies-project/packer-plugin-selkies/e2e/registry"
)

// world is what both tests share: the injector, and a cache disk with one image. The
// registry that it came from is gone.
var world struct {
	injector string
	image    string
	// disk is where the cache disk is mounted on the host.
	disk string
}

func TestMain(m *testing.M) {
	host.Main(func(ctx context.Context, dir string) (status int, err error) {
		world.injector = filepath.Join(dir, "selkies-image-injector")
		if err := host.Build(ctx, "./injector", world.injector); err != nil {
			return 1, err
		}
		if err := buildDisk(ctx, dir); err != nil {
			return 1, fmt.Errorf("building the cache disk: %w", err)
		}
		loop, err := host.AttachLoop(filepath.Join(dir, "disk"), true)
		if err != nil {
			return 1, err
		}
		defer loop.Close()
		world.disk = filepath.Join(dir, "mounted")
		if err := os.Mkdir(world.disk, 0o755); err != nil {
			return 1, err
		}
		if err := unix.Mount(loop.Path, world.disk, "ext4", unix.MS_RDONLY, "noload"); err != nil {
			return 1, fmt.Errorf("mounting the cache disk: %w", err)
		}
		defer unix.Unmount(world.disk, 0)
		return m.Run(), nil
	})
}

func buildDisk(ctx context.Context, dir string) error {
	reg, err := registry.Start(registry.Config{Dir: filepath.Join(dir, "blobs")})
	if err != nil {
		return err
	}
	defer reg.Stop()
	busybox, err := machine.Busybox(ctx)
	if err != nil {
		return err
	}
	all, err := images.Catalogue(busybox)
	if err != nil {
		return err
	}
	all = slices.DeleteFunc(all, func(i images.Image) bool { return i.Repository != "oci" })
	refs, err := images.Push(ctx, reg.Addr, all)
	if err != nil {
		return err
	}
	world.image = refs[0]
	m, err := machine.Boot(ctx, machine.Config{Name: "builder"})
	if err != nil {
		return err
	}
	defer m.Close()
	_, err = cachedisk.Build(ctx, m, cachedisk.Config{Image: filepath.Join(dir, "disk"), References: refs})
	return err
}

// newNode is a machine with the cache disk on /cache, as an entry of fstab gives it.
func newNode(t *testing.T) *machine.Machine {
	t.Helper()
	m := machine.New(t, machine.Config{Name: "node", Binds: map[string]string{"/cache": world.disk}})
	if err := m.Install(world.injector, "/usr/local/bin/selkies-image-injector"); err != nil {
		t.Fatal(err)
	}
	if err := m.StartContainerd(t.Context(), machine.Containerd{Release: machine.Debian}); err != nil {
		t.Fatal(err)
	}
	return m
}

// install enables an example unit, which systemd must find nothing wrong with.
func install(t *testing.T, m *machine.Machine, unit string) {
	t.Helper()
	data, err := os.ReadFile(filepath.Join("../../example/systemd", unit))
	if err != nil {
		t.Fatal(err)
	}
	path := "/etc/systemd/system/" + unit
	if err := m.WriteFile(path, data, 0o644); err != nil {
		t.Fatal(err)
	}
	m.Output(t, "systemd-analyze", "verify", "--man=no", "--recursive-errors=no", path)
	m.Output(t, "systemctl", "-q", "enable", unit)
}

// boot boots the machine again and returns what the unit said in that boot.
func boot(t *testing.T, m *machine.Machine, unit string) string {
	t.Helper()
	if err := m.Reboot(t.Context()); err != nil {
		t.Fatal(err)
	}
	if state := m.Output(t, "systemctl", "show", "-P", "Result", unit); state != "success\n" {
		t.Errorf("%s ended with %s", unit, state)
	}
	return m.Output(t, "journalctl", "-q", "-b", "-o", "cat", "-u", unit)
}

func TestDocker(t *testing.T) {
	const unit = "selkies-image-injector-docker.service"
	m := newNode(t)
	if err := m.StartDocker(t.Context(), machine.Docker{Release: machine.Debian}); err != nil {
		t.Fatal(err)
	}
	install(t, m, unit)
	for _, registered := range []string{"registered 1 images", "registered 0 images"} {
		if said := boot(t, m, unit); !strings.Contains(said, registered) {
			t.Errorf("the unit said %q, want %q", said, registered)
		}
		// In this boot systemd started dockerd once.
		starts := m.Output(t, "journalctl", "-q", "-b", "-o", "cat", "UNIT=docker.service", "JOB_TYPE=start", "JOB_RESULT=done")
		if n := strings.Count(starts, "\n"); n != 1 {
			t.Errorf("dockerd was started %d times: %s", n, starts)
		}
		if out := m.Output(t, "docker", "run", "--rm", "--network", "none", world.image); out != "hello\n" {
			t.Errorf("the container said %q", out)
		}
	}
}

func TestContainerd(t *testing.T) {
	const unit = "selkies-image-injector-containerd.service"
	m := newNode(t)
	install(t, m, unit)
	for _, registered := range []string{"registered 1 images", "registered 0 images"} {
		if said := boot(t, m, unit); !strings.Contains(said, registered) {
			t.Errorf("the unit said %q, want %q", said, registered)
		}
		// Its status tells: ctr can lose what a container says that ends at once.
		m.Output(t, "ctr", "-n", "k8s.io", "run", "--rm", world.image, "test")
	}
}
