package machine

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// cgroupRoots are the mounted hierarchies: one with version 2 alone, one for each
// controller, and perhaps "unified", with version 1.
func cgroupRoots() ([]string, error) {
	const top = "/sys/fs/cgroup"
	var st unix.Statfs_t
	if err := unix.Statfs(top, &st); err != nil {
		return nil, fmt.Errorf("looking at %s: %w", top, err)
	}
	if st.Type == unix.CGROUP2_SUPER_MAGIC {
		return []string{top}, nil
	}
	all, err := filepath.Glob(top + "/*")
	return slices.DeleteFunc(all, func(dir string) bool {
		// Symbolic links stand for controllers that are mounted together.
		fi, err := os.Lstat(dir)
		return err != nil || !fi.IsDir()
	}), err
}

// makeCgroups makes a cgroup named id in every hierarchy.
func makeCgroups(id string) ([]string, error) {
	roots, err := cgroupRoots()
	if err != nil {
		return nil, err
	}
	var dirs []string
	for _, root := range roots {
		dir := filepath.Join(root, id)
		if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			return nil, err
		}
		// Version 1's cpuset takes no process before these are set.
		for _, f := range []string{"cpuset.cpus", "cpuset.mems"} {
			data, err := os.ReadFile(filepath.Join(root, f))
			if errors.Is(err, fs.ErrNotExist) {
				continue
			}
			if err == nil {
				err = os.WriteFile(filepath.Join(dir, f), data, 0o644)
			}
			if err != nil {
				return nil, err
			}
		}
		dirs = append(dirs, dir)
	}
	return dirs, nil
}

// removeCgroups removes the cgroups named id with all below them, and kills what is
// in them: a machine outlives an nspawn that was killed.
func removeCgroups(id string) error {
	roots, err := cgroupRoots()
	if err != nil {
		return err
	}
	deadline := time.Now().Add(20 * time.Second)
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for _, root := range roots {
		for {
			err := removeCgroup(filepath.Join(root, id))
			if err == nil {
				break
			}
			if !errors.Is(err, unix.EBUSY) || time.Now().After(deadline) {
				return err
			}
			if err := killCgroup(filepath.Join(root, id)); err != nil {
				return err
			}
			<-tick.C
		}
	}
	return nil
}

// killCgroup kills the processes of a cgroup and of those below it.
func killCgroup(dir string) error {
	return filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.Name() == "cgroup.procs" {
			var data []byte
			data, err = os.ReadFile(path)
			for _, field := range strings.Fields(string(data)) {
				// 0 is a process of another PID namespace, and kill's word for one's own group.
				if pid, _ := strconv.Atoi(field); pid > 0 {
					_ = unix.Kill(pid, unix.SIGKILL)
				}
			}
		}
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return err
	})
}

func removeCgroup(dir string) error {
	var dirs []string
	err := filepath.WalkDir(dir, func(path string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		if err == nil && d.IsDir() {
			dirs = append(dirs, path)
		}
		return err
	})
	if err != nil {
		return err
	}
	for _, d := range slices.Backward(dirs) {
		if err := unix.Rmdir(d); err != nil && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("removing cgroup %s: %w", d, err)
		}
	}
	return nil
}
