package cachedisk

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"

	"github.com/moby/sys/mountinfo"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	"github.com/selkies-project/packer-plugin-selkies/manifest"
)

// HostPath is the host's absolute path as this process reaches it, with all mounts
// that the host's processes see: those made after this process's own mount
// namespace was cloned as well.
func HostPath(hostRoot, path string) string {
	return filepath.Join(hostRoot, "proc/1/root", path)
}

// MountOnHost makes the disk readable at target, an existing directory of the
// host, for the host's processes, and outlives this process and its mount
// namespace. A mount of this disk that is there and can be read is kept; a dead
// one is replaced.
//
// The new mount is a clone of the one that d.Dir is on, of d.Dir alone, and
// read-only whatever that one is. It allows set-user-ID files and execution:
// containerd bind-mounts a single layer's directory for a read-only container,
// and a bind mount inherits these flags.
func (d *Disk) MountOnHost(hostRoot, target string) error {
	if CheckOnHost(hostRoot, target, d.ID) == nil {
		return nil
	}
	if err := UnmountOnHost(hostRoot, target); err != nil {
		return err
	}
	if err := d.cloneTo(hostRoot, target); err != nil {
		return fmt.Errorf("mounting cache disk %s on the host's %s: %w", d.Dir, target, Explain(err))
	}
	return CheckOnHost(hostRoot, target, d.ID)
}

func (d *Disk) cloneTo(hostRoot, target string) error {
	tree, err := unix.OpenTree(unix.AT_FDCWD, d.Dir, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		return fmt.Errorf("open_tree: %w", err)
	}
	defer unix.Close(tree)
	attr := &unix.MountAttr{
		Attr_set:    unix.MOUNT_ATTR_RDONLY | unix.MOUNT_ATTR_NODEV,
		Attr_clr:    unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NOEXEC,
		Propagation: unix.MS_PRIVATE,
	}
	if err := unix.MountSetattr(tree, "", unix.AT_EMPTY_PATH, attr); err != nil {
		return fmt.Errorf("mount_setattr: %w", err)
	}
	return inHost(hostRoot, func() error {
		if err := unix.MoveMount(tree, "", unix.AT_FDCWD, target, unix.MOVE_MOUNT_F_EMPTY_PATH); err != nil {
			return fmt.Errorf("move_mount: %w", err)
		}
		// A mount put on a shared one becomes shared (and reaches namespaces that are
		// slaves of the host's, where containerd may run); nothing that is mounted
		// below it later should.
		if err := unix.MountSetattr(tree, "", unix.AT_EMPTY_PATH, &unix.MountAttr{Propagation: unix.MS_PRIVATE}); err != nil {
			return fmt.Errorf("mount_setattr: %w", err)
		}
		return nil
	})
}

// UnmountOnHost takes away every mount on target. Containers that run from it are
// not disturbed: an overlay mount holds clones of its lower layers' mounts.
func UnmountOnHost(hostRoot, target string) error {
	err := inHost(hostRoot, func() error {
		for {
			// EINVAL: not a mount point, so none is left. Detached, for a device that
			// is gone fails an ordinary unmount.
			err := unix.Unmount(target, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW)
			if errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOENT) {
				return nil
			}
			if err != nil {
				return err
			}
		}
	})
	if err != nil {
		return fmt.Errorf("unmounting the host's %s: %w", target, Explain(err))
	}
	return nil
}

// MountsOnHost are the host's mount points below dir.
func MountsOnHost(hostRoot, dir string) ([]string, error) {
	f, err := os.Open(filepath.Join(hostRoot, "proc/1/mountinfo"))
	if err != nil {
		return nil, fmt.Errorf("listing the host's mounts: %w", Explain(err))
	}
	defer f.Close()
	mounts, err := mountinfo.GetMountsFromReader(f, mountinfo.PrefixFilter(dir))
	if err != nil {
		return nil, fmt.Errorf("listing the host's mounts: %w", err)
	}
	var points []string
	for _, m := range mounts {
		points = append(points, m.Mountpoint)
	}
	return points, nil
}

// CheckOnHost says why the cache disk id cannot be read at the host's target, or
// nil if it can.
func CheckOnHost(hostRoot, target string, id digest.Digest) error {
	if err := Probe(HostPath(hostRoot, target)); err != nil {
		return err
	}
	got, err := manifest.ReadID(HostPath(hostRoot, target))
	if err != nil {
		return err
	}
	if got != id {
		return fmt.Errorf("%s holds cache %s, not %s", target, got, id)
	}
	return nil
}

// inHost calls f in the mount namespace of the host's process 1. Only f's own
// system calls happen there.
func inHost(hostRoot string, f func() error) error {
	return onOwnThread(func() error {
		ns := filepath.Join(hostRoot, "proc/1/ns/mnt")
		fd, err := unix.Open(ns, unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			return fmt.Errorf("opening %s: %w", ns, err)
		}
		defer unix.Close(fd)
		// setns refuses a thread that shares its working directory with others.
		if err := unix.Unshare(unix.CLONE_FS); err != nil {
			return fmt.Errorf("unshare: %w", err)
		}
		if err := unix.Setns(fd, unix.CLONE_NEWNS); err != nil {
			return fmt.Errorf("setns: %w", err)
		}
		return f()
	})
}

// onOwnThread calls f on a thread that no other goroutine ever runs on, before or after
// it in f's namespaces, and that is not the process's first. That one's namespaces count
// as the process's: a command that kubectl exec runs in the agent's container joins
// them. Nor does Go end it with its goroutine.
func onOwnThread(f func() error) error {
	done := make(chan error, 1)
	go func() {
		// Never unlocked, a thread ends with its goroutine.
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			// Kept by this goroutine, it is not the next one's.
			defer runtime.UnlockOSThread()
			done <- onOwnThread(f)
			return
		}
		done <- f()
	}()
	return <-done
}

// Explain adds the remedy to the errors that a wrong set-up gives to whom it reaches
// for the host's files and mounts.
func Explain(err error) error {
	switch {
	case errors.Is(err, unix.ENOSYS):
		return fmt.Errorf("%w: the kernel is too old; Linux 5.12 or newer is needed", err)
	case errors.Is(err, unix.EPERM), errors.Is(err, unix.EACCES):
		return fmt.Errorf("%w: run as root, in a container with CAP_SYS_ADMIN, CAP_SYS_CHROOT and CAP_SYS_PTRACE", err)
	case errors.Is(err, unix.ENOENT):
		return fmt.Errorf("%w: run in the host's PID namespace, or mount the host's root, with what is mounted below it, and name it with --host-root", err)
	}
	return err
}
