//go:build e2e

// Package pipeline_test runs whole builds: the real Packer with the real
// googlecompute builder and this plugin, on machines that package gcp hands out, and
// with a real cluster that gets what was built.
package pipeline_test

import (
	"context"
	"fmt"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"cloud.google.com/go/compute/apiv1/computepb"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/selkies-project/packer-plugin-selkies/e2e/cluster"
	"github.com/selkies-project/packer-plugin-selkies/e2e/gcp"
	"github.com/selkies-project/packer-plugin-selkies/e2e/gcp/hardware"
	"github.com/selkies-project/packer-plugin-selkies/e2e/host"
	"github.com/selkies-project/packer-plugin-selkies/e2e/images"
	"github.com/selkies-project/packer-plugin-selkies/e2e/machine"
	"github.com/selkies-project/packer-plugin-selkies/e2e/registry"
)

const (
	project = "broker"
	zone    = "us-central1-a"
)

// world is what all tests share.
var world struct {
	*cluster.Cluster
	config   *rest.Config
	registry *registry.Registry
	packer   string
	home     string // of Packer, with both plugins
	injector string // the program, for traces
	busybox  []byte // a layer that a container needs to run
}

func TestMain(m *testing.M) {
	cluster.Main(build, func(ctx context.Context, dir string) (int, error) {
		stop, err := setUp(ctx, dir)
		defer stop()
		if err != nil {
			return 1, err
		}
		return m.Run(), nil
	})
}

// build builds what the tests run.
func build(ctx context.Context, dir string) error {
	for _, tool := range []string{"packer", "googlecompute"} {
		if _, err := host.Tool(ctx, tool); err != nil {
			return err
		}
	}
	if err := host.Build(ctx, ".", filepath.Join(dir, "packer-plugin-selkies")); err != nil {
		return err
	}
	if err := host.Build(ctx, "./injector", filepath.Join(dir, "selkies-image-injector")); err != nil {
		return err
	}
	return cluster.BuildInjector(ctx, filepath.Join(dir, "injector"))
}

// setUp installs the plugins, fills the registry and starts a control plane. stop is
// never nil.
func setUp(ctx context.Context, dir string) (stop func(), err error) {
	stop = func() {}
	world.injector = filepath.Join(dir, "selkies-image-injector")
	if err := installPlugins(ctx, dir); err != nil {
		return stop, err
	}
	if world.registry, err = registry.Start(registry.Config{Dir: filepath.Join(dir, "blobs")}); err != nil {
		return stop, err
	}
	stop = func() { world.registry.Stop() }
	sandbox, err := pushBasics(ctx, dir)
	if err != nil {
		return stop, err
	}
	if world.Cluster, err = cluster.Start(ctx, cluster.Config{Dir: dir, Sandbox: sandbox}); err != nil {
		return stop, err
	}
	stop = func() { world.Cluster.Stop(); world.registry.Stop() }
	world.config, err = clientcmd.BuildConfigFromFlags("", world.Kubeconfig)
	return stop, err
}

func installPlugins(ctx context.Context, dir string) error {
	tools, err := host.Tool(ctx, "packer")
	if err != nil {
		return err
	}
	builder, err := host.Tool(ctx, "googlecompute")
	if err != nil {
		return err
	}
	world.packer, world.home = filepath.Join(tools, "packer"), filepath.Join(dir, "packer")
	for source, program := range map[string]string{
		"github.com/hashicorp/googlecompute": filepath.Join(builder, "packer-plugin-googlecompute"),
		"github.com/selkies-project/selkies": filepath.Join(dir, "packer-plugin-selkies"),
	} {
		if _, err := host.Output(packerCommand(ctx, "plugins", "install", "--path", program, source)); err != nil {
			return err
		}
	}
	return nil
}

