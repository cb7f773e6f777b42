//go:build e2e

package rollout_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/selkies-project/packer-plugin-selkies/e2e/cluster"
	"github.com/selkies-project/packer-plugin-selkies/e2e/gcp"
	"github.com/selkies-project/packer-plugin-selkies/e2e/host"
)

// rollback is a rollback as docs/post-processors/image-cache.mdx has it, without a
// build, in a real Packer.
const rollback = `
variable "access_token" {
  type      = string
  sensitive = true
}

variable "rollback_to" {
  type = string
}

data "selkies-image-cache" "last" {
  project_id       = "p"
  access_token     = var.access_token
  custom_endpoints = { compute = %[1]q }
}

source "null" "none" {
  communicator = "none"
}

build {
  sources = ["source.null.none"]

  post-processor "selkies-image-cache" {
    cache_name       = %[4]q
    project_id       = data.selkies-image-cache.last.project_id
    image_name       = var.rollback_to
    cluster_pattern  = "^broker-"
    injector_image   = %[3]q
    access_token     = var.access_token
    node_selector    = { "tier" = "gpu" }
    custom_endpoints = { compute = %[1]q, container = %[2]q }
  }
}
`

func TestPacker(t *testing.T) {
	c := newCloud(t, "packer", administrator(t))
	c.tidy()
	c.build(1)
	c.build(2)
	packer := func(command string) (string, error) { return host.Output(c.rollBack(command, 1)) }
	if out, err := packer("validate"); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	log := filepath.Join(t.TempDir(), "log")
	cmd := c.rollBack("build", 1)
	cmd.Env = append(cmd.Env, "PACKER_LOG=1", "PACKER_LOG_PATH="+log)
	out, err := host.Output(cmd)
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if want := "Image " + imageName(1) + " is on 2 disks, in 1 clusters"; !strings.Contains(out, want) {
		t.Errorf("Packer does not say %q:\n%s", want, out)
	}
	if strings.Contains(out, c.token) {
		t.Error("Packer's output has the access token")
	}
	if logged, err := os.ReadFile(log); err != nil || !bytes.Contains(logged, []byte("packer-plugin-selkies")) {
		t.Errorf("Packer's log is %q, %v", logged, err)
	} else if bytes.Contains(logged, []byte(c.token)) {
		t.Error("Packer's log has the access token")
	}
	c.waitObjects(append(c.three(zoneA, 1), c.three(zoneB, 1)...)...)
	c.findsCredentials()

	// Errors are Packer's to tell, in one line.
	c.Deny("compute.disks.list")
	out, err = packer("build")
	if want := "listing disks: Required 'compute.disks.list' permission for 'projects/p'; the permission compute.disks.list is missing, grant roles/compute.storageAdmin (403)"; err == nil || !strings.Contains(out, want) {
		t.Errorf("Packer does not say %q: %v\n%s", want, err, out)
	}
}

// findsCredentials has Packer do the same with the credentials that it finds, in place of a
// token: those of the machine or the pod, and a service account's key.
func (c *cloud) findsCredentials() {
	c.t.Helper()
	key := filepath.Join(c.t.TempDir(), "key.json")
	if err := os.WriteFile(key, c.Key(c.t), 0o600); err != nil {
		c.t.Fatal(err)
	}
	for env, call := range map[string]string{
		"GCE_METADATA_HOST=" + strings.TrimPrefix(c.URL, "http://"): "metadata.token ",
		"GOOGLE_APPLICATION_CREDENTIALS=" + key:                     "oauth2.token ",
	} {
		before := len(c.Calls())
		cmd := c.rollBack("build", 1)
		cmd.Args[slices.Index(cmd.Args, "access_token="+c.token)] = "access_token="
		// The user's own are not found.
		cmd.Env = append(cmd.Env, "HOME="+c.t.TempDir(), "GOOGLE_APPLICATION_CREDENTIALS=", env)
		out, err := host.Output(cmd)
		if err != nil {
			c.t.Errorf("%s: %v\n%s", env, err, out)
		}
		if strings.Contains(out, c.token) {
			c.t.Errorf("%s: Packer's output has the access token", env)
		}
		if !slices.ContainsFunc(c.Calls()[before:], func(done string) bool { return strings.HasPrefix(done, call) }) {
			c.t.Errorf("%s: Packer has not asked there for a token: %q", env, c.Calls()[before:])
		}
	}
}

// rollBack is a command of Packer for the template of a rollback.
func (c *cloud) rollBack(command string, stamp int) *exec.Cmd {
	c.t.Helper()
	file := filepath.Join(c.t.TempDir(), "rollback.pkr.hcl")
	if err := os.WriteFile(file, fmt.Appendf(nil, rollback, c.URL+"/compute/v1/", c.URL, world.injector, c.name), 0o600); err != nil {
		c.t.Fatal(err)
	}
	cmd := exec.CommandContext(c.t.Context(), world.packer, command, "-var", "access_token="+c.token, "-var", "rollback_to="+imageName(stamp), file)
	cmd.Env = packerEnv()
	return cmd
}

// TestPackerEnded ends a real Packer while it makes disks. Told to end, it lets the next
// run begin at once; killed, a little later. The next run completes its work.
func TestPackerEnded(t *testing.T) {
	t.Parallel() // without nodes no test is in the other's way
	c := newCloud(t, "ended", administrator(t))
	c.tidy()
	c.must(c.build(1))
	for i, signal := range []syscall.Signal{syscall.SIGTERM, syscall.SIGKILL} {
		stamp := i + 2
		c.build(stamp)
		hold := make(chan struct{})
		c.Inject(gcp.Fault{Call: "disks.insert", Hold: hold})
		before := len(c.Calls())
		cmd := c.rollBack("build", stamp)
		cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		cluster.Wait(t, "Packer to make disks", func(context.Context) error {
			if !slices.ContainsFunc(c.Calls()[before:], func(call string) bool { return strings.HasPrefix(call, "disks.insert ") }) {
				return errors.New("not yet")
			}
			return nil
		})
		to := cmd.Process.Pid
		if signal == syscall.SIGKILL {
			to = -to // and all its plugins
		}
		if err := syscall.Kill(to, signal); err != nil {
			t.Fatal(err)
		}
		if signal == syscall.SIGKILL {
			close(hold)
		} else {
			// The operation goes on when Packer has ended.
			time.AfterFunc(time.Second, sync.OnceFunc(func() { close(hold) }))
		}
		if err := cmd.Wait(); err == nil {
			t.Errorf("%v: Packer succeeded", signal)
		}
		lease, err := world.Client.CoordinationV1().Leases(namespace).Get(t.Context(), c.name, metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if held := lease.Spec.HolderIdentity != nil && *lease.Spec.HolderIdentity != ""; held != (signal == syscall.SIGKILL) {
			t.Errorf("%v: the lease is held: %v", signal, held)
		}
		if err := c.working(); err != nil {
			t.Error(err)
		}
		c.must(artifact(imageName(stamp)))
		if err := c.working(); err != nil {
			t.Error(err)
		}
		c.waitObjects(slices.Concat(c.two(zoneA, stamp-1), c.two(zoneB, stamp-1), c.three(zoneA, stamp), c.three(zoneB, stamp))...)
	}
}

func packerEnv() []string {
	home := filepath.Dir(world.plugin)
	return append(os.Environ(), "PACKER_PLUGIN_PATH="+filepath.Join(home, "plugins"), "PACKER_CONFIG_DIR="+home,
		"CHECKPOINT_DISABLE=1", "PACKER_NO_COLOR=1")
}
