//go:build e2e

package docker_test

import (
	"encoding/json"
	"errors"
	"io/fs"
	"testing"

	"github.com/selkies-project/packer-plugin-selkies/e2e/machine"
	"github.com/selkies-project/packer-plugin-selkies/e2e/treediff"
	"github.com/selkies-project/packer-plugin-selkies/injector/report"
)

// withoutCRI is containerd's configuration where it serves Docker alone.
const withoutCRI = "version = 2\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n"

// ownContainerd is the socket of a containerd that dockerd has started.
const ownContainerd = "/run/docker/containerd/containerd.sock"

// TestAuto registers without --runtime: with containerd if its CRI answers, else with
// a Docker that answers, in the store that this one has, else nowhere.
func TestAuto(t *testing.T) {
	t.Run("Docker 20.10", func(t *testing.T) {
		n := newNode(t, machine.Debian)
		n.attach(t, world.first.image, cacheDir)
		t.Run("beside a CRI", func(t *testing.T) { n.takes(t, "containerd/k8s.io") })
		t.Run("beside a CRI that hangs", func(t *testing.T) {
			before := n.varLib(t)
			n.Output(t, "systemctl", "kill", "--kill-who=main", "--signal=STOP", "containerd")
			n.Refused(t, 1, []string{"selkies-image-injector", "inject"}, "asking containerd at "+machine.Socket, "restart it")
			n.Output(t, "systemctl", "kill", "--kill-who=main", "--signal=CONT", "containerd")
			same(t, "after the refusal", before, n.varLib(t))
		})
		t.Run("on a containerd without a CRI", func(t *testing.T) {
			n.disableCRI(t)
			n.takes(t, "docker")
		})
		t.Run("beside a containerd that is stopped", func(t *testing.T) {
			// Killed, it leaves its socket; stopped then, systemd does not start it again.
			n.Output(t, "systemctl", "kill", "--signal=KILL", "containerd")
			n.Output(t, "systemctl", "stop", "containerd")
			n.Output(t, "test", "-S", machine.Socket)
			var r report.Inject
			n.auto(t, &r, "plan")
			if r.Runtime != "docker" {
				t.Errorf("it takes %s", r.Runtime)
			}
		})
		t.Run("on a containerd of its own", func(t *testing.T) {
			n.Output(t, "systemctl", "stop", "docker.socket", "docker.service", "containerd")
			n.Output(t, "systemctl", "mask", "--now", "containerd")
			n.Output(t, "rm", "-f", machine.Socket)
			err := n.WriteFile("/etc/systemd/system/docker.service.d/own.conf", []byte("[Service]\nExecStart=\nExecStart=/usr/sbin/dockerd -H fd://\n"), 0o644)
			if err != nil {
				t.Fatal(err)
			}
			n.start(t)
			n.takes(t, "docker")
			n.takes(t, "docker", "--containerd-address", ownContainerd)
		})
		t.Run("stopped", func(t *testing.T) {
			n.stop(t)
			before := n.varLib(t)
			n.Refused(t, 1, []string{"selkies-image-injector", "inject"}, "no container runtime", "containerd is not running at "+machine.Socket,
				"Cannot connect to the Docker daemon", "start one of them, or use --runtime docker")
			same(t, "after the refusal", before, n.varLib(t))
		})
	})
	t.Run("Docker 29", func(t *testing.T) {
		n := newNode(t, machine.Upstream)
		n.docker.ImageStore = true
		n.start(t)
		n.disableCRI(t)
		n.attach(t, world.first.image, cacheDir)
		n.takes(t, "containerd/moby")
		n.docker.ImageStore = false
		n.start(t)
		n.takes(t, "docker")
	})
}

// disableCRI restarts containerd without it, and Docker.
func (n *node) disableCRI(t *testing.T) {
	t.Helper()
	if err := n.WriteFile("/etc/containerd/config.toml", []byte(withoutCRI), 0o644); err != nil {
		t.Fatal(err)
	}
	n.Output(t, "systemctl", "restart", "containerd")
	n.start(t)
}

// auto runs the injector without --runtime and decodes its report.
func (n *node) auto(t *testing.T, report any, args ...string) {
	t.Helper()
	out := n.Output(t, append([]string{"selkies-image-injector", "--output", "json"}, args...)...)
	if err := json.Unmarshal([]byte(out), report); err != nil {
		t.Fatalf("%v says %q: %v", args, out, err)
	}
}

// takes injects and ejects, both of which have to choose the runtime want.
func (n *node) takes(t *testing.T, want string, flags ...string) {
	t.Helper()
	layers := len(world.first.manifest.Layers)
	var in report.Inject
	n.auto(t, &in, append(flags, "inject")...)
	if in.Runtime != want || in.Disks[0].Registered != layers {
		t.Errorf("inject registers %d of %d layers with %s, want %s", in.Disks[0].Registered, layers, in.Runtime, want)
	}
	var out report.Eject
	n.auto(t, &out, append(flags, "eject")...)
	if out.Runtime != want || out.Layers != layers {
		t.Errorf("eject takes %d of %d layers from %s, want %s", out.Layers, layers, out.Runtime, want)
	}
}

// varLib is all that runtimes and the injector keep on the node.
func (n *node) varLib(t *testing.T) treediff.Tree {
	t.Helper()
	all := treediff.Tree{}
	for _, dir := range []string{dataRoot, "/var/lib/containerd", stateDir} {
		tree, err := treediff.Dir(n.Path(dir))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Fatal(err)
		}
		for name, e := range tree {
			all[dir+"/"+name] = e
		}
	}
	return all
}
