package imagecache

import (
	"context"
	"fmt"
	"path"
	"regexp"
	"strconv"
	"strings"
)

// mount is one mount of the build VM.
type mount struct {
	major, minor int
	// root is what of its file system the mount shows, "/" for all of it.
	root   string
	point  string
	source string
}

// mountTable reads the VM's mounts in the kernel's own format.
func mountTable(ctx context.Context, r *vm) ([]*mount, error) {
	out, err := r.run(ctx, "cat", "/proc/self/mountinfo")
	if err != nil {
		return nil, fmt.Errorf("reading the build VM's mounts: %w", err)
	}
	mounts, err := parseMounts(string(out))
	if err != nil {
		return nil, fmt.Errorf("reading the build VM's mounts: %w", err)
	}
	return mounts, nil
}

// parseMounts reads the format of proc_pid_mountinfo(5). Libraries do so on Linux
// only, and the Packer host may run another system.
func parseMounts(table string) ([]*mount, error) {
	var mounts []*mount
	for line := range strings.Lines(table) {
		before, after, ok := strings.Cut(strings.TrimSuffix(line, "\n"), " - ")
		fields, rest := strings.Split(before, " "), strings.Split(after, " ")
		if !ok || len(fields) < 6 || len(rest) < 2 {
			return nil, fmt.Errorf("%q is no line of /proc/self/mountinfo", line)
		}
		m := &mount{root: unescape(fields[3]), point: unescape(fields[4]), source: unescape(rest[1])}
		if _, err := fmt.Sscanf(fields[2], "%d:%d", &m.major, &m.minor); err != nil {
			return nil, fmt.Errorf("%q is no line of /proc/self/mountinfo: %w", line, err)
		}
		mounts = append(mounts, m)
	}
	return mounts, nil
}

var octal = regexp.MustCompile(`\\[0-7]{3}`)

// unescape undoes how the kernel writes blanks and backslashes.
func unescape(s string) string {
	return octal.ReplaceAllStringFunc(s, func(e string) string {
		n, _ := strconv.ParseUint(e[1:], 8, 8)
		return string([]byte{byte(n)})
	})
}

// storeDisk finds the disk that holds a daemon's data root among the VM's mounts:
// where its root is on the VM, and the data root relative to that. Nodes mount the
// whole disk, so that a mount of a part of it, such as a bind mount, is not enough.
func storeDisk(mounts []*mount, dataRoot string) (root, rel string, err error) {
	dataRoot = path.Clean(dataRoot)
	// Later mounts cover earlier ones on the same mount point.
	at := map[string]*mount{}
	for _, m := range mounts {
		at[m.point] = m
	}
	dir := dataRoot
	for at[dir] == nil && dir != "/" {
		dir = path.Dir(dir)
	}
	holder := at[dir]
	if holder == nil {
		return "", "", fmt.Errorf("finding the disk of Docker's data root %s: no mount holds it", dataRoot)
	}
	// dockerd may bind its data root to itself, and systems their /var.
	rel = strings.TrimPrefix(path.Join(holder.root, strings.TrimPrefix(dataRoot, holder.point)), "/")
	if rel == "" {
		return "", "", fmt.Errorf("docker's data root %s on the build VM is a disk of its own, with no room for a layer manifest beside it; use disk { ... } for that disk", dataRoot)
	}
	for _, m := range mounts {
		if m.root == "/" && m.major == holder.major && m.minor == holder.minor && at[m.point] == m {
			return m.point, rel, nil
		}
	}
	return "", "", fmt.Errorf("docker's data root %s on the build VM lies on the mount %s, which shows only %s of its file system; mount all of %s somewhere there, or use disk { ... }", dataRoot, holder.point, holder.root, holder.source)
}
