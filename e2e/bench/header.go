package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/selkies-project/packer-plugin-selkies/e2e/host"
	"github.com/selkies-project/packer-plugin-selkies/e2e/machine"
)

// header says what machine and which versions the figures are of.
func header(ctx context.Context) (string, error) {
	var uts unix.Utsname
	if err := unix.Uname(&uts); err != nil {
		return "", err
	}
	var mem unix.Sysinfo_t
	if err := unix.Sysinfo(&mem); err != nil {
		return "", err
	}
	cpu, err := field("/proc/cpuinfo", "model name")
	if err != nil {
		return "", err
	}
	load, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return "", err
	}
	top, err := host.Cache("bench")
	if err != nil {
		return "", err
	}
	disk, err := host.Output(exec.CommandContext(ctx, "findmnt", "-n", "-o", "FSTYPE,OPTIONS", "-T", top))
	if err != nil {
		return "", err
	}
	src, err := host.Source(ctx)
	if err != nil {
		return "", err
	}
	commit, err := host.Output(exec.CommandContext(ctx, "git", "-C", src, "describe", "--always", "--dirty"))
	if err != nil {
		commit = "unknown" // not a clone
	}
	tools, err := toolVersions(src)
	if err != nil {
		return "", err
	}
	busybox, err := machine.Busybox(ctx)
	if err != nil {
		return "", err
	}
	packages, err := host.Output(exec.CommandContext(ctx, "dpkg-query",
		"--admindir="+filepath.Join(busybox, "../../var/lib/dpkg"), "-W", "-f", "; Debian's ${Package} ${Version}", "docker.io", "runc"))
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("packer-plugin-selkies %s, %s\n%d × %s, %s of memory, Linux %s, load %s\ndisk %s\n%s%s\n",
		strings.TrimSpace(commit), runtime.Version(), runtime.NumCPU(), cpu,
		format(bytes, float64(mem.Totalram)*float64(mem.Unit)), unix.ByteSliceToString(uts.Release[:]),
		strings.Join(strings.Fields(string(load))[:3], " "), strings.Join(strings.Fields(disk), " "), tools, packages), nil
}

func field(file, name string) (string, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return "", err
	}
	for line := range strings.Lines(string(data)) {
		if key, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(key) == name {
			return strings.TrimSpace(value), nil
		}
	}
	return "unknown processor", nil
}

// toolVersions are those that the modules below tools pin.
func toolVersions(src string) (string, error) {
	var versions []string
	for _, t := range []struct{ tool, module string }{
		{"containerd", "github.com/containerd/containerd/v2"},
		{"runc", "github.com/opencontainers/runc"},
		{"packer", "github.com/hashicorp/packer"},
	} {
		data, err := os.ReadFile(filepath.Join(src, "tools", t.tool, "go.mod"))
		if err != nil {
			return "", err
		}
		for line := range strings.Lines(string(data)) {
			if f := strings.Fields(strings.TrimPrefix(line, "require ")); len(f) > 1 && f[0] == t.module {
				versions = append(versions, t.tool+" "+f[1])
			}
		}
	}
	return strings.Join(versions, ", "), nil
}
