//go:build e2e

package docker_test

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/selkies-project/packer-plugin-selkies/e2e/cachedisk"
	"github.com/selkies-project/packer-plugin-selkies/e2e/machine"
	"github.com/selkies-project/packer-plugin-selkies/injector/report"
)

// TestInterrupted stops inject as Ctrl-C does: docker runs afterwards. What a killed one
// has half written is gone after eject.
func TestInterrupted(t *testing.T) {
	n := newNode(t, releases[0].docker)
	before := n.store(t)
	n.attach(t, world.first.image, cacheDir)
	for _, after := range []string{"0.1", "0.3", "0.6", "0.9", "1.2", "1.5"} {
		_, err := n.Run(t.Context(), "timeout", "-s", "INT", after, "selkies-image-injector", "--runtime", "docker", "inject")
		t.Logf("after %s s: %v", after, err)
		if state, _ := n.Run(t.Context(), "systemctl", "is-active", "docker.service", "docker.socket"); state != "active\nactive\n" {
			t.Errorf("after %s s docker's units are %q", after, state)
		}
		n.Output(t, "docker", "images")
	}
	n.inject(t)
	n.hello(t, ref("deep:latest"))
	for _, dir := range []string{"", "selkies-image-cache", "distribution/v2metadata-by-diffid/sha256", "distribution/diffid-by-digest/sha256"} {
		if err := n.WriteFile(filepath.Join("/var/lib/docker/image/overlay2", dir, ".selkies-image-cache"), []byte("{"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	n.eject(t)
	same(t, "after eject", before, n.store(t))
}

// TestOtherNamespace injects as a DaemonSet's pod does: from a mount namespace of
// its own, which alone has the disk, with the host's root in a directory.
func TestOtherNamespace(t *testing.T) {
	n := newNode(t, releases[0].docker)
	before := n.store(t)
	detach := n.attach(t, world.first.image, "/mnt/source")
	n.Output(t, "sh", "-ec", `mkdir -p /mnt/host /mnt/pvc
		dev=$(findmnt -n -o SOURCE /mnt/source); umount /mnt/source
		unshare -m --propagation private sh -ec "mount -o ro,noload $dev /mnt/pvc; mount --rbind / /mnt/host
			selkies-image-injector --runtime docker --host-root /mnt/host --cache /mnt/pvc inject"`)
	n.hello(t, ref("deep:latest"))
	n.hello(t, ref("odd-files:latest"))
	n.eject(t)
	same(t, "after eject", before, n.store(t))
	if out, err := n.Run(t.Context(), "grep", stateDir, "/proc/1/mountinfo"); err == nil {
		t.Errorf("still mounted: %s", out)
	}
	detach()
}

// TestConcurrent runs four injectors at once.
func TestConcurrent(t *testing.T) {
	n := newNode(t, releases[0].docker)
	n.attach(t, world.first.image, cacheDir)
	errs := make(chan error)
	for range 4 {
		go func() {
			_, err := n.Run(t.Context(), "selkies-image-injector", "--runtime", "docker", "inject")
			errs <- err
		}()
	}
	for range 4 {
		if err := <-errs; err != nil {
			t.Error(err)
		}
	}
	n.hello(t, ref("deep:latest"))
}

// TestLocked has docker start while inject waits for another injector: what was true
// before the wait is not any more.
func TestLocked(t *testing.T) {
	n := newNode(t, releases[0].docker)
	n.attach(t, world.first.image, cacheDir)
	n.stop(t)
	n.Output(t, "sh", "-ec", "mkdir -p "+runDir+"; systemd-run -q --unit holder flock "+runDir+"/docker.lock sleep 1000")
	n.wait(t, "the lock is free", func() bool {
		_, err := n.Run(t.Context(), "flock", "-n", runDir+"/docker.lock", "true")
		return err != nil
	})
	done := make(chan error, 1)
	go func() {
		_, err := n.Run(t.Context(), "selkies-image-injector", "--runtime", "docker", "inject")
		done <- err
	}()
	n.wait(t, "inject does not wait", func() bool {
		_, err := n.Run(t.Context(), "sh", "-c", "ls -l /proc/$(pidof selkies-image-injector)/fd | grep docker.lock")
		return err == nil
	})
	n.Output(t, "systemctl", "start", "docker.socket", "docker.service")
	n.Output(t, "systemctl", "stop", "holder")
	if err := <-done; err != nil {
		t.Error(err)
	}
	n.hello(t, ref("deep:latest"))
}

// TestNote has the note of stopped units that a killed run leaves behind.
func TestNote(t *testing.T) {
	n := newNode(t, releases[0].docker)
	n.attach(t, world.first.image, cacheDir)
	n.inject(t)
	note := runDir + "/docker-stopped.json"
	leave := func() {
		if err := n.WriteFile(note, []byte(`["docker.socket","docker.service"]`), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	removed := func() {
		t.Helper()
		if _, err := os.Stat(n.Path(note)); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("the note: %v", err)
		}
	}
	t.Run("docker runs", func(t *testing.T) {
		// systemd has finished the start that the run had asked for.
		n.Output(t, "docker", "run", "-d", "--name", "busy", "--network", "none", ref("deep:latest"), "/bin/sleep", "1000")
		pid := n.pid(t)
		leave()
		n.inject(t)
		if n.pid(t) != pid {
			t.Error("docker was restarted")
		}
		if out := n.Output(t, "docker", "inspect", "-f", "{{.State.Running}}", "busy"); out != "true\n" {
			t.Errorf("the container runs: %s", out)
		}
		removed()
		n.Output(t, "docker", "rm", "-f", "busy")
	})
	t.Run("docker starts", func(t *testing.T) {
		n.stop(t)
		slow := "/etc/systemd/system/docker.service.d/slow.conf"
		if err := n.WriteFile(slow, []byte("[Service]\nExecStartPre=/bin/sleep 3\n"), 0o644); err != nil {
			t.Fatal(err)
		}
		n.Output(t, "sh", "-ec", "systemctl daemon-reload; systemctl start --no-block docker.service")
		leave()
		n.wait(t, "docker.service does not start", func() bool {
			state, _ := n.Run(t.Context(), "systemctl", "is-active", "docker.service")
			return state == "activating\n"
		})
		start := func() string { return n.Output(t, "systemctl", "show", "-P", "InvocationID", "docker.service") }
		first := start()
		n.inject(t)
		if start() != first {
			t.Error("docker was started twice")
		}
		removed()
		n.hello(t, ref("deep:latest"))
		n.Output(t, "sh", "-ec", "rm "+slow+"; systemctl daemon-reload")
	})
	t.Run("docker is stopped", func(t *testing.T) {
		n.stop(t)
		leave()
		n.inject(t)
		removed()
		n.hello(t, ref("deep:latest"))
	})
}

// TestReboot reboots with registered images: without the disk containers fail, with
// it they run, whether it is mounted by the system or by inject.
func TestReboot(t *testing.T) {
	for _, r := range releases {
		t.Run(r.name, func(t *testing.T) {
			n := newNode(t, r.docker)
			detach := n.attach(t, world.first.image, cacheDir)
			n.inject(t)
			n.Output(t, "docker", "create", "--name", "many", "--network", "none", ref("deep:latest"), "/bin/echo", "hello")
			n.Output(t, "docker", "create", "--name", "one", "--network", "none", ref("one-layer:latest"), "/bin/echo", "hello")
			if err := n.Reboot(t.Context()); err != nil {
				t.Fatal(err)
			}
			detach()
			for _, c := range []string{"many", "one"} {
				if out, err := n.Run(t.Context(), "docker", "start", "-a", c); err == nil {
					t.Errorf("container %s started without its layers and said %q", c, out)
				}
			}
			for _, image := range []string{ref("deep:latest"), ref("one-layer:latest")} {
				if out, err := n.Run(t.Context(), "docker", "run", "--rm", "--network", "none", image); err == nil {
					t.Errorf("%s ran without its layers and said %q", image, out)
				}
			}
			var regs []report.Registration
			if err := n.injector(t, &regs, "status"); err == nil || len(regs) == 0 || regs[0].Readable {
				t.Errorf("status says of a missing disk %v, %+v", err, regs)
			}
			var refs []report.Reference
			if err := n.injector(t, &refs, "plan", "--cache", "/nowhere", ref("deep:latest")); err == nil && refs[0].Cover == report.Hit {
				t.Errorf("plan says of a missing disk %+v", refs)
			}

			// The disk comes back where it was, by fstab or a mount unit.
			mountpoint := stateDir + "/" + strings.TrimPrefix(world.first.id(t), "sha256:")
			n.attach(t, world.first.image, mountpoint)
			for _, c := range []string{"many", "one"} {
				if out := n.Output(t, "docker", "start", "-a", c); out != "hello\n" {
					t.Errorf("container %s said %q", c, out)
				}
			}
			n.hello(t, ref("odd-files:latest"))

			// Or inject mounts it, without a restart.
			n.Output(t, "umount", mountpoint)
			n.attach(t, world.first.image, cacheDir)
			pid := n.pid(t)
			n.inject(t)
			if n.pid(t) != pid {
				t.Error("mounting the disk again restarted docker")
			}
			n.hello(t, ref("deep:latest"))
		})
	}
}

// TestStopped registers while docker does not run.
func TestStopped(t *testing.T) {
	n := newNode(t, releases[0].docker)
	n.attach(t, world.first.image, cacheDir)
	n.stop(t)
	r := n.inject(t)
	t.Logf("%d layers in %d ms", r.Disks[0].Registered, r.Milliseconds)
	if state, _ := n.Run(t.Context(), "systemctl", "is-active", "docker.service", "docker.socket"); state != "inactive\ninactive\n" {
		t.Errorf("docker's units are %q", state)
	}
	n.refused(t, []string{"eject"}, "not running", "start it")
	n.Output(t, "systemctl", "start", "docker.service")
	n.hello(t, ref("deep:latest"))
}

// TestBind reaches layers by bind mounts.
func TestBind(t *testing.T) {
	n := newNode(t, releases[0].docker)
	before := n.store(t)
	sum := cachedisk.Checksum(t, world.first.image)
	n.attach(t, world.first.image, cacheDir)
	n.inject(t, "--link", "bind")
	for _, image := range world.refs {
		n.hello(t, image)
	}
	mounts := func() int {
		out, _ := n.Run(t.Context(), "grep", "-c", "/overlay2/[0-9a-f]*/diff ", "/proc/self/mountinfo")
		var count int
		_, _ = fmt.Sscan(out, &count)
		return count
	}
	layers := len(world.first.manifest.Layers)
	if got := mounts(); got != layers {
		t.Errorf("%d bind mounts for %d layers", got, layers)
	}
	// dockerd unmounts everything in its store as it stops.
	n.Output(t, "systemctl", "restart", "docker.service")
	pid := n.pid(t)
	n.inject(t, "--link", "bind")
	if got := mounts(); got != layers {
		t.Errorf("%d bind mounts for %d layers after a restart", got, layers)
	}
	if n.pid(t) != pid {
		t.Error("binding again restarted docker")
	}
	// As after a boot: inject before Docker starts.
	n.stop(t)
	if got := mounts(); got != 0 {
		t.Errorf("%d bind mounts while docker is stopped", got)
	}
	n.inject(t, "--link", "bind")
	n.Output(t, "systemctl", "start", "docker.socket", "docker.service")
	if got := mounts(); got != layers {
		t.Errorf("%d bind mounts for %d layers after inject and start", got, layers)
	}
	n.hello(t, ref("deep:latest"))
	n.Output(t, "docker", "rmi", ref("odd-files:latest"))
	n.hello(t, ref("deep:latest"))
	n.eject(t)
	if got := mounts(); got != 0 {
		t.Errorf("%d bind mounts after eject", got)
	}
	same(t, "after eject", before, n.store(t))
	if cachedisk.Checksum(t, world.first.image) != sum {
		t.Error("the cache disk was written to")
	}
}

// TestRefused is everything that inject must not touch.
func TestRefused(t *testing.T) {
	n := newNode(t, releases[0].docker)
	n.attach(t, world.first.image, cacheDir)
	inject := []string{"inject"}

	t.Run("not root", func(t *testing.T) {
		before := n.state(t)
		n.Refused(t, 1, []string{"setpriv", "--reuid", "1000", "--clear-groups", "selkies-image-injector", "--runtime", "docker", "inject"}, "not root")
		same(t, "after a refusal", before.files, n.state(t).files)
	})
	t.Run("no look at the host", func(t *testing.T) {
		// As a container that lacks the capability.
		weak := []string{"setpriv", "--bounding-set", "-sys_ptrace", "selkies-image-injector", "--runtime", "docker"}
		for _, command := range []string{"inject", "status", "eject"} {
			n.Refused(t, 1, append(slices.Clone(weak), command), dataRoot, "permission denied", "CAP_SYS_PTRACE")
		}
		// And one that has a PID namespace of its own, and a root without Docker's files.
		n.Refused(t, 1, []string{"unshare", "--mount", "--pid", "--fork", "--mount-proc", "sh", "-ec",
			"mount -t tmpfs none " + dataRoot + "; exec selkies-image-injector --runtime docker inject"}, dataRoot, "--host-root", "PID namespace")
	})
	t.Run("running containers", func(t *testing.T) {
		n.Output(t, "docker", "pull", "-q", ref("one-layer:latest"))
		n.Output(t, "docker", "run", "-d", "--name", "busy", "--network", "none", ref("one-layer:latest"), "/bin/sleep", "1000")
		n.refused(t, inject, "busy", "live-restore", "--docker-restart-running")
		var planned report.Inject
		if err := n.injector(t, &planned, "plan"); err != nil || !planned.Restart || !strings.Contains(planned.Refusal, "busy") {
			t.Errorf("plan says %+v, %v", planned, err)
		}
		// With live-restore containers survive.
		n.docker.Config = map[string]any{"live-restore": true}
		n.Output(t, "docker", "rm", "-f", "busy")
		n.start(t)
		n.Output(t, "docker", "run", "-d", "--name", "busy", "--network", "none", ref("one-layer:latest"), "/bin/sleep", "1000")
		before := n.store(t)
		if r := n.inject(t); !r.Restart {
			t.Errorf("inject says of no restart: %+v", r)
		}
		if out := n.Output(t, "docker", "inspect", "-f", "{{.State.Running}}", "busy"); out != "true\n" {
			t.Errorf("the container runs: %s", out)
		}
		n.hello(t, ref("deep:latest"))
		// The container's image is the node's own, on a layer of its own.
		n.eject(t)
		same(t, "after eject", before, n.store(t))
		n.Output(t, "docker", "rm", "-f", "busy")
		n.docker.Config = nil
		n.start(t)
		// Or when it is allowed to end them.
		n.Output(t, "docker", "run", "-d", "--name", "busy", "--network", "none", ref("one-layer:latest"), "/bin/sleep", "1000")
		n.inject(t, "--docker-restart-running")
		n.Output(t, "docker", "rm", "-f", "busy")
		n.eject(t)
	})
	t.Run("not under systemd", func(t *testing.T) {
		n.fresh(t)
		n.stop(t)
		n.otherDocker(t)
		n.refused(t, inject, "docker.service", "stop it")
		n.Output(t, "systemctl", "stop", "other")
	})
	t.Run("it listens elsewhere", func(t *testing.T) {
		n.start(t)
		n.refused(t, []string{"inject", "--docker-host", "unix:///run/elsewhere.sock"}, "process "+n.pid(t), dataRoot, "--docker-host")
	})
	t.Run("another one listens elsewhere", func(t *testing.T) {
		n.stop(t)
		elsewhere := []string{"-H", "unix:///run/other.sock", "--pidfile", "/run/other.pid"}
		pid := n.otherDocker(t, elsewhere...)
		n.refused(t, inject, "process "+pid+" on data root "+dataRoot, "--docker-host")
		n.refused(t, []string{"inject", "--docker-root", dataRoot + "/../docker"}, "process "+pid)
		n.Output(t, "systemctl", "stop", "other")

		// Nobody can tell any more what it was started with.
		config := "/etc/docker/other.json"
		n.Output(t, "sh", "-ec", `sed '1s,{,{"data-root": "`+dataRoot+`"\,,' /etc/docker/daemon.json >`+config)
		pid = n.otherDocker(t, append(elsewhere, "--config-file="+config)...)
		n.refused(t, inject, "process "+pid+" on data root "+dataRoot)
		n.Output(t, "rm", config)
		n.refused(t, inject, "process "+pid, config, "stop it")
		n.Output(t, "systemctl", "stop", "other")

		// One with a store of its own, which may not lie on an overlay, does not matter.
		n.otherDocker(t, append(elsewhere, "--data-root=/var/lib/kubelet/docker", "--exec-root=/run/docker-other")...)
		before := n.store(t)
		n.inject(t)
		n.Output(t, "systemctl", "stop", "other")
		n.start(t)
		n.hello(t, ref("deep:latest"))
		n.eject(t)
		same(t, "after eject", before, n.store(t))
	})
	t.Run("another data root", func(t *testing.T) {
		n.start(t)
		n.refused(t, []string{"inject", "--docker-root", "/srv"}, "/srv", dataRoot)
		n.stop(t)
		for _, root := range []string{"/srv", "/nowhere"} {
			n.refused(t, []string{"inject", "--docker-root", root}, root, "no overlay2 store", "--docker-root")
		}
		n.refused(t, []string{"inject", "--docker-root", "/etc/passwd"}, "/etc/passwd", "not a directory")
		if _, err := os.Stat(n.Path("/nowhere")); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("a missing data root: %v", err)
		}
		n.start(t)
	})
	t.Run("another storage driver", func(t *testing.T) {
		n.docker.Config = map[string]any{"storage-driver": "vfs", "data-root": "/var/lib/docker-vfs"}
		n.start(t)
		n.refused(t, inject, "vfs", "overlay2", "daemon.json")
		n.stop(t)
		n.refused(t, []string{"inject", "--docker-root", "/var/lib/docker-vfs"}, "/var/lib/docker-vfs", "no overlay2 store", "storage driver")
	})
	t.Run("userns-remap", func(t *testing.T) {
		n.docker.Config = map[string]any{"userns-remap": "default"}
		n.start(t)
		n.refused(t, inject, "userns-remap", "daemon.json")
		root := strings.TrimSpace(n.Output(t, "docker", "info", "-f", "{{.DockerRootDir}}"))
		n.stop(t)
		n.refused(t, []string{"inject", "--docker-root", root}, root, "userns-remap", "daemon.json")
	})
	n.docker.Config = nil
	for _, tt := range []struct{ name, mkfs, fill, want string }{
		{"no inodes", "-N 300", "true", "inodes free"},
		{"no bytes", "-b 4096 -N 16000", "fallocate -l $(df --output=avail -B1 /mnt/small | tail -n 1) /mnt/small/fill", "bytes free"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			small := n.emptyDisk(t)
			n.Output(t, "sh", "-ec", fmt.Sprintf("mkfs.ext4 -q %s %[2]s; mkdir -p /mnt/small; mount %[2]s /mnt/small", tt.mkfs, small))
			n.docker.Config = map[string]any{"data-root": "/mnt/small"}
			n.start(t)
			n.Output(t, "sh", "-ec", tt.fill)
			n.refused(t, inject, "/mnt/small", tt.want, "make room")
			n.stop(t)
			n.Output(t, "umount", "/mnt/small")
			n.docker.Config = nil
		})
	}
	t.Run("a damaged disk", func(t *testing.T) {
		n.start(t)
		n.Output(t, "sh", "-ec", "mkdir -p /run/bad/selkies-image-cache; head -c 1000 /cache/selkies-image-cache/manifest.json >/run/bad/selkies-image-cache/manifest.json")
		n.refused(t, []string{"inject", "--cache", "/run/bad"}, "/run/bad", "truncated")
		n.Output(t, "cp", "/cache/selkies-image-cache/manifest.json", "/run/bad/selkies-image-cache/manifest.json")
		n.refused(t, []string{"inject", "--cache", "/run/bad"}, "/run/bad", "layer")
	})
	t.Run("the write fails", func(t *testing.T) {
		// Nothing can be renamed into an immutable directory.
		before := n.store(t)
		pid := n.pid(t)
		n.Output(t, "sh", "-ec", "chattr +i "+dataRoot+"/image/overlay2/imagedb/content/sha256")
		n.Refused(t, 1, []string{"selkies-image-injector", "--runtime", "docker", "inject"}, "registering image")
		n.Output(t, "chattr", "-i", dataRoot+"/image/overlay2/imagedb/content/sha256")
		if n.pid(t) == pid || n.pid(t) == "0" {
			t.Error("docker was not started again")
		}
		if got, want := n.Output(t, "docker", "images", "-q"), ""; got != want {
			t.Errorf("images are half visible: %q", got)
		}
		n.inject(t)
		n.hello(t, ref("deep:latest"))
		n.eject(t)
		same(t, "after eject", before, n.store(t))
	})
}

// otherDocker starts a dockerd that is not docker.service, and returns its process.
func (n *node) otherDocker(t *testing.T, args ...string) (pid string) {
	t.Helper()
	n.Output(t, append([]string{"systemd-run", "-q", "--unit", "other", "-p", "Type=notify", "/usr/sbin/dockerd",
		"--containerd", machine.Socket}, args...)...)
	return strings.TrimSpace(n.Output(t, "systemctl", "show", "-P", "MainPID", "other"))
}
