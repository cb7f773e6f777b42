package machine

import (
	"bytes"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"

	"github.com/selkies-project/packer-plugin-selkies/e2e/host"
)

// reserve makes the folder of a new machine and locks it for as long as this
// process lives, and removes machines whose process died.
func reserve() (*Machine, error) {
	parent, err := host.Cache("machines")
	if err != nil {
		return nil, err
	}
	all, err := host.Lock(filepath.Join(parent, ".lock"))
	if err != nil {
		return nil, err
	}
	defer all.Close()
	reap(parent)

	dir, err := os.MkdirTemp(parent, "selkies-")
	if err != nil {
		return nil, err
	}
	// The machine's / is an overlay of this folder's children, which others enter.
	if err := os.Chmod(dir, 0o755); err != nil {
		return nil, err
	}
	lock, err := host.Lock(filepath.Join(dir, "lock"))
	if err != nil {
		return nil, err
	}
	return &Machine{Dir: dir, id: filepath.Base(dir), lock: lock, console: filepath.Join(dir, "console.log")}, nil
}

// Reap removes the machines of processes that died. Boot does it as well.
func Reap() error {
	parent, err := host.Cache("machines")
	if err != nil {
		return err
	}
	all, err := host.Lock(filepath.Join(parent, ".lock"))
	if err != nil {
		return err
	}
	defer all.Close()
	reap(parent)
	return nil
}

// reap goes on after an error: what is left of another run is not this one's problem.
func reap(parent string) {
	dirs, _ := filepath.Glob(filepath.Join(parent, "selkies-*"))
	for _, dir := range dirs {
		if err := reapOne(dir); err != nil {
			slog.Warn("cannot remove what an earlier run left", "dir", dir, "err", err)
		}
	}
}

func reapOne(dir string) error {
	lock, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return err
	}
	defer lock.Close()
	err = syscall.Flock(int(lock.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
	if errors.Is(err, syscall.EWOULDBLOCK) {
		return nil // its process lives
	}
	if err != nil {
		return err
	}
	data, err := os.ReadFile(filepath.Join(dir, "pid"))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if pid, _ := strconv.Atoi(string(data)); pid > 0 {
		// The number may long be another process's.
		args, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		if slices.ContainsFunc(bytes.Split(args, []byte{0}), func(a []byte) bool { return string(a) == filepath.Join(dir, "root") }) {
			if err := kill(pid); err != nil {
				return err
			}
		}
	}
	return remove(dir, filepath.Base(dir))
}

// kill ends a machine by its init, which takes all others with it, and waits for
// nspawn to be gone: until then it holds the root.
func kill(nspawn int) error {
	fd, err := unix.PidfdOpen(nspawn, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	if leader := child(nspawn); leader != 0 {
		if err := syscall.Kill(leader, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
			return err
		}
	} else if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return err
	}
	if exited(fd, 20*time.Second) {
		return nil
	}
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return err
	}
	if !exited(fd, 20*time.Second) {
		return fmt.Errorf("systemd-nspawn, process %d, does not end", nspawn)
	}
	return nil
}

// exited waits for the end of a process by its pidfd.
func exited(pidfd int, timeout time.Duration) bool {
	end := time.Now().Add(timeout)
	for left := timeout; left > 0; left = time.Until(end) {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}, int(left.Milliseconds()))
		if n > 0 {
			return true
		}
		if err != nil && !errors.Is(err, unix.EINTR) {
			return false
		}
	}
	return false
}

// remove unmounts what is mounted below dir and removes it, and the cgroups of id.
func remove(dir, id string) error {
	mounts, err := mountinfo.GetMounts(mountinfo.PrefixFilter(dir))
	if err != nil {
		return err
	}
	slices.SortFunc(mounts, func(a, b *mountinfo.Info) int { return strings.Compare(b.Mountpoint, a.Mountpoint) })
	for _, m := range mounts {
		if err := unix.Unmount(m.Mountpoint, 0); err != nil {
			return fmt.Errorf("unmounting %s: %w", m.Mountpoint, err)
		}
	}
	if err := removeCgroups(id); err != nil {
		return err
	}
	return os.RemoveAll(dir)
}
