//go:build e2e

package hostile_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/selkies-project/packer-plugin-selkies/e2e/host"
)

// trace is a run of the injector and all that it did with paths.
type trace struct {
	stdout, stderr string
	status         int
	took           time.Duration
	memory         int64 // the most that was resident, in bytes
	accesses       []access
}

// access is one system call with a path, and where the kernel came out.
type access struct {
	call, path string
	write      bool
}

func (a access) String() string { return fmt.Sprintf("%s (%s)", a.path, a.call) }

// tracing is a run of the injector under strace that has not ended.
type tracing struct {
	args           []string
	cmd            *exec.Cmd
	cancel         context.CancelFunc
	dir            string // of strace's files
	stdout, stderr *host.Said
	start          time.Time
}

// runTraced runs the injector on the node under strace.
func runTraced(t *testing.T, args ...string) trace {
	t.Helper()
	return startTraced(t, args...).end(t)
}

func startTraced(t *testing.T, args ...string) *tracing {
	t.Helper()
	dir := t.TempDir()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	inner := world.node.Command(ctx, injector, args...)
	// A file for each thread, so that no call is split by another's.
	cmd := exec.CommandContext(ctx, "strace", append([]string{"-ff", "-qq", "-y", "-s", "4096", "--seccomp-bpf",
		"-e", "trace=%file", "-o", filepath.Join(dir, "trace"), "--"}, inner.Args...)...)
	cmd.Env = inner.Env
	tr := &tracing{args: args, cmd: cmd, cancel: cancel, dir: dir, stdout: &host.Said{}, stderr: &host.Said{}}
	cmd.Stdout, cmd.Stderr = tr.stdout, tr.stderr
	if err := host.ResetPeak(); err != nil {
		t.Fatal(err)
	}
	tr.start = time.Now()
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	return tr
}

// waitSaid waits until the run has said something with every one of words on standard error.
func (run *tracing) waitSaid(t *testing.T, words ...string) {
	t.Helper()
	for end := time.Now().Add(maxTime); ; time.Sleep(50 * time.Millisecond) {
		said := run.stderr.String()
		if !slices.ContainsFunc(words, func(w string) bool { return !strings.Contains(said, w) }) {
			return
		}
		if time.Now().After(end) {
			t.Errorf("it does not say %q: %s", words, said)
			return
		}
	}
}

func (run *tracing) end(t *testing.T) trace {
	t.Helper()
	defer run.cancel()
	if err := run.cmd.Wait(); err != nil && !errors.As(err, new(*exec.ExitError)) {
		t.Fatal(err)
	}
	tr := trace{
		stdout: run.stdout.String(), stderr: run.stderr.String(), status: run.cmd.ProcessState.ExitCode(), took: time.Since(run.start),
		memory: run.cmd.ProcessState.SysUsage().(*syscall.Rusage).Maxrss << 10,
	}
	files, err := filepath.Glob(filepath.Join(run.dir, "trace.*"))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		text, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		lines := strings.FieldsFunc(string(text), func(r rune) bool { return r == '\n' })
		for _, line := range injectorsOwn(lines) {
			tr.accesses = append(tr.accesses, parse(t, line)...)
		}
	}
	// The tracer sees what a run cannot do without.
	if sees := func(a access) bool {
		return a.path == cacheDir || a.path == leads(0) || run.args[0] == "eject" || run.args[0] == "status"
	}; !slices.ContainsFunc(tr.accesses, sees) {
		t.Fatalf("of %d accesses none is of %s; the injector says %s", len(tr.accesses), cacheDir, tr.stderr)
	}
	return tr
}

// injectorsOwn leaves out what nsenter did on the way: all of its first process, and in
// the one that it forked what was before the injector.
func injectorsOwn(lines []string) []string {
	if slices.ContainsFunc(lines, func(line string) bool {
		return strings.HasPrefix(line, `execve("`) && strings.Contains(line, `["nsenter"`)
	}) {
		return nil
	}
	i := slices.IndexFunc(lines, func(line string) bool { return strings.HasPrefix(line, `execve("`+injector+`"`) })
	return lines[i+1:]
}

var (
	callLine = regexp.MustCompile(`^(\w+)\((.*)\) += (-?[0-9]+|\?)(?:<(.*)>)?`)
	// pathArg is a path, with the directory that it is relative to.
	pathArg = regexp.MustCompile(`(?:(?:AT_FDCWD|[0-9]+)<((?:[^>\\]|\\.)*)>, )?"((?:[^"\\]|\\.)*)"`)
	writing = regexp.MustCompile(`O_WRONLY|O_RDWR|O_CREAT|O_TRUNC|^(mkdir|unlink|rmdir|rename|symlink|link|mknod|chmod|chown|fchmodat|fchownat|truncate|utime|mount|umount|move_mount|setxattr|removexattr)`)
)

