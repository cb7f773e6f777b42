//go:build e2e

// Package pipeline_test runs whole builds: the real Packer with the real
// googlecompute builder and this plugin, on machines that package gcp hands out.
package pipeline_test

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"cloud.google.com/go/compute/apiv1/computepb"

	"github.com/selkies-project/packer-plugin-selkies/e2e/gcp"
	"github.com/selkies-project/packer-plugin-selkies/e2e/gcp/hardware"
	"github.com/selkies-project/packer-plugin-selkies/e2e/host"
)

const (
	project = "broker"
	zone    = "us-central1-a"
	// token is the access token that the cloud asks for.
	token = "ya29.pipeline"
)

// packer is the real one, with both plugins installed.
var packer struct{ program, home string }

func TestMain(m *testing.M) {
	status, err := setUp(context.Background(), m)
	if err != nil {
		fmt.Fprintln(os.Stderr, "pipeline tests:", err)
		status = 1
	}
	os.Exit(status)
}

func setUp(ctx context.Context, m *testing.M) (status int, err error) {
	if err := host.Check(); err != nil {
		return 1, err
	}
	if packer.home, err = os.MkdirTemp("", "pipeline-e2e-"); err != nil {
		return 1, err
	}
	defer os.RemoveAll(packer.home)
	tools, err := host.Tool(ctx, "packer")
	if err != nil {
		return 1, err
	}
	packer.program = filepath.Join(tools, "packer")
	builder, err := host.Tool(ctx, "googlecompute")
	if err != nil {
		return 1, err
	}
	plugin := filepath.Join(packer.home, "packer-plugin-selkies")
	if err := host.Build(ctx, ".", plugin); err != nil {
		return 1, err
	}
	for source, program := range map[string]string{
		"github.com/hashicorp/googlecompute": filepath.Join(builder, "packer-plugin-googlecompute"),
		"github.com/selkies-project/selkies": plugin,
	} {
		if _, err := host.Output(packerCommand(ctx, "plugins", "install", "--path", program, source)); err != nil {
			return 1, err
		}
	}
	return m.Run(), nil
}

// packerCommand is a Packer that sees nothing of the user's own configuration and
// runs in a process group of its own, as in a shell.
func packerCommand(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, packer.program, args...)
	cmd.Env = append(os.Environ(), "PACKER_CONFIG_DIR="+packer.home, "PACKER_PLUGIN_PATH="+filepath.Join(packer.home, "plugins"),
		"CHECKPOINT_DISABLE=1", "PACKER_NO_COLOR=1", "DOCKER_CONFIG="+packer.home)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	return cmd
}

// cloud is a Google project with the public image debian-12.
type cloud struct {
	*gcp.Server
	hardware *hardware.Hardware // nil if nothing is real
}

// newCloud starts a cloud whose disks and machines are real.
func newCloud(t *testing.T) *cloud {
	t.Helper()
	h := &hardware.Hardware{Dir: t.TempDir()}
	t.Cleanup(func() {
		if err := h.Close(); err != nil {
			t.Error(err)
		}
	})
	return startCloud(t, gcp.Config{Token: token, Hardware: h}, h)
}

// newRecords starts a cloud that keeps records only.
func newRecords(t *testing.T) *cloud {
	t.Helper()
	return startCloud(t, gcp.Config{Token: token}, nil)
}

func startCloud(t *testing.T, config gcp.Config, h *hardware.Hardware) *cloud {
	t.Helper()
	c := &cloud{Server: gcp.New(t, config), hardware: h}
	c.AddImage("debian-cloud", &computepb.Image{Name: new("debian-12-bookworm-v20261110"), Family: new("debian-12")})
	return c
}

// build runs packer build on a googlecompute source with the options given and a
// build block with the steps given.
func (c *cloud) build(t *testing.T, options, steps string) (string, error) {
	t.Helper()
	template := filepath.Join(t.TempDir(), "template.pkr.hcl")
	text := fmt.Sprintf(`
source "googlecompute" "cache" {
  project_id              = %q
  zone                    = %q
  access_token            = %q
  custom_endpoints        = { compute = "%s/compute/v1/" }
  source_image_family     = "debian-12"
  source_image_project_id = ["debian-cloud", "broker"]
  ssh_username            = "packer"
  %s
}

build {
  sources = ["source.googlecompute.cache"]
  %s
}
`, project, zone, token, c.URL, options, steps)
	if err := os.WriteFile(template, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := packerCommand(t.Context(), "build", template)
	cmd.Dir = filepath.Dir(template)
	out, err := cmd.CombinedOutput()
	return string(out), err
}

func (c *cloud) mustBuild(t *testing.T, options, steps string) string {
	t.Helper()
	out, err := c.build(t, options, steps)
	if err != nil {
		t.Fatalf("packer build: %v\n%s", err, out)
	}
	t.Logf("packer build:\n%s", out)
	return out
}

// quoteList is an HCL list of strings.
func quoteList(items []string) string {
	quoted := make([]string, len(items))
	for i, item := range items {
		quoted[i] = fmt.Sprintf("%q", item)
	}
	return "[" + strings.Join(quoted, ", ") + "]"
}
