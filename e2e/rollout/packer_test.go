//go:build e2e

package rollout_test

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/selkies-project/packer-plugin-selkies/e2e/host"
)

// rollback is the way back as docs/post-processors/image-cache.mdx has it, without a
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
    cache_name       = "packer"
    project_id       = data.selkies-image-cache.last.project_id
    image_name       = var.rollback_to
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
	file := filepath.Join(t.TempDir(), "rollback.pkr.hcl")
	if err := os.WriteFile(file, fmt.Appendf(nil, rollback, c.URL+"/compute/v1/", c.URL, world.injector), 0o600); err != nil {
		t.Fatal(err)
	}
	packer := func(args ...string) (string, error) {
		cmd := exec.CommandContext(t.Context(), world.packer, append(args, "-var", "access_token="+c.token, "-var", "rollback_to="+imageName(1), file)...)
		cmd.Env = packerEnv()
		return host.Output(cmd)
	}
	if out, err := packer("validate"); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	out, err := packer("build")
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	if want := "Image " + imageName(1) + " is on 2 disks, in 1 clusters"; !strings.Contains(out, want) {
		t.Errorf("Packer does not say %q:\n%s", want, out)
	}
	if strings.Contains(out, c.token) {
		t.Error("Packer's output has the access token")
	}
	c.waitObjects(append(c.three(zoneA, 1), c.three(zoneB, 1)...)...)

	// Errors are Packer's to tell, in one line.
	c.Deny("compute.disks.list")
	out, err = packer("build")
	if want := "listing disks: Required 'compute.disks.list' permission for 'projects/p'; the permission compute.disks.list is missing, grant roles/compute.storageAdmin (403)"; err == nil || !strings.Contains(out, want) {
		t.Errorf("Packer does not say %q: %v\n%s", want, err, out)
	}
}

func packerEnv() []string {
	home := filepath.Dir(world.plugin)
	return append(os.Environ(), "PACKER_PLUGIN_PATH="+filepath.Join(home, "plugins"), "PACKER_CONFIG_DIR="+home,
		"CHECKPOINT_DISABLE=1", "PACKER_NO_COLOR=1")
}