// parse resolves the paths of one call, as the kernel did. Calls that it may not have
// followed anywhere (openat2 with RESOLVE_BENEATH or RESOLVE_IN_ROOT) count only if they
// came out somewhere.
func parse(t *testing.T, line string) []access {
	t.Helper()
	m := callLine.FindStringSubmatch(line)
	if m == nil {
		if strings.HasPrefix(line, "+++") || strings.HasPrefix(line, "---") || strings.Contains(line, "<unfinished ...>") || strings.Contains(line, "<detached ...>") || strings.Contains(line, "resumed>") || strings.HasPrefix(line, "exit") {
			return nil
		}
		t.Fatalf("strace said %q", line)
	}
	name, args, status, opened := m[1], m[2], m[3], m[4]
	write := writing.MatchString(name + "(" + args)
	if opened != "" && strings.HasPrefix(name, "open") {
		return []access{{name, unquote(opened), write}}
	}
	if name == "openat2" && (strings.Contains(args, "RESOLVE_BENEATH") || strings.Contains(args, "RESOLVE_IN_ROOT")) && strings.HasPrefix(status, "-") {
		return nil
	}
	paths := pathArg.FindAllStringSubmatch(args, -1)
	switch {
	case strings.HasPrefix(name, "symlink"):
		paths = paths[1:] // the first is what it leads to
	case strings.HasPrefix(name, "rename"), strings.HasPrefix(name, "link"), name == "move_mount":
	default:
		paths = paths[:min(1, len(paths))]
	}
	noFollow := strings.Contains(args, "NOFOLLOW") || regexp.MustCompile(`^(l|readlink|unlink|rmdir|rename|symlink|mkdir|mknod|link)`).MatchString(name)
	var accesses []access
	for _, p := range paths {
		path := unquote(p[2])
		if path == "" {
			continue // what was opened before
		}
		if !filepath.IsAbs(path) {
			path = filepath.Join("/", unquote(p[1]), path)
		}
		accesses = append(accesses, access{name, resolve(path, !noFollow, 0), write})
	}
	return accesses
}

// resolve follows the node's symbolic links.
func resolve(path string, last bool, depth int) string {
	at := "/"
	elements := strings.Split(strings.Trim(path, "/"), "/")
	for i, e := range elements {
		switch e {
		case "", ".":
			continue
		case "..":
			at = filepath.Dir(at)
			continue
		}
		next := filepath.Join(at, e)
		if e == "root" && filepath.Dir(at) == "/proc" {
			at = "/" // the machine has one root
			continue
		}
		target, err := os.Readlink(world.node.Path(next))
		if err != nil || strings.HasPrefix(next, "/proc/") || i == len(elements)-1 && !last || depth > 40 {
			at = next
			continue
		}
		if !filepath.IsAbs(target) {
			target = at + "/" + target // not joined: links in at are followed before ..
		}
		return resolve(target+"/"+strings.Join(elements[i+1:], "/"), last, depth+1)
	}
	return at
}

// unquote takes back strace's escapes.
func unquote(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		if s[i] != '\\' || i+1 == len(s) {
			b.WriteByte(s[i])
			continue
		}
		i++
		if at := strings.IndexByte("ntrfv", s[i]); at >= 0 {
			b.WriteByte("\n\t\r\f\v"[at])
			continue
		}
		end := i
		for end < len(s) && end < i+3 && s[end] >= '0' && s[end] <= '7' {
			end++
		}
		if n, err := strconv.ParseUint(s[i:end], 8, 8); err == nil {
			b.WriteByte(byte(n))
			i = end - 1
			continue
		}
		b.WriteByte(s[i])
	}
	return b.String()
}

// below says if path is dir or in it.
func below(path string, dirs ...string) bool {
	return slices.ContainsFunc(dirs, func(dir string) bool { return path == dir || strings.HasPrefix(path, dir+"/") })
}

var (
	// mayRead are the directories of the injector: its own, the disks, the runtimes', and
	// what every Go program reads.
	mayRead = []string{filepath.Dir(cacheDir), "/run", "/proc", "/sys", "/var/lib/containerd", "/var/lib/docker", "/var/lib/selkies-image-cache",
		injector, "/etc/docker", "/etc/localtime", "/usr/share/zoneinfo", "/dev/null"}
	// mayWrite are those of a run that registers something, mayLock that of one that is
	// refused.
	mayWrite = []string{"/run/selkies-image-injector", "/var/lib/containerd", "/var/lib/docker", "/var/lib/selkies-image-cache"}
	mayLock  = []string{"/run/selkies-image-injector"}
)

// checkAccesses finds what is read or written where it may not be.
func (tr trace) checkAccesses(t *testing.T, write []string) {
	t.Helper()
	for _, stray := range strays(tr.accesses, write) {
		t.Error(stray)
	}
}

func strays(accesses []access, write []string) (found []string) {
	for _, a := range accesses {
		// On the way to one of them, too.
		above := slices.ContainsFunc(mayRead, func(dir string) bool { return a.path == "/" || below(dir, a.path) })
		if strings.HasPrefix(a.path, "mnt:[") {
			continue // the host's mount namespace, from /proc
		}
		if !above && !below(a.path, mayRead...) || below(a.path, inside.run, inside.docker, inside.containerd, inside.proc) {
			found = append(found, fmt.Sprintf("looked at %s", a))
		}
		if a.write && !below(a.path, write...) {
			found = append(found, fmt.Sprintf("wrote to %s", a))
		}
	}
	return found
}
