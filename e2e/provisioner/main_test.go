//go:build e2e

// Package provisioner_test runs the real Packer with the plugin against machines
// with a real sshd, systemd and Docker.
package provisioner_test

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"golang.org/x/sys/unix"

	"github.com/selkies-project/packer-plugin-selkies/e2e/host"
	"github.com/selkies-project/packer-plugin-selkies/e2e/images"
	"github.com/selkies-project/packer-plugin-selkies/e2e/machine"
	"github.com/selkies-project/packer-plugin-selkies/manifest"
)

// world is what all tests share.
var world struct {
	packer, plugins string
	busybox         string
	// debian is a build VM with Docker 20.10.
	debian *vm
}

// vm is a machine that Packer can log in to.
type vm struct {
	*machine.Machine
	port int
}

func TestMain(m *testing.M) {
	host.Main(func(ctx context.Context, dir string) (status int, err error) {
		if err := setUp(ctx, dir); err != nil {
			return 1, err
		}
		defer world.debian.Close()
		return m.Run(), nil
	})
}

func setUp(ctx context.Context, dir string) error {
	tools, err := host.Tool(ctx, "packer")
	if err != nil {
		return err
	}
	world.packer, world.plugins = filepath.Join(tools, "packer"), filepath.Join(dir, "plugins")
	plugin := filepath.Join(dir, "packer-plugin-selkies")
	if err := host.Build(ctx, ".", plugin); err != nil {
		return err
	}
	install := exec.CommandContext(ctx, world.packer, "plugins", "install", "--path", plugin, "github.com/selkies-project/selkies")
	install.Env = packerEnv()
	if _, err := host.Output(install); err != nil {
		return err
	}
	if world.busybox, err = machine.Busybox(ctx); err != nil {
		return err
	}
	world.debian, err = bootVM(ctx, machine.Debian)
	return err
}

func packerEnv() []string {
	return append(os.Environ(), "PACKER_PLUGIN_PATH="+world.plugins, "PACKER_CONFIG_DIR="+world.plugins,
		"CHECKPOINT_DISABLE=1", "PACKER_NO_COLOR=1", "DOCKER_CONFIG="+world.plugins)
}

func bootVM(ctx context.Context, release machine.Release) (*vm, error) {
	port, err := machine.FreePort()
	if err != nil {
		return nil, err
	}
	m, err := machine.Boot(ctx, machine.Config{Name: "build-vm", SSHPort: port})
	if err != nil {
		return nil, err
	}
	v := &vm{Machine: m, port: port}
	err = m.StartContainerd(ctx, machine.Containerd{Release: release})
	if err == nil {
		err = m.StartDocker(ctx, machine.Docker{Release: release})
	}
	if err != nil {
		m.Close()
		return nil, err
	}
	return v, nil
}

// disk is a cache disk, attached to a build VM.
type disk struct {
	image, device string
	vm            *vm
}

func newDisk(t *testing.T, v *vm, megabytes int64) *disk {
	t.Helper()
	image := filepath.Join(t.TempDir(), "disk")
	if err := host.NewDisk(image, megabytes<<20); err != nil {
		t.Fatal(err)
	}
	loop, err := host.AttachLoop(image, false)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { loop.Close() })
	name := filepath.Base(loop.Path)
	if err := v.AttachDisk(loop.Path, name); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { v.DetachDisk(loop.Path, name) })
	return &disk{image: image, device: loop.Path, vm: v}
}

// mount mounts the disk's image read-only on the host, for as long as f runs.
func (d *disk) mount(t *testing.T, f func(dir string)) {
	t.Helper()
	loop, err := host.AttachLoop(d.image, true)
	if err != nil {
		t.Fatal(err)
	}
	defer loop.Close()
	dir := t.TempDir()
	if err := unix.Mount(loop.Path, dir, "ext4", unix.MS_RDONLY, "noload"); err != nil {
		t.Fatalf("mounting the cache disk: %v", err)
	}
	defer unix.Unmount(dir, unix.MNT_DETACH)
	f(dir)
}

// manifest reads the layer manifest, as the injector does.
func (d *disk) manifest(t *testing.T) (m *manifest.Manifest, data []byte) {
	t.Helper()
	d.mount(t, func(dir string) {
		var err error
		if m, err = manifest.Read(dir); err != nil {
			t.Fatal(err)
		}
		if data, err = os.ReadFile(filepath.Join(dir, manifest.Path)); err != nil {
			t.Fatal(err)
		}
	})
	return m, data
}

// block is the disk block of a template.
func (d *disk) block(options ...string) string {
	return fmt.Sprintf("disk {\n device = %q\n%s\n}\n", d.device, strings.Join(options, "\n"))
}

