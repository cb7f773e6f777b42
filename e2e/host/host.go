// Package host is what the tests and the demo need of the machine that they run
// on: a cache folder that outlives them, Debian roots, the pinned tools built from
// source, loop devices. It needs root on Debian 12; e2e/setup.sh installs the rest.
package host

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"strings"
	"syscall"
)

// programs are what e2e/setup.sh installs, by the name that is looked up in PATH.
var programs = []string{"systemd-nspawn", "nsenter", "unshare", "ip", "debootstrap", "ssh-keygen", "strace"}

// Check says in one line why this host cannot run the tests, nil if it can.
func Check() error {
	if runtime.GOOS != "linux" {
		return fmt.Errorf("this needs Linux, not %s: use a Debian 12 machine", runtime.GOOS)
	}
	if os.Geteuid() != 0 {
		return errors.New("this boots machines and attaches disks: run it as root")
	}
	var missing []string
	for _, p := range programs {
		if _, err := exec.LookPath(p); err != nil {
			missing = append(missing, p)
		}
	}
	if len(missing) > 0 {
		return fmt.Errorf("%s not found: run e2e/setup.sh on Debian 12", strings.Join(missing, ", "))
	}
	if _, err := os.Stat("/dev/loop-control"); err != nil {
		return errors.New("no /dev/loop-control: this needs a kernel with loop devices, a container has none")
	}
	return nil
}

// Cache is a folder below the one that SELKIES_BUILD_CACHE names, made if missing. What
// is expensive to make is kept there; it may be removed while nothing runs.
func Cache(name string) (string, error) {
	root := os.Getenv("SELKIES_BUILD_CACHE")
	if root == "" {
		user, err := os.UserCacheDir()
		if err != nil {
			return "", fmt.Errorf("finding a cache folder: %w; set SELKIES_BUILD_CACHE", err)
		}
		root = filepath.Join(user, "packer-plugin-selkies")
	}
	root, err := filepath.Abs(root)
	if err != nil {
		return "", err
	}
	dir := filepath.Join(root, name)
	return dir, os.MkdirAll(dir, 0o755)
}

// Lock waits for the lock file at path, which it makes if missing. Closing the
// file, or the end of the process, frees it.
func Lock(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, err
	}
	for {
		err = syscall.Flock(int(f.Fd()), syscall.LOCK_EX)
		if !errors.Is(err, syscall.EINTR) {
			break
		}
	}
	if err != nil {
		f.Close()
		return nil, fmt.Errorf("locking %s: %w", path, err)
	}
	return f, nil
}

// Source is the folder of this module's go.mod.
func Source(ctx context.Context) (string, error) {
	out, err := Output(exec.CommandContext(ctx, "go", "env", "GOMOD"))
	if err != nil {
		return "", err
	}
	return filepath.Dir(strings.TrimSpace(out)), nil
}

// Tool is the folder with the binaries of a folder of tools: packer, kubernetes,
// containerd and others. The first call on a machine builds them, for minutes.
func Tool(ctx context.Context, name string) (string, error) {
	src, err := Source(ctx)
	if err != nil {
		return "", err
	}
	cache, err := Cache("tools")
	if err != nil {
		return "", err
	}
	lock, err := Lock(filepath.Join(cache, name+".lock"))
	if err != nil {
		return "", err
	}
	defer lock.Close()
	cmd := exec.CommandContext(ctx, filepath.Join(src, "tools/build.sh"), name)
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return "", fmt.Errorf("building %s with tools/build.sh: %w", name, err)
	}
	return strings.TrimSpace(string(out)), nil
}

// Output runs cmd and returns its standard output. The error has what the command
// wrote to standard error.
func Output(cmd *exec.Cmd) (string, error) {
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		said := strings.TrimSpace(stderr.String())
		if said == "" {
			said = strings.TrimSpace(stdout.String())
		}
		return stdout.String(), fmt.Errorf("running %s: %w: %s", strings.Join(cmd.Args, " "), err, said)
	}
	return stdout.String(), nil
}

// ResetPeak has processes that are started from now on begin with little as the most memory
// that they had resident: they begin with what this one has had (proc(5), clear_refs). What
// goes on beside it may need more again.
func ResetPeak() error {
	debug.FreeOSMemory()
	return os.WriteFile("/proc/self/clear_refs", []byte("5"), 0)
}
