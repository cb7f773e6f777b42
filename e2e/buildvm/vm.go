package buildvm

import (
	"context"
	"fmt"
	"os/exec"
	"testing"

	"github.com/selkies-project/packer-plugin-selkies/e2e/machine"
)

// VM is a machine that Packer can log in to.
type VM struct {
	*machine.Machine
	packer *Packer
	port   int
}

// BootBare boots a VM without a Docker, for builds with Packer.
func BootBare(ctx context.Context, packer *Packer) (*VM, error) {
	port, err := machine.FreePort()
	if err != nil {
		return nil, err
	}
	m, err := machine.Boot(ctx, machine.Config{Name: "build-vm", SSHPort: port})
	return &VM{Machine: m, packer: packer, port: port}, err
}

// Boot boots a VM with a Docker, for builds with Packer.
func Boot(ctx context.Context, packer *Packer, release machine.Release) (*VM, error) {
	v, err := BootBare(ctx, packer)
	if err != nil {
		return nil, err
	}
	err = v.StartContainerd(ctx, machine.Containerd{Release: release})
	if err == nil {
		err = v.StartDocker(ctx, machine.Docker{Release: release})
	}
	if err != nil {
		v.Close()
		return nil, err
	}
	return v, nil
}

// Communicator is what a template says of how a user of the VM is logged in.
func (v *VM) Communicator(user string) string {
	return fmt.Sprintf(`
  communicator         = "ssh"
  ssh_host             = "127.0.0.1"
  ssh_port             = %d
  ssh_username         = %q
  ssh_private_key_file = %q
`, v.port, user, v.SSHKey)
}

// PackerBuild makes a packer build, as root, with the options in the provisioner block.
func (v *VM) PackerBuild(t *testing.T, options ...string) *exec.Cmd {
	t.Helper()
	return v.packer.Build(t, v.Communicator("root"), options...)
}

// Build runs packer build and returns what it said.
func (v *VM) Build(t *testing.T, options ...string) (string, error) {
	t.Helper()
	out, err := v.PackerBuild(t, options...).CombinedOutput()
	return string(out), err
}

// MustBuild runs a packer build that succeeds, and returns what it said.
func (v *VM) MustBuild(t *testing.T, options ...string) string {
	t.Helper()
	out, err := v.Build(t, options...)
	if err != nil {
		t.Fatalf("packer build: %v\n%s", err, out)
	}
	t.Logf("packer build:\n%s", out)
	return out
}

// State is what a build on a disk of its own must leave as it was. ctr is not asked where
// there is no containerd: it would wait ten seconds for one.
func (v *VM) State(t *testing.T) string {
	t.Helper()
	return v.Output(t, "sh", "-c", `exec 2>&1
echo mounts:; cat /proc/mounts
echo units:; systemctl list-units --all --plain --no-legend 'selkies-image-cache*'
echo runtime directories:; find /run -maxdepth 1 -name 'selkies*'
echo daemons:; cat /proc/[0-9]*/comm 2>/dev/null | grep -E '^(dockerd|containerd)' | sort
echo images:; docker images --all --quiet
echo namespaces:; test -S /run/containerd/containerd.sock && ctr namespaces list --quiet 2>/dev/null
echo configuration:; find /etc -type f -exec sha256sum {} + | sort -k 2
echo stores:; find /var/lib/docker /var/lib/containerd | sort
echo files:; find / -xdev '(' -path /var/log -o -path /var/lib/systemd -o -path '/tmp/systemd-private-*' ')' -prune \
	-o -type d -printf '%p %m\n' -o -printf '%p %m %s %T@\n' | sort
`)
}

// Network is the same of the network, in which a daemon sets up bridges and rules. It is
// the host's, so that tests of other packages may not run meanwhile.
func (v *VM) Network(t *testing.T) string {
	t.Helper()
	return v.Output(t, "sh", "-c", `exec 2>&1
echo links:; ip -o link
echo addresses:; ip -o address | sed 's/ valid_lft.*//'
echo rules:; iptables-save | sed -e '/^#/d' -e 's/ \[.*//'
echo forwarding:; cat /proc/sys/net/ipv4/ip_forward
`)
}
