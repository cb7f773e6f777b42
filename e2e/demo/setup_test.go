//go:build e2e

package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// TestSetup runs e2e/setup.sh on hosts that it cannot serve: it says so in one line and
// installs nothing.
func TestSetup(t *testing.T) {
	fake := t.TempDir()
	if err := os.Chmod(fake, 0o755); err != nil {
		t.Fatal(err)
	}
	write := func(name, contents string) {
		t.Helper()
		if err := os.WriteFile(filepath.Join(fake, name), []byte(contents), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	write("arch", "ID=arch\nPRETTY_NAME=\"Arch Linux\"\n")
	write("trixie", "ID=debian\nVERSION_ID=\"13\"\nPRETTY_NAME=\"Debian GNU/Linux 13 (trixie)\"\n")
	write("uname", "#!/bin/sh\n[ \"$1\" = \"$FAKE\" ] && echo other || exec /bin/uname \"$@\"\n")
	// The mounts end with the namespace.
	unshared := func(prepare string) []string {
		return []string{"unshare", "--mount", "sh", "-ec", prepare + "\nexec sh -s"}
	}
	for _, tt := range []struct {
		name    string
		command []string
		env     string
		want    string
	}{
		{"not Linux", []string{"sh", "-s"}, "FAKE=-s", "needs Linux"},
		{"another processor", []string{"sh", "-s"}, "FAKE=-m", "needs an x86-64 machine, not other"},
		{"another distribution", unshared("mount --bind " + fake + "/arch /etc/os-release"), "", "needs Debian 12, not Arch Linux"},
		{"another release", unshared("mount --bind " + fake + "/trixie /etc/os-release"), "", "needs Debian 12, not Debian GNU/Linux 13"},
		{"no distribution", unshared("mount -t tmpfs tmpfs /etc"), "", "needs Debian 12, not a system without /etc/os-release"},
		{"not root", []string{"setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "sh", "-s"}, "", "run it as root"},
		{"no loop devices", unshared("mount -t tmpfs tmpfs /dev\nmknod -m 666 /dev/null c 1 3"), "", "loop devices"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			script, err := os.Open("../setup.sh")
			if err != nil {
				t.Fatal(err)
			}
			defer script.Close()
			cmd := exec.CommandContext(t.Context(), tt.command[0], tt.command[1:]...)
			cmd.Env = append(os.Environ(), "PATH="+fake+":"+os.Getenv("PATH"), tt.env)
			cmd.Stdin = script
			var stdout, stderr strings.Builder
			cmd.Stdout, cmd.Stderr = &stdout, &stderr
			if err := cmd.Run(); cmd.ProcessState.ExitCode() != 1 {
				t.Errorf("%v, want exit status 1", err)
			}
			if !strings.Contains(stderr.String(), tt.want) || strings.Count(stderr.String(), "\n") != 1 || stdout.Len() > 0 {
				t.Errorf("it said %q and on stdout %q, want one line with %q", &stderr, &stdout, tt.want)
			}
		})
	}
}

// TestSetupByMake has make say it, in one line too.
func TestSetupByMake(t *testing.T) {
	fake := t.TempDir()
	if err := os.WriteFile(filepath.Join(fake, "uname"), []byte("#!/bin/sh\necho other\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), "make", "-C", "../..", "--no-print-directory", "demo")
	cmd.Env = append(os.Environ(), "PATH="+fake+":"+os.Getenv("PATH"))
	out, err := cmd.CombinedOutput()
	if err == nil || !strings.Contains(string(out), "needs Linux") || strings.Count(string(out), "\n") != 1 {
		t.Errorf("make demo said %q (%v), want one line", out, err)
	}
}
