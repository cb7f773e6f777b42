//go:build e2e

// Package walk_test is a newcomer: on a new Debian 12 machine that has nothing but what
// Debian cannot do without, it types what the README's section "Try it" says, line by line,
// and fails at the first line that does.
//
// The machine has the host's kernel, network, certificates and proxies. The clone is of
// HEAD, not of the project's site. What is expensive to make is shared with the host, unless
// -cold leaves it out; then the machine is a stranger's, and needs hours. In the place of
// `make test` comes `make test-unit`, unless -full is given.
package walk_test

import (
	"flag"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/selkies-project/packer-plugin-selkies/e2e/host"
	"github.com/selkies-project/packer-plugin-selkies/e2e/machine"
)

var (
	cold = flag.Bool("cold", false, "share nothing with the host: download and build all")
	full = flag.Bool("full", false, "make test as well")
)

func TestWalk(t *testing.T) {
	m, env := newcomer(t), environment(t)
	dir := "/root"
	for _, command := range commands(t) {
		ok := t.Run(command, func(t *testing.T) { dir = typed(t, m, env, dir, command) })
		if !ok {
			return
		}
	}
}

// commands are the lines of that section's block, without comments.
func commands(t *testing.T) []string {
	readme, err := os.ReadFile("../../README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, _ := strings.Cut(string(readme), "\n## Try it\n")
	var all []string
	for line := range strings.Lines(section) {
		command, ok := strings.CutPrefix(line, "    ")
		if !ok && len(all) > 0 {
			break
		}
		command, _, _ = strings.Cut(command, "#")
		if command = strings.TrimSpace(command); ok {
			all = append(all, command)
		}
	}
	test := slices.Index(all, "make test")
	if test < 0 || !slices.Contains(all, "make demo") {
		t.Fatalf("found only %q in README.md", all)
	}
	if !*full {
		all[test] = "make test-unit"
	}
	if *cold {
		// Otherwise it would take away what is the host's.
		all = append(all, "make demo-clean")
	}
	return all
}

// newcomer is a machine that has just been installed.
func newcomer(t *testing.T) *machine.Machine {
	t.Helper()
	top, err := host.Cache("walk")
	if err != nil {
		t.Fatal(err)
	}
	lock, err := host.Lock(filepath.Join(top, ".lock"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { lock.Close() })
	// What a walk that was killed has left is bound by no machine any more.
	if err := machine.Reap(); err != nil {
		t.Fatal(err)
	}
	run := filepath.Join(top, "run")
	if err := os.RemoveAll(run); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(run); err != nil {
			t.Error(err)
		}
	})

	// The machines of this machine have overlays, which cannot lie on its own.
	binds := map[string]string{"/root": filepath.Join(run, "root"), "/tmp": filepath.Join(run, "tmp")}
	if !*cold {
		maps.Copy(binds, shared(t))
	}
	for _, dir := range binds {
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Chmod(binds["/tmp"], 0o777|os.ModeSticky); err != nil {
		t.Fatal(err)
	}
	const source = "/srv/source.git"
	binds[source] = filepath.Join(run, "source.git")
	output(t, "git", "clone", "--quiet", "--bare", strings.TrimSpace(output(t, "git", "rev-parse", "--show-toplevel")), binds[source])

	m := machine.New(t, machine.Config{
		Name:     "newcomer",
		Packages: []string{},
		Binds:    binds,
		Files:    files(t, source),
	})
	// systemd-nspawn leaves out what a machine of one's own has.
	for _, command := range []string{
		"mknod /dev/loop-control c 10 237; for n in $(seq 0 255); do mknod /dev/loop$n b 7 $n; done",
		"mknod /dev/fuse c 10 229", // for nbdfuse
		"mount -o remount,bind,rw /proc/sys",
		"mount -o remount,bind,rw /sys",
	} {
		m.Output(t, "sh", "-ec", command)
	}
	return m
}

// shared are the host's folders that save the machine from making the same again: modules,
// what Go has compiled, tools, Debian roots and the demo's images.
func shared(t *testing.T) map[string]string {
	t.Helper()
	binds := map[string]string{
		"/root/go/pkg/mod":      strings.TrimSpace(output(t, "go", "env", "GOMODCACHE")),
		"/root/.cache/go-build": strings.TrimSpace(output(t, "go", "env", "GOCACHE")),
	}
	for _, name := range []string{"tools", "roots", "demo"} {
		dir, err := host.Cache(name)
		if err != nil {
			t.Fatal(err)
		}
		binds["/root/.cache/packer-plugin-selkies/"+name] = dir
	}
	return binds
}

// files are what the host's network needs, and what leads to the clone's source.
func files(t *testing.T, source string) map[string]string {
	t.Helper()
	all := map[string]string{
		"/etc/gitconfig": "[url \"" + source + "\"]\n\tinsteadOf = https://github.com/selkies-project/packer-plugin-selkies\n",
	}
	// Debian's package ca-certificates takes up those of the last folder.
	names, err := filepath.Glob("/usr/local/share/ca-certificates/*.crt")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range append(names, "/etc/resolv.conf") {
		data, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		all[name] = string(data)
	}
	return all
}

// environment is the host's as far as downloads go: proxies, and whom Go asks for modules.
func environment(t *testing.T) []string {
	t.Helper()
	var env []string
	for _, name := range []string{"http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"} {
		if value, ok := os.LookupEnv(name); ok {
			env = append(env, name+"="+value)
		}
	}
	for _, name := range []string{"GOPROXY", "GOSUMDB", "GONOSUMDB", "GONOPROXY", "GOPRIVATE", "GOINSECURE"} {
		if value := strings.TrimSpace(output(t, "go", "env", name)); value != "" {
			env = append(env, name+"="+value)
		}
	}
	return env
}

// typed runs a line in a shell in dir, shows what it prints, and returns where it leaves
// the user.
func typed(t *testing.T, m *machine.Machine, env []string, dir, command string) string {
	t.Helper()
	const left = "/run/walk-dir"
	cmd := m.Command(t.Context(), "bash", "-c", `cd "$0" && eval "$1" && pwd >"$2"`, dir, command, left)
	cmd.Env = append(cmd.Env, env...)
	cmd.Stdout, cmd.Stderr = os.Stdout, os.Stderr
	if err := cmd.Run(); err != nil {
		t.Fatalf("%s: %v", command, err)
	}
	data, err := os.ReadFile(m.Path(left))
	if err != nil {
		t.Fatal(err)
	}
	return strings.TrimSpace(string(data))
}

// output is what a program of the host prints.
func output(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := host.Output(exec.CommandContext(t.Context(), name, args...))
	if err != nil {
		t.Fatal(err)
	}
	return out
}
