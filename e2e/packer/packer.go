// Package packer runs the real Packer with this module's plugin, apart from whatever
// Packer and plugins the user has.
package packer

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"github.com/selkies-project/packer-plugin-selkies/e2e/host"
)

// Packer is a Packer that has the plugin at most.
type Packer struct {
	program string
	dir     string
}

// Bare is a Packer without a plugin that keeps all it has in dir.
func Bare(ctx context.Context, dir string) (*Packer, error) {
	tools, err := host.Tool(ctx, "packer")
	return &Packer{program: filepath.Join(tools, "packer"), dir: dir}, err
}

// New installs the plugin, a file, for a Packer that keeps all it has in dir.
func New(ctx context.Context, plugin, dir string) (*Packer, error) {
	p, err := Bare(ctx, dir)
	if err != nil {
		return nil, err
	}
	install := p.Command(ctx, "plugins", "install", "--path", plugin, "github.com/selkies-project/selkies")
	if _, err := host.Output(install); err != nil {
		return nil, fmt.Errorf("installing the plugin: %w", err)
	}
	return p, nil
}

// Command is a command of Packer's. It has to be waited for, also after ctx is
// cancelled: Packer cleans up then.
func (p *Packer) Command(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, p.program, args...)
	cmd.Env = append(os.Environ(), "CHECKPOINT_DISABLE=1", "PACKER_NO_COLOR=1", "PACKER_CONFIG_DIR="+p.dir,
		"PACKER_PLUGIN_PATH="+filepath.Join(p.dir, "plugins"), "PACKER_CACHE_DIR="+filepath.Join(p.dir, "packer-cache"))
	// Packer expects an interrupt as a terminal sends it, to all its processes, and
	// only one: the second makes it give up its clean-up.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGINT) }
	cmd.WaitDelay = time.Minute
	return cmd
}
