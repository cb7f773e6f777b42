package docker

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"github.com/selkies-project/packer-plugin-selkies/injector/cachedisk"
)

// configFile is what dockerd reads unless --config-file names another.
const configFile = "/etc/docker/daemon.json"

// checkUnused refuses a store that a dockerd may have open, though none answers at
// address: it would write back what it has in memory over ours.
func (s store) checkUnused(address string) error {
	pid, root, err := s.user()
	switch {
	case root != "":
		return fmt.Errorf("dockerd runs as process %d on data root %s but does not answer at %s; name its address with --docker-host, or stop it",
			pid, root, address)
	case err != nil:
		return fmt.Errorf("dockerd runs as process %d, does not answer at %s and may use %s: %w; name its address with --docker-host, or stop it",
			pid, address, s.root, err)
	}
	return nil
}

// checkStill refuses a store that stood still, if a dockerd has been started on it
// since. One of which nothing can be told has been judged before, by checkUnused, or
// ran beside the one that was stopped.
func (s store) checkStill() error {
	if pid, root, _ := s.user(); root != "" {
		return fmt.Errorf("dockerd was started on data root %s, as process %d, while images were being registered there; run inject again", root, pid)
	}
	return nil
}

// user is a dockerd that has the store open, and its data root as it names it; "" if
// there is none. The error is that of a process of which it cannot be told. It looks at
// every process of the host, since a PID file and a unit are there for one daemon only.
func (s store) user() (pid int, root string, err error) {
	procs, err := filepath.Glob(filepath.Join(s.hostRoot, "proc/[0-9]*"))
	if err != nil {
		return 0, "", err
	}
	var unclear error
	doubtful := 0
	for _, proc := range procs {
		comm, err := readTrimmed(filepath.Join(proc, "comm"))
		if err != nil || comm != "dockerd" {
			continue // or it has just ended
		}
		pid, err := strconv.Atoi(filepath.Base(proc))
		if err != nil {
			continue
		}
		root, err := s.usedBy(proc)
		if _, ended := os.Stat(proc); errors.Is(ended, fs.ErrNotExist) {
			continue
		}
		if root != "" {
			return pid, root, nil
		}
		if errors.Is(err, fs.ErrPermission) {
			err = cachedisk.Explain(err)
		}
		if err != nil {
			doubtful, unclear = pid, err
		}
	}
	return doubtful, "", unclear
}

// usedBy is the data root of the dockerd whose directory in /proc is given, if it is
// this store's, and "" if it is another. An error means that it cannot be told.
func (s store) usedBy(proc string) (root string, err error) {
	// A rootless daemon has a data root of its user's; this process is root's.
	fi, err := os.Stat(proc)
	if err != nil {
		return "", err
	}
	if st, ok := fi.Sys().(*syscall.Stat_t); ok && int(st.Uid) != os.Geteuid() {
		return "", nil
	}
	if root, err = dataRoot(proc); err != nil {
		return "", err
	}
	theirs, err := os.Stat(asProcess(proc, root))
	if err != nil {
		return "", err
	}
	ours, err := os.Stat(s.host(s.root))
	if errors.Is(err, fs.ErrNotExist) {
		return "", nil
	}
	if err != nil {
		return "", err
	}
	// The same path in a container with a Docker of its own is another directory.
	if os.SameFile(theirs, ours) {
		return root, nil
	}
	return "", nil
}

// dataRoot is the data root of a dockerd, as that process names it: what its command
// line says, or its configuration file, or the default. dockerd refuses to start
// where the first two differ.
func dataRoot(proc string) (string, error) {
	b, err := os.ReadFile(filepath.Join(proc, "cmdline"))
	if err != nil {
		return "", err
	}
	args := strings.Split(strings.TrimRight(string(b), "\x00"), "\x00")
	// --graph is the name of --data-root before Docker 23.
	if root := option(args, "--data-root", "--graph", "-g"); root != "" {
		return root, nil
	}
	name := option(args, "--config-file")
	named := name != ""
	if !named {
		name = configFile
	}
	b, err = os.ReadFile(asProcess(proc, name))
	if errors.Is(err, fs.ErrNotExist) && !named {
		return DefaultRoot, nil
	}
	if err != nil {
		return "", err
	}
	var config struct {
		DataRoot string `json:"data-root"`
		Graph    string `json:"graph"`
	}
	if len(b) > 0 {
		if err := json.Unmarshal(b, &config); err != nil {
			return "", fmt.Errorf("reading %s: %w", name, err)
		}
	}
	for _, root := range []string{config.DataRoot, config.Graph} {
		if root != "" {
			return root, nil
		}
	}
	return DefaultRoot, nil
}

// option is the value of the last option of any of the names on a command line, ""
// if there is none: "--name value" or "--name=value", of a short one "-nvalue" too.
func option(args []string, names ...string) string {
	value := ""
	for i, arg := range args {
		for _, name := range names {
			switch rest, ok := strings.CutPrefix(arg, name); {
			case !ok:
			case strings.HasPrefix(rest, "="):
				value = rest[1:]
			case rest == "" && i+1 < len(args):
				value = args[i+1]
			case len(name) == 2:
				value = rest
			}
		}
	}
	return value
}

// asProcess is the path of a file that a process names.
func asProcess(proc, name string) string {
	if filepath.IsAbs(name) {
		return filepath.Join(proc, "root", name)
	}
	return filepath.Join(proc, "cwd", name)
}