// pushBasics pushes what nodes pull themselves, the image of pod sandboxes and the
// injector's, and returns the former.
func pushBasics(ctx context.Context, dir string) (sandbox string, err error) {
	busybox, err := machine.Busybox(ctx)
	if err != nil {
		return "", err
	}
	pause, err := images.Pause(busybox)
	if err != nil {
		return "", err
	}
	layers, err := pause.Image.Layers()
	if err != nil {
		return "", err
	}
	if world.busybox, err = stream(layers[0]); err != nil {
		return "", err
	}
	// More zeros at its end make it another layer than that of the sandbox, which
	// nodes pull.
	world.busybox = append(world.busybox, make([]byte, 1024)...)
	refs, err := images.Push(ctx, world.registry.Addr, []images.Image{pause})
	if err != nil {
		return "", err
	}
	return refs[0], cluster.PushInjector(ctx, filepath.Join(dir, "injector"), world.registry.Addr+"/injector:1")
}

// packerCommand is a Packer that sees nothing of the user's own configuration and
// runs in a process group of its own, as in a shell.
func packerCommand(ctx context.Context, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, world.packer, args...)
	cmd.Env = append(os.Environ(), "PACKER_CONFIG_DIR="+world.home, "PACKER_PLUGIN_PATH="+filepath.Join(world.home, "plugins"),
		"CHECKPOINT_DISABLE=1", "PACKER_NO_COLOR=1", "DOCKER_CONFIG="+world.home)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	return cmd
}

// cloud is a Google project with the public image debian-12.
type cloud struct {
	*gcp.Server
	token    string
	hardware *hardware.Hardware // nil if nothing is real
}

// newCloud starts a cloud whose disks and machines are real.
func newCloud(t *testing.T, token string) *cloud {
	t.Helper()
	h := &hardware.Hardware{Dir: t.TempDir()}
	t.Cleanup(func() {
		if err := h.Close(); err != nil {
			t.Error(err)
		}
	})
	return start(t, gcp.Config{Token: token, Hardware: h}, h)
}

// newRecords starts a cloud that keeps records only.
func newRecords(t *testing.T) *cloud {
	t.Helper()
	return start(t, gcp.Config{Token: "ya29.records"}, nil)
}

// newRecordsWithBroker starts one that has the real cluster, and that its pods reach.
func newRecordsWithBroker(t *testing.T, zones ...string) *cloud {
	t.Helper()
	c := start(t, gcp.Config{Token: administrator(t), Addr: address() + ":0"}, nil)
	c.addBroker(zones)
	t.Cleanup(func() {
		for _, args := range [][]string{{"daemonsets,persistentvolumeclaims", "-n", "selkies-image-cache"}, {"persistentvolumes"}} {
			if _, err := world.Kubectl(context.Background(), append([]string{"delete", "--all", "--timeout=1m"}, args...)...); err != nil {
				t.Error(err)
			}
		}
	})
	return c
}

// address is that of the API server, at which pods reach other servers of this host too.
func address() string {
	u, err := url.Parse(world.config.Host)
	if err != nil {
		panic(err) // client-go has taken it
	}
	return u.Hostname()
}

func start(t *testing.T, config gcp.Config, h *hardware.Hardware) *cloud {
	t.Helper()
	c := &cloud{Server: gcp.New(t, config), token: config.Token, hardware: h}
	c.AddImage("debian-cloud", &computepb.Image{Name: new("debian-12-bookworm-v20261110"), Family: new("debian-12")})
	return c
}

// command makes a packer build of a googlecompute source with the options given and a
// build block with the steps given.
func (c *cloud) command(t *testing.T, options, steps string) *exec.Cmd {
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
`, project, zone, c.token, c.URL, options, steps)
	if err := os.WriteFile(template, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := packerCommand(t.Context(), "build", template)
	cmd.Dir = filepath.Dir(template)
	return cmd
}

// build runs such a build and returns what Packer said.
func (c *cloud) build(t *testing.T, options, steps string) (string, error) {
	t.Helper()
	out, err := c.command(t, options, steps).CombinedOutput()
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

// hclList is a list of strings.
func hclList(items ...string) string {
	quoted := make([]string, len(items))
	for i, item := range items {
		quoted[i] = fmt.Sprintf("%q", item)
	}
	return "[" + strings.Join(quoted, ", ") + "]"
}
