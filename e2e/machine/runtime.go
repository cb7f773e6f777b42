package machine

import (
	"context"
	"encoding/json"
	"fmt"
	"maps"
	"path/filepath"
	"strings"

	"github.com/selkies-project/packer-plugin-selkies/e2e/host"
)

// Release says which build of a runtime a machine runs.
type Release string

const (
	// Debian is Debian 12's own: containerd 1.6, Docker 20.10, runc 1.1.
	Debian Release = "debian"
	// Upstream is the one pinned below tools: containerd 2.4.2, Moby 29, runc 1.5.2.
	Upstream Release = "upstream"
)

// Containerd says which containerd runs in a machine, and how.
type Containerd struct {
	Release Release
	// Sandbox is the image of pod sandboxes, which the CRI pulls by itself.
	Sandbox string
	// Mirrors are registries by the URL that serves them: "docker.io" to
	// "http://127.0.0.1:5000". Registries on loopback need none.
	Mirrors map[string]string
	// Snapshotter of the CRI, "overlayfs" by default.
	Snapshotter string
	// Unpacks is how many layers a pull unpacks at a time, 1 by default; Upstream only.
	Unpacks int
}

// Socket is containerd's address in a machine.
const Socket = "/run/containerd/containerd.sock"

// containerdConfig has the same for the two schemas of containerd's configuration.
// restrict_oom_score_adj: runc may not lower it without CAP_SYS_RESOURCE.
var containerdConfig = map[Release]string{
	Debian: `version = 2
[plugins."io.containerd.grpc.v1.cri"]
  restrict_oom_score_adj = true
  sandbox_image = %[1]q
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = %[2]q
  [plugins."io.containerd.grpc.v1.cri".registry]
    config_path = "/etc/containerd/certs.d"
`,
	Upstream: `version = 3
[plugins."io.containerd.cri.v1.runtime"]
  restrict_oom_score_adj = true
[plugins."io.containerd.cri.v1.images"]
  snapshotter = %[2]q
  [plugins."io.containerd.cri.v1.images".pinned_images]
    sandbox = %[1]q
  [plugins."io.containerd.cri.v1.images".registry]
    config_path = "/etc/containerd/certs.d"
[plugins."io.containerd.transfer.v1.local"]
  max_concurrent_unpacks = %[3]d
# Pulls unpack for the default snapshotter otherwise, and fail if it is another one.
[[plugins."io.containerd.transfer.v1.local".unpack_config]]
  platform = "linux/amd64"
  snapshotter = %[2]q
`,
}

// StartContainerd starts containerd.service, again if it runs, and waits until it
// is ready. Pods need hostNetwork: there is no CNI.
func (m *Machine) StartContainerd(ctx context.Context, c Containerd) error {
	if c.Snapshotter == "" {
		c.Snapshotter = "overlayfs"
	}
	if c.Unpacks == 0 {
		c.Unpacks = 1
	}
	if c.Unpacks > 1 && c.Release != Upstream {
		return fmt.Errorf("containerd release %q unpacks one layer at a time", c.Release)
	}
	config, ok := containerdConfig[c.Release]
	if !ok {
		return fmt.Errorf("no containerd release %q", c.Release)
	}
	if err := m.WriteFile("/etc/containerd/config.toml", fmt.Appendf(nil, config, c.Sandbox, c.Snapshotter, c.Unpacks), 0o644); err != nil {
		return err
	}
	for registry, url := range c.Mirrors {
		hosts := fmt.Sprintf("server = %q\n", url)
		if err := m.WriteFile("/etc/containerd/certs.d/"+registry+"/hosts.toml", []byte(hosts), 0o644); err != nil {
			return err
		}
	}
	program := "/usr/bin/containerd"
	if c.Release == Debian {
		// What an earlier start installed would come first in the PATH: containerd
		// looks for its shim there.
		if _, err := m.Run(ctx, "sh", "-c", "cd /usr/local/bin && rm -f containerd* ctr runc"); err != nil {
			return err
		}
	} else {
		if err := m.installTools(ctx, "containerd", "runc"); err != nil {
			return err
		}
		program = "/usr/local/bin/containerd"
	}
	return m.restart(ctx, "containerd.service", "[Service]\nExecStart=\nExecStart="+program+"\n")
}

// Docker says which dockerd runs in a machine, and how.
type Docker struct {
	Release Release
	// ImageStore keeps images in containerd, which only Upstream can, instead of
	// the overlay2 graph driver.
	ImageStore bool
	// Config is added to daemon.json.
	Config map[string]any
}

// StartDocker starts docker.service, again if it runs, and waits until it is ready.
// It uses containerd.service, which it starts if need be; Upstream needs that to be
// the upstream one. There is no bridge and no iptables rule: the network is the
// host's, so containers run with --network host or none.
func (m *Machine) StartDocker(ctx context.Context, d Docker) error {
	config := map[string]any{"bridge": "none", "iptables": false, "ip-forward": false, "storage-driver": "overlay2"}
	if d.Release == Upstream {
		config["features"] = map[string]bool{"containerd-snapshotter": d.ImageStore}
		config["ip6tables"] = false
		if d.ImageStore {
			config["storage-driver"] = "overlayfs"
		}
	} else if d.ImageStore {
		return fmt.Errorf("docker release %q has no containerd image store", d.Release)
	}
	maps.Copy(config, d.Config)
	data, err := json.MarshalIndent(config, "", "  ")
	if err != nil {
		return err
	}
	if err := m.WriteFile("/etc/docker/daemon.json", data, 0o644); err != nil {
		return err
	}
	program := "/usr/sbin/dockerd"
	if d.Release == Upstream {
		if err := m.installTools(ctx, "moby"); err != nil {
			return err
		}
		program = "/usr/local/bin/dockerd"
	}
	// Tests restart it more often than systemd's limit on starts allows for.
	return m.restart(ctx, "docker.service", "[Unit]\nStartLimitIntervalSec=0\n[Service]\nExecStart=\n"+
		"ExecStart="+program+" -H fd:// --containerd="+Socket+"\n")
}

// installTools puts pinned programs before Debian's in the machine's PATH.
func (m *Machine) installTools(ctx context.Context, names ...string) error {
	for _, name := range names {
		dir, err := host.Tool(ctx, name)
		if err != nil {
			return err
		}
		files, err := filepath.Glob(filepath.Join(dir, "*"))
		if err != nil {
			return err
		}
		for _, f := range files {
			if err := m.Install(f, "/usr/local/bin/"+filepath.Base(f)); err != nil {
				return fmt.Errorf("installing %s in the machine: %w", f, err)
			}
		}
	}
	return nil
}

// restart restarts a unit with a drop-in of its own and enables it, so that it is
// back after a reboot.
func (m *Machine) restart(ctx context.Context, unit, dropIn string) error {
	if err := m.WriteFile("/etc/systemd/system/"+unit+".d/e2e.conf", []byte(dropIn), 0o644); err != nil {
		return err
	}
	for _, args := range [][]string{{"daemon-reload"}, {"-q", "enable", unit}, {"restart", unit}} {
		if _, err := m.Run(ctx, append([]string{"systemctl"}, args...)...); err != nil {
			log, _ := m.Run(ctx, "journalctl", "-q", "--no-pager", "-o", "cat", "-n", "10", "-u", unit)
			return fmt.Errorf("starting %s: %w; its log: %s", unit, err, strings.TrimSpace(log))
		}
	}
	return nil
}