func imagesOption(refs ...string) string {
	quoted := make([]string, len(refs))
	for i, r := range refs {
		quoted[i] = fmt.Sprintf("%q", r)
	}
	return "images = [" + strings.Join(quoted, ", ") + "]\n"
}

// packerBuild makes a packer build of a template with the options in the
// provisioner block. It runs in a process group of its own, as in a shell.
func (v *vm) packerBuild(t *testing.T, options ...string) *exec.Cmd {
	t.Helper()
	return packerBuild(t, v.communicator("root"), options...)
}

func (v *vm) communicator(user string) string {
	return fmt.Sprintf(`
  communicator         = "ssh"
  ssh_host             = "127.0.0.1"
  ssh_port             = %d
  ssh_username         = %q
  ssh_private_key_file = %q
`, v.port, user, v.SSHKey)
}

func packerBuild(t *testing.T, communicator string, options ...string) *exec.Cmd {
	t.Helper()
	template := filepath.Join(t.TempDir(), "template.pkr.hcl")
	text := "source \"null\" \"vm\" {" + communicator + "}\nbuild {\n sources = [\"source.null.vm\"]\n provisioner \"selkies-image-cache\" {\n" +
		strings.Join(options, "\n") + "\n }\n}\n"
	if err := os.WriteFile(template, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), world.packer, "build", template)
	cmd.Env = packerEnv()
	cmd.Dir = filepath.Dir(template)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	return cmd
}

// build runs packer build and returns what it said.
func (v *vm) build(t *testing.T, options ...string) (string, error) {
	t.Helper()
	out, err := v.packerBuild(t, options...).CombinedOutput()
	return string(out), err
}

func (v *vm) mustBuild(t *testing.T, options ...string) string {
	t.Helper()
	out, err := v.build(t, options...)
	if err != nil {
		t.Fatalf("packer build: %v\n%s", err, out)
	}
	t.Logf("packer build:\n%s", out)
	return out
}

// state is what a build on a disk of its own must leave as it was.
func (v *vm) state(t *testing.T) string {
	t.Helper()
	return v.Output(t, "sh", "-c", `exec 2>&1
echo mounts:; cat /proc/mounts
echo units:; systemctl list-units --all --plain --no-legend 'selkies-image-cache*'
echo runtime directories:; find /run -maxdepth 1 -name 'selkies*'
echo daemons:; cat /proc/[0-9]*/comm 2>/dev/null | grep -E '^(dockerd|containerd)' | sort
echo images:; docker images --all --quiet
echo namespaces:; ctr namespaces list --quiet 2>/dev/null
echo configuration:; find /etc -type f -exec sha256sum {} + | sort -k 2
echo stores:; find /var/lib/docker /var/lib/containerd | sort
echo files:; find / -xdev '(' -path /var/log -o -path /var/lib/systemd -o -path '/tmp/systemd-private-*' ')' -prune \
	-o -type d -printf '%p %m\n' -o -printf '%p %m %s %T@\n' | sort
`)
}

// network is the same of the network, in which a daemon sets up bridges and rules. It is
// the host's, so that tests of other packages may not run meanwhile.
func (v *vm) network(t *testing.T) string {
	t.Helper()
	return v.Output(t, "sh", "-c", `exec 2>&1
echo links:; ip -o link
echo addresses:; ip -o address | sed 's/ valid_lft.*//'
echo rules:; iptables-save | sed -e '/^#/d' -e 's/ \[.*//'
echo forwarding:; cat /proc/sys/net/ipv4/ip_forward
`)
}

// errorLine is the error in Packer's summary of a build. It takes one line.
func errorLine(t *testing.T, out string) string {
	t.Helper()
	_, rest, ok := strings.Cut(out, "\n--> null.vm: ")
	line, rest, _ := strings.Cut(rest, "\n")
	if next, _, _ := strings.Cut(rest, "\n"); !ok || next != "" {
		t.Errorf("the build did not end with one line of error:\n%s", out)
	}
	return line
}

// layer is a tar stream of files with the sizes given, whose contents do not
// compress and follow from name and size.
func layer(t *testing.T, sizes map[string]int) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for name, size := range sizes {
		seed := [32]byte{}
		copy(seed[:], fmt.Sprint(name, size))
		data := make([]byte, size)
		if _, err := rand.NewChaCha8(seed).Read(data); err != nil {
			t.Fatal(err)
		}
		if err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(size)}); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(data); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func newImage(t *testing.T, layers ...[]byte) v1.Image {
	t.Helper()
	image, err := images.New(images.OCI, layers...)
	if err != nil {
		t.Fatal(err)
	}
	return image
}
