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
)

// Packer is a Packer that has the plugin.
type Packer struct{ program, plugins string }

// InstallPacker builds the plugin and installs it for Packer, in dir.
func InstallPacker(ctx context.Context, dir string) (*Packer, error) {
	tools, err := host.Tool(ctx, "packer")
	if err != nil {
		return nil, err
	}
	p := &Packer{program: filepath.Join(tools, "packer"), plugins: filepath.Join(dir, "plugins")}
	plugin := filepath.Join(dir, "packer-plugin-selkies")
	if err := host.Build(ctx, ".", plugin); err != nil {
		return nil, err
	}
	install := exec.CommandContext(ctx, p.program, "plugins", "install", "--path", plugin, "github.com/selkies-project/selkies")
	install.Env = p.env()
	_, err = host.Output(install)
	return p, err
}

func (p *Packer) env() []string {
	return append(os.Environ(), "PACKER_PLUGIN_PATH="+p.plugins, "PACKER_CONFIG_DIR="+p.plugins,
		"CHECKPOINT_DISABLE=1", "PACKER_NO_COLOR=1", "DOCKER_CONFIG="+p.plugins)
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
	cmd := exec.CommandContext(t.Context(), p.program, "build", template)
	cmd.Env = p.env()
	cmd.Dir = filepath.Dir(template)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
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
