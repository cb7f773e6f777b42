//go:build e2e

package provisioner_test

import (
	"bytes"
	"encoding/base64"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"golang.org/x/sys/unix"

	"github.com/selkies-project/packer-plugin-selkies/e2e/buildvm"
	"github.com/selkies-project/packer-plugin-selkies/e2e/registry"
)

// TestCredentials pulls with a password, an identity token that is another each time, and
// the tokens that a registry gives for them, wherever the Packer host has them from. It
// looks for them, in plain and in the forms in which they travel, wherever they must not
// be; and for the key that Packer logs in with.
func TestCredentials(t *testing.T) {
	t.Parallel()
	v := debian(t)
	const user, password = "robot", "correct-horse-battery-staple-7391"
	reg := registry.New(t, registry.Config{Username: user, Password: password})
	tokens := registry.New(t, registry.Config{Username: user, Password: password, Tokens: true})
	img := newImage(t, layer(t, map[string]int{"large": 8 << 20}))
	push := func(reg *registry.Registry) (ref string) {
		ref = reg.Addr + "/app:1"
		if err := remote.Write(parse(t, ref), img, remote.WithAuth(&authn.Basic{Username: user, Password: password})); err != nil {
			t.Fatal(err)
		}
		return ref
	}
	ref, tokensRef := push(reg), push(tokens)
	needles := [][]byte{
		[]byte(password),
		[]byte(base64.StdEncoding.EncodeToString([]byte(user + ":" + password))),
		// In the header's JSON the password begins at any of three offsets.
		inBase64(password, 0), inBase64(password, 1), inBase64(password, 2),
	}
	needles = append(needles, privateLines(t, v.SSHKey)...)
	option := registryAuth(reg.Addr, user, password)
	for _, tt := range []struct {
		name    string
		ref     string
		options []string
		env     []string
	}{
		{"registry_auth", ref, []string{option, "verify = true"}, nil},
		{"docker login, tokens", tokensRef, []string{"keep_blobs = true"}, dockerConfig(t, tokens.Addr, user, password)},
		{"credential helper", ref, []string{"keep_blobs = true"}, credentialHelper(t, `{"credHelpers": {"`+reg.Addr+`": "e2e"}}`, reg.Addr, user, password)},
		// $$ is the helper's process ID.
		{"identity token, another each time", tokensRef, []string{"keep_blobs = true"},
			credentialHelper(t, `{"credHelpers": {"`+tokens.Addr+`": "e2e"}}`, tokens.Addr, "<token>", password+"-'$$'")},
	} {
		t.Run(tt.name, func(t *testing.T) {
			d := newDisk(t, v, 128)
			cmd := v.PackerBuild(t, append(tt.options, buildvm.Images(tt.ref), d.Block())...)
			cmd.Env = append(append(cmd.Env, "PACKER_LOG=1"), tt.env...)
			before := len(tokens.Tokens())
			buildSecretly(t, v, d, cmd, append(needles, []byte(registry.TokenPrefix)))
			if got := len(tokens.Tokens()) > before; got != (tt.ref == tokensRef) {
				t.Errorf("the registry gave a token: %t", got)
			}
		})
	}

	d := newDisk(t, v, 64)
	t.Run("wrong password", func(t *testing.T) {
		out, err := v.Build(t, buildvm.Images(ref), d.Block(), strings.Replace(option, password, password+"-wrong", 1))
		if err == nil || !strings.Contains(out, "set registry_auth") {
			t.Errorf("packer build: %v\n%s", err, out)
		}
		find(t, needles[:1], "the error", []byte(out))
	})
}

// registryAuth is a registry_auth block.
func registryAuth(server, user, password string) string {
	return fmt.Sprintf("registry_auth {\n server = %q\n username = %q\n password = %q\n}\n", server, user, password)
}

// dockerConfig is the environment of a user who has logged in to a registry.
func dockerConfig(t *testing.T, server, user, password string) []string {
	t.Helper()
	auth := base64.StdEncoding.EncodeToString([]byte(user + ":" + password))
	return writeDockerConfig(t, t.TempDir(), fmt.Sprintf(`{"auths": {%q: {"auth": %q}}}`, server, auth))
}

// credentialHelper is the environment of a user whose Docker configuration names the
// credential helper e2e, which knows one server.
func credentialHelper(t *testing.T, config, server, user, password string) []string {
	t.Helper()
	dir := t.TempDir()
	script := fmt.Sprintf(`#!/bin/sh
read -r server
if [ "$1 $server" != "get %s" ]; then
	echo credentials not found in native keychain
	exit 1
fi
echo '{"ServerURL": "%[1]s", "Username": "%s", "Secret": "%s"}'
`, server, user, password)
	if err := os.WriteFile(filepath.Join(dir, "docker-credential-e2e"), []byte(script), 0o700); err != nil {
		t.Fatal(err)
	}
	return append(writeDockerConfig(t, dir, config), "PATH="+dir+":"+os.Getenv("PATH"))
}

