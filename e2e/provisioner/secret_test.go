//go:build e2e

package provisioner_test

import (
	"bytes"
	"encoding/base64"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"github.com/selkies-project/packer-plugin-selkies/e2e/buildvm"
	"github.com/selkies-project/packer-plugin-selkies/e2e/registry"
)

// TestCredentials pulls with a password and looks for it, in plain and in the forms
// in which it travels, wherever it must not be.
func TestCredentials(t *testing.T) {
	v := world.debian
	const user, password = "robot", "correct-horse-battery-staple-7391"
	reg := registry.New(t, registry.Config{Username: user, Password: password})
	ref := reg.Addr + "/app:1"
	auth := remote.WithAuth(&authn.Basic{Username: user, Password: password})
	if err := remote.Write(parse(t, ref), newImage(t, layer(t, map[string]int{"large": 30 << 20})), auth); err != nil {
		t.Fatal(err)
	}
	needles := [][]byte{
		[]byte(password),
		[]byte(base64.StdEncoding.EncodeToString([]byte(user + ":" + password))),
		// In the header's JSON the password begins at any of three offsets.
		inBase64(password, 0), inBase64(password, 1), inBase64(password, 2),
	}
	d := newDisk(t, v, 256)
	option := `registry_auth {
    server   = "` + reg.Addr + `"
    username = "` + user + `"
    password = "` + password + `"
  }`
	cmd := v.PackerBuild(t, buildvm.Images(ref), d.Block(), option, "verify = true")
	cmd.Env = append(cmd.Env, "PACKER_LOG=1")
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	samples := 0
	for ; ; samples++ {
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

	t.Run("wrong password", func(t *testing.T) {
		out, err := v.Build(t, buildvm.Images(ref), d.Block(), strings.Replace(option, password, password+"-wrong", 1))
		if err == nil || !strings.Contains(out, "set registry_auth") {
			t.Errorf("packer build: %v\n%s", err, out)
		}
		find(t, needles[:1], "the error", []byte(out))
	})
}

func find(t *testing.T, needles [][]byte, where string, data []byte) {
	t.Helper()
	for _, n := range needles {
		if bytes.Contains(data, n) {
			t.Errorf("%s has the password as %q", where, n)
		}
	}
}

// inBase64 is what of s stands in base64 text whatever is around it, when skip bytes
// of s share a group with what is before.
func inBase64(s string, skip int) []byte {
	whole := s[skip:]
	return []byte(base64.RawURLEncoding.EncodeToString([]byte(whole[:len(whole)/3*3])))
}
