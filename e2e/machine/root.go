package machine

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"slices"

	"github.com/selkies-project/packer-plugin-selkies/e2e/host"
)

// bootable are in every machine, besides Debian's essential ones.
var bootable = []string{"systemd", "systemd-sysv", "dbus"}

// packages are those of a machine that names none.
var packages = []string{
	"iproute2", "ca-certificates", "openssh-server",
	"containerd", "runc", "docker.io", "iptables", "e2fsprogs", "busybox-static", "sudo",
}

// rootVersion changes whenever finishRoot does.
const rootVersion = "1"

// idle are units that a test starts if it wants them, or that nobody wants.
var idle = []string{
	"docker.service", "docker.socket", "containerd.service", "ssh.service", "console-getty.service",
	"apt-daily.timer", "apt-daily-upgrade.timer", "dpkg-db-backup.timer", "e2scrub_all.timer", "e2scrub_reap.service",
	"fstrim.timer",
}

// writableCgroups lets runc make cgroups: nspawn mounts the controllers of cgroup
// version 1 read-only.
const writableCgroups = `[Unit]
Description=Writable cgroup controllers
DefaultDependencies=no
Before=sysinit.target

[Service]
Type=oneshot
RemainAfterExit=yes
ExecStart=/bin/sh -c 'findmnt -n -t cgroup -o TARGET | while read -r d; do mount -o remount,bind,rw "$d"; done'

[Install]
WantedBy=sysinit.target
`

// baseRoot is a root with packages, besides those that it needs to boot.
func baseRoot(ctx context.Context, packages []string) (string, error) {
	return host.Root(ctx, slices.Concat(bootable, packages), rootVersion, func(dir string) error {
		unit := filepath.Join(dir, "etc/systemd/system/writable-cgroups.service")
		if err := os.WriteFile(unit, []byte(writableCgroups), 0o644); err != nil {
			return err
		}
		for _, name := range idle {
			if _, err := os.Stat(filepath.Join(dir, "lib/systemd/system", name)); err != nil {
				continue // of a package that is not there
			}
			if _, err := host.Output(exec.CommandContext(ctx, "systemctl", "--root="+dir, "disable", name)); err != nil {
				return err
			}
		}
		_, err := host.Output(exec.CommandContext(ctx, "systemctl", "--root="+dir, "enable", "writable-cgroups.service"))
		return err
	})
}

// Busybox is the host's path of a statically linked busybox, which every test image
// is made of.
func Busybox(ctx context.Context) (string, error) {
	root, err := baseRoot(ctx, packages)
	return filepath.Join(root, "bin/busybox"), err
}