func writeDockerConfig(t *testing.T, dir, config string) []string {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, "config.json"), []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	return []string{"DOCKER_CONFIG=" + dir}
}

// buildSecretly runs a build and fails the test if any of needles is found on the VM, on
// the disk or in what Packer says.
func buildSecretly(t *testing.T, v *vm, d *buildvm.Disk, cmd *exec.Cmd, needles [][]byte) {
	t.Helper()
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	samples, plugins := 0, map[int]*pluginProcess{}
	for ; ; samples++ {
		lookAtPlugins(t, cmd.Process.Pid, plugins)
		for _, file := range []string{"cmdline", "environ"} {
			processes, err := filepath.Glob(v.Path("/proc") + "/[0-9]*/" + file)
			if err != nil || len(processes) == 0 {
				t.Fatalf("no processes: %v", err)
			}
			for _, p := range processes {
				data, _ := os.ReadFile(p)
				find(t, needles, p, data)
			}
		}
		select {
		case err := <-ended:
			if err != nil {
				t.Fatalf("packer build: %v\n%s", err, out.String())
			}
		default:
			continue
		}
		break
	}
	t.Logf("looked at all processes %d times", samples)
	build := pluginProcess{}
	for _, p := range plugins {
		if p.seen > build.seen {
			build = *p
		}
	}
	if strings.Join(strings.Fields(build.limit), " ") != "Max core file size 0 0 bytes" {
		t.Errorf("of the plugin, seen %d times, the kernel may write a core: %q", build.seen, build.limit)
	}
	find(t, needles, "Packer's log", out.Bytes())
	disk, err := os.ReadFile(d.Image)
	if err != nil {
		t.Fatal(err)
	}
	find(t, needles, "the cache disk", disk)
	journal := v.Output(t, "journalctl", "--no-pager")
	find(t, needles, "the VM's journal", []byte(journal))
	for _, dir := range []string{"/etc", "/root", "/run", "/tmp", "/var/lib/docker", "/var/lib/containerd", "/var/log"} {
		err := filepath.WalkDir(v.Path(dir), func(p string, e os.DirEntry, err error) error {
			if err != nil || !e.Type().IsRegular() {
				return nil // gone in the meantime
			}
			data, _ := os.ReadFile(p)
			find(t, needles, p, data)
			return nil
		})
		if err != nil {
			t.Fatal(err)
		}
	}
}

// pluginProcess is a process of the plugin, and how large a core the kernel writes of it.
type pluginProcess struct {
	seen  int
	limit string
}

// lookAtPlugins notes the plugin's processes of a process group as they are now, by their
// IDs: each forbids its core itself, and most of them end soon after.
func lookAtPlugins(t *testing.T, group int, plugins map[int]*pluginProcess) {
	t.Helper()
	programs, err := filepath.Glob("/proc/[0-9]*/exe")
	if err != nil {
		t.Fatal(err)
	}
	for _, link := range programs {
		// Others come and go meanwhile.
		program, _ := os.Readlink(link)
		if !strings.HasPrefix(filepath.Base(program), "packer-plugin-selkies") {
			continue
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(link)))
		if err != nil {
			t.Fatal(err)
		}
		if of, err := unix.Getpgid(pid); err != nil || of != group {
			continue
		}
		if plugins[pid] == nil {
			plugins[pid] = &pluginProcess{}
		}
		plugins[pid].seen++
		text, _ := os.ReadFile(filepath.Join(filepath.Dir(link), "limits"))
		for line := range strings.Lines(string(text)) {
			if strings.HasPrefix(line, "Max core file size") {
				plugins[pid].limit = line
			}
		}
	}
}

func find(t *testing.T, needles [][]byte, where string, data []byte) {
	t.Helper()
	for _, n := range needles {
		if bytes.Contains(data, n) {
			t.Errorf("%s has the secret %q", where, n)
		}
	}
}

// privateLines are the lines of a private key's file that no other key has.
func privateLines(t *testing.T, file string) (lines [][]byte) {
	t.Helper()
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	body := bytes.Split(bytes.TrimSpace(data), []byte("\n"))
	if len(body) < 5 {
		t.Fatalf("%s has %d lines", file, len(body))
	}
	// Without what PEM puts around them, and the line that begins with the format's name.
	return body[2 : len(body)-1]
}

// inBase64 is what of s stands in base64 text whatever is around it, when skip bytes
// of s share a group with what is before.
func inBase64(s string, skip int) []byte {
	whole := s[skip:]
	return []byte(base64.RawURLEncoding.EncodeToString([]byte(whole[:len(whole)/3*3])))
}
