// Package buildvm is what a build of a cache disk needs: the real Packer with the plugin,
// a machine that it logs in to by ssh, with a real sshd, systemd and Docker, and disks.
package buildvm

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/selkies-project/packer-plugin-selkies/e2e/host"
	"github.com/selkies-project/packer-plugin-selkies/e2e/packer"
)

// Packer is a Packer that has the plugin, and no credentials.
type Packer struct {
	*packer.Packer
	dir string
}

// InstallPacker builds the plugin and installs it for Packer, in dir.
func InstallPacker(ctx context.Context, dir string) (*Packer, error) {
	plugin := filepath.Join(dir, "packer-plugin-selkies")
	if err := host.Build(ctx, ".", plugin); err != nil {
		return nil, err
	}
	p, err := packer.New(ctx, plugin, dir)
	return &Packer{p, dir}, err
}

// Build makes a packer build of a template with the options in the provisioner block,
// on a machine that communicator leads to. It runs in a process group of its own, as in
// a shell.
func (p *Packer) Build(t *testing.T, communicator string, options ...string) *exec.Cmd {
	t.Helper()
	template := filepath.Join(t.TempDir(), "template.pkr.hcl")
	text := "source \"null\" \"vm\" {" + communicator + "}\nbuild {\n sources = [\"source.null.vm\"]\n provisioner \"selkies-image-cache\" {\n" +
		strings.Join(options, "\n") + "\n }\n}\n"
	if err := os.WriteFile(template, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := p.Command(t.Context(), "build", template)
	cmd.Env = append(cmd.Env, "DOCKER_CONFIG="+p.dir)
	cmd.Dir = filepath.Dir(template)
	// A test that is over has no use for Packer's clean-up.
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	return cmd
}

// Images is the option that names the images.
func Images(refs ...string) string {
	quoted := make([]string, len(refs))
	for i, r := range refs {
		quoted[i] = fmt.Sprintf("%q", r)
	}
	return "images = [" + strings.Join(quoted, ", ") + "]\n"
}
