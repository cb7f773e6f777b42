//go:build e2e

package agent_test

import (
	"fmt"
	"io"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/selkies-project/packer-plugin-selkies/e2e/cachedisk"
	"github.com/selkies-project/packer-plugin-selkies/e2e/host"
	"github.com/selkies-project/packer-plugin-selkies/e2e/machine"
	"github.com/selkies-project/packer-plugin-selkies/manifest"
)

// TestRun registers, reads ahead, opens the gate and ends on SIGTERM, which harms nothing.
func TestRun(t *testing.T) {
	t.Parallel()
	disk := traced(t)
	onEach(t, func(t *testing.T, n *node) {
		n.MountDisk(t, disk, cacheDir, "ro,noload")
		if got := n.busybox(t); got > 0 {
			t.Errorf("%d bytes of busybox are in memory before", got)
		}
		a := n.start(t)
		n.waitReady(t)
		n.checkReadAhead(t, a)
		for _, ref := range world.refs {
			if line := fmt.Sprintf("%s: %d/%[2]d layers (100%%) from the cache", ref, layersOf(t, ref)); !strings.Contains(a.log.String(), line) {
				t.Errorf("the log does not say %q", line)
			}
			if !n.pinned(t, ref) {
				t.Errorf("%s is not pinned", ref)
			}
		}
		for name, want := range map[string]float64{
			`ready`: 1, `gate_open`: 1, `images{state="registered"}`: chains + 1, `images{state="failed"}`: 0,
			`layers`: float64(len(world.cache.Layers)), `image_layers_cached_ratio{image="` + world.refs[0] + `"}`: 1,
			`disk_readable{cache_id="` + cacheID(t) + `"}`:           1,
			`build_timestamp_seconds{cache_id="` + cacheID(t) + `"}`: float64(world.cache.Created.Unix()),
		} {
			if got := n.metric(t, name); got != want {
				t.Errorf("metric %s is %v, want %v", name, got, want)
			}
		}
		if status, body, err := n.get(t, "/healthz"); status != http.StatusOK {
			t.Errorf("/healthz: %d %s %v", status, body, err)
		}
		n.waitReadyz(t, http.StatusOK)
		n.runs(t, world.refs[0])
		n.background(t, world.refs[1], "stays")
		before := n.ctr(t, "images", "ls")
		a.stop(t)
		if diff := cmp.Diff(before, n.ctr(t, "images", "ls")); diff != "" {
			t.Errorf("the agent's end changed: %s", diff)
		}
		if leases := n.ctr(t, "leases", "ls", "-q"); leases != "" {
			t.Errorf("leases: %s", leases)
		}
		// By the exit status: ctr 1.6 may lose what a program prints that ends at once.
		n.ctr(t, "tasks", "exec", "--exec-id", "x", "stays", "/bin/busybox", "test", "-x", "/bin/busybox")
		n.runs(t, world.refs[2])
		n.ctr(t, "tasks", "kill", "-s", "SIGKILL", "stays")

		// By its environment alone, as in kubectl exec.
		env := []string{"env", "SELKIES_RUNTIME=containerd", "SELKIES_CACHE=" + cacheDir, "SELKIES_OUTPUT=text", program}
		for _, args := range [][]string{{"status"}, {"plan"}, {"plan", world.refs[0]}} {
			if out := n.Output(t, slices.Concat(env, args)...); !strings.Contains(out, world.refs[0]) {
				t.Errorf("%v: %s", args, out)
			}
		}
		out := n.Output(t, "sh", "-ec", program+" inject --runtime containerd --cache "+cacheDir+" --read-ahead --log-level info 2>&1")
		for _, line := range []string{`msg="read ahead" image=` + world.refs[0] + " bytes=65.54kB left=0B files=1 ", `msg="not read ahead" image=` + world.refs[1]} {
			if !strings.Contains(out, line) {
				t.Errorf("inject does not say %q: %s", line, out)
			}
		}
		n.Refused(t, 2, []string{"env", "SELKIES_RUNTIME=podman", program, "status"}, "podman")
	})
}

// TestHeal takes labels and images away and has them back, or reported.
func TestHeal(t *testing.T) {
	t.Parallel()
	onEach(t, func(t *testing.T, n *node) {
		n.attach(t)
		pin, removed := world.refs[0], world.refs[1]
		a := n.start(t)
		n.waitReady(t)

		n.ctr(t, "images", "label", pin, "io.cri-containerd.pinned=")
		waitFor(t, "the pin", func() bool { return n.pinned(t, pin) })
		n.waitMetric(t, `heals_total{reason="pin"}`, is(1))
		// What imagePullPolicy: Always does. containerd 2 replaces all labels by it.
		n.pull(t, pin)
		waitFor(t, "the pin after a pull", func() bool { return n.pinned(t, pin) })

		n.remove(t, removed)
		n.waitMetric(t, `images{state="removed"}`, is(1))
		// Another pass, for another reason, leaves it alone.
		n.ctr(t, "images", "label", pin, "io.cri-containerd.pinned=")
		waitFor(t, "the pin again", func() bool { return n.pinned(t, pin) })
		if n.has(t, removed) {
			t.Errorf("%s was removed and is back", removed)
		}
		if !strings.Contains(a.log.String(), "ImageRemoved") {
			t.Error("the log does not say that an image was removed")
		}
		n.pull(t, removed)
		n.waitMetric(t, `images{state="removed"}`, is(0))
		a.stop(t)

		n.remove(t, removed)
		a = n.start(t, "--restore-removed")
		n.waitReady(t)
		if !n.has(t, removed) {
			t.Error("what was removed is not registered at start")
		}
		n.remove(t, removed)
		waitFor(t, "the removed image", func() bool { return n.has(t, removed) })
		n.waitMetric(t, `heals_total{reason="removed"}`, atLeast(1))
		n.runs(t, removed)
		a.stop(t)

		a = n.start(t)
		n.waitReady(t)
		for _, ref := range world.refs {
			n.remove(t, ref)
		}
		n.waitMetric(t, `images{state="removed"}`, is(chains+1))
		if got := n.metric(t, "ready"); got != 0 {
			t.Errorf("ready without an image is %v", got)
		}
		waitFor(t, "the log to say that nothing is left", func() bool { return strings.Contains(a.log.String(), "reason=NothingRegistered") })
	})
}

// TestRestart restarts containerd, stops it for a while, and empties its state.
func TestRestart(t *testing.T) {
	t.Parallel()
	onEach(t, func(t *testing.T, n *node) {
		n.attach(t)
		n.Output(t, "systemctl", "stop", "containerd")
		n.start(t)
		n.waitMetric(t, "ready", is(0))
		n.Output(t, "systemctl", "start", "containerd")
		n.waitReady(t)

		n.Output(t, "systemctl", "restart", "containerd")
		n.waitWatch(t, world.refs[0])

		n.Output(t, "systemctl", "stop", "containerd")
		// The disk's mount is below it and cannot be removed: it is read-only.
		if _, err := n.Run(t.Context(), "sh", "-c", "rm -rf "+stateDir+"/*"); err == nil {
			t.Log("nothing was mounted below containerd's directory")
		}
		n.Output(t, "systemctl", "start", "containerd")
		n.cri(t)
		n.waitMetric(t, `heals_total{reason="runtime"}`, atLeast(chains+1))
		for _, ref := range world.refs[:chains] {
			n.runs(t, ref)
		}
		if got := n.mounts(t); got != 1 {
			t.Errorf("%d mounts below containerd's directory, want 1", got)
		}

		// Where the disk is gone as well, its mount is not left in the way of pulls.
		n.Output(t, "systemctl", "stop", "containerd")
		n.Output(t, "umount", cacheDir)
		if _, err := n.Run(t.Context(), "sh", "-c", "rm -rf "+stateDir+"/*"); err == nil {
			t.Error("nothing was mounted below containerd's directory: this shows nothing")
		}
		n.Output(t, "systemctl", "start", "containerd")
		n.cri(t)
		waitFor(t, "the forgotten mount to go", func() bool { return n.mounts(t) == 0 })
		n.pull(t, world.refs[0])
		n.runs(t, world.refs[0])

		// Debian's is upgraded.
		n.attach(t)
		n.waitReady(t)
		if err := n.StartContainerd(t.Context(), machine.Containerd{Release: machine.Upstream, Sandbox: world.pause}); err != nil {
			t.Fatal(err)
		}
		n.waitWatch(t, world.refs[1])
		for _, ref := range world.refs[:chains] {
			n.runs(t, ref)
		}
	})
}

// waitWatch waits until the agent answers changes to an image, after containerd has
// come back.
func (n *node) waitWatch(t testing.TB, ref string) {
	t.Helper()
	n.cri(t)
	const heals = `heals_total{reason="pin"}`
	before := n.metric(t, heals)
	waitFor(t, "the pin", func() bool {
		if n.pinned(t, ref) {
			n.ctr(t, "images", "label", ref, "io.cri-containerd.pinned=")
		}
		return n.metric(t, heals) > before
	})
}

// TestLate starts the agent before the disk is there: the gate opens at its deadline,
// and the disk's images come when it does.
func TestLate(t *testing.T) {
	t.Parallel()
	n := newNode(t, machine.Upstream)
	a := n.start(t, "--gate-deadline=10s")
	n.waitMetric(t, "gate_open", is(0))
	n.waitReadyz(t, http.StatusServiceUnavailable)
	n.waitMetric(t, "gate_open", is(1))
	if n.metric(t, "ready") != 0 || !strings.Contains(a.log.String(), "NoCacheDisk") {
		t.Errorf("without a disk: ready is %v", n.metric(t, "ready"))
	}
	// A rollout goes on to other nodes.
	n.waitReadyz(t, http.StatusOK)
	n.pull(t, world.refs[0])
	n.runs(t, world.refs[0])
	n.attach(t)
	n.waitReady(t)
	n.runs(t, world.refs[1])
	// What the node has wins.
	if got := n.metric(t, `image_layers_cached_ratio{image="`+world.refs[0]+`"}`); got != 0 {
		t.Errorf("share of the layers of an image that was pulled: %v", got)
	}
}

// TestBroken opens the gate at its deadline though nothing can be registered.
func TestBroken(t *testing.T) {
	t.Parallel()
	for name, c := range map[string]struct {
		spoil  func(t *testing.T, n *node)
		reason string
	}{
		"manifest": {func(t *testing.T, n *node) {
			n.MountDisk(t, copyDisk(t), cacheDir, "rw")
			n.Output(t, "truncate", "-s", "100", filepath.Join(cacheDir, manifest.Path))
		}, "BrokenManifest"},
		"snapshotter": {func(t *testing.T, n *node) {
			n.attach(t)
			err := n.StartContainerd(t.Context(), machine.Containerd{Release: machine.Upstream, Sandbox: world.pause, Snapshotter: "native"})
			if err != nil {
				t.Fatal(err)
			}
		}, "UnsupportedSnapshotter"},
	} {
		t.Run(name, func(t *testing.T) {
			t.Parallel()
			n := newNode(t, machine.Upstream)
			c.spoil(t, n)
			a := n.start(t, "--gate-deadline=2s")
			n.waitMetric(t, "gate_open", is(1))
			waitFor(t, "the log", func() bool { return strings.Contains(a.log.String(), "reason="+c.reason) })
			if out := n.ctr(t, "images", "ls", "-q"); out != "" {
				t.Errorf("registered all the same: %s", out)
			}
		})
	}
}

// TestGone has the disk fail: what was registered is ejected, except what a
// container uses, and pods pull. When the disk is there again, so are its images.
func TestGone(t *testing.T) {
	t.Parallel()
	onEach(t, func(t *testing.T, n *node) {
		image := copyDisk(t)
		n.MountDisk(t, image, cacheDir, "ro,noload")
		used := world.refs[0]
		n.start(t, "--gone-after=3s")
		n.waitReady(t)
		n.background(t, used, "user")

		// The kernel goes on answering from memory, the device fails every read.
		if err := os.Truncate(image, 0); err != nil {
			t.Fatal(err)
		}
		n.waitMetric(t, `disk_readable{cache_id="`+cacheID(t)+`"}`, is(0))
		if got := n.metric(t, "ready"); got != 0 {
			t.Errorf("ready without the disk is %v", got)
		}
		for _, ref := range world.refs[1:chains] {
			waitFor(t, ref+" to be ejected", func() bool { return !n.has(t, ref) })
		}
		if !n.has(t, used) {
			t.Errorf("%s is used and was ejected", used)
		}
		// It may have died by itself, of a page of its program that could not be read.
		_, _ = n.Run(t.Context(), "ctr", "-n", "k8s.io", "tasks", "kill", "-s", "SIGKILL", "user")
		waitFor(t, "the container's end", func() bool { return strings.Contains(n.ctr(t, "tasks", "ls"), "STOPPED") })
		n.ctr(t, "tasks", "rm", "user")
		n.ctr(t, "containers", "rm", "user")
		waitFor(t, "the last image to be ejected", func() bool { return !n.has(t, used) })
		n.waitMetric(t, `disk_readable{cache_id="`+cacheID(t)+`"}`, is(-1))
		waitFor(t, "the disk's mount to go", func() bool { return n.mounts(t) == 0 })
		for _, ref := range []string{used, world.refs[1]} {
			n.pull(t, ref)
			n.runs(t, ref)
		}

		// A disk that is put in its place.
		n.Output(t, "umount", "-l", cacheDir)
		n.attach(t)
		n.waitReady(t)
		n.runs(t, world.refs[2])
	})
}

// TestDocker registers in Docker's store: at start, and when the disk comes back. A
// container that runs is not disturbed by any of it.
func TestDocker(t *testing.T) {
	t.Parallel()
	n := newNode(t, machine.Debian)
	if err := n.StartDocker(t.Context(), machine.Docker{Release: machine.Debian, Config: map[string]any{"live-restore": true}}); err != nil {
		t.Fatal(err)
	}
	n.runtime = "docker"
	daemon := func() string {
		return n.Output(t, "systemctl", "show", "-P", "ExecMainStartTimestampMonotonic", "docker")
	}
	detach := n.attach(t)
	a := n.start(t, "--gone-after=3s")
	n.waitReady(t)
	runs := func(ref string) {
		t.Helper()
		if out := n.Output(t, "docker", "run", "--rm", "--network=host", ref, "/bin/busybox", "echo", "runs"); strings.TrimSpace(out) != "runs" {
			t.Errorf("a container of %s says %q", ref, out)
		}
	}
	runs(world.refs[0])
	started := daemon()
	a.stop(t)
	a = n.start(t, "--gone-after=3s")
	n.waitReady(t)
	mount := strings.TrimSpace(n.Output(t, "sh", "-c", "findmnt -rno TARGET | grep /var/lib/selkies-image-cache/"))
	n.Output(t, "umount", mount)
	n.waitMetric(t, `heals_total{reason="mount"}`, is(1))
	runs(world.refs[1])
	if daemon() != started {
		t.Error("dockerd was restarted though nothing was missing")
	}

	n.Output(t, "umount", mount, cacheDir)
	detach()
	waitFor(t, "the images to be ejected", func() bool { return n.Output(t, "docker", "images", "-q") == "" })
	n.Output(t, "docker", "pull", "-q", world.refs[0])
	runs(world.refs[0])
	n.attach(t)
	n.waitReady(t)
	runs(world.refs[1])
	a.stop(t)

	// As after a reboot, where images cannot be registered: those that are, run.
	if err := n.StartDocker(t.Context(), machine.Docker{Release: machine.Debian}); err != nil {
		t.Fatal(err)
	}
	n.Output(t, "docker", "run", "-d", "--network=host", world.refs[0], "/bin/busybox", "sleep", "86400")
	n.Output(t, "docker", "rmi", world.refs[1])
	n.Output(t, "umount", mount)
	a = n.start(t, "--gate-deadline=2s")
	waitFor(t, "the log", func() bool { return strings.Contains(a.log.String(), "registering needs a restart of docker") })
	runs(world.refs[2])
}

// TestMount unmounts the disk under the containers' feet: as long as it is anywhere,
// it is mounted again.
func TestMount(t *testing.T) {
	t.Parallel()
	n := newNode(t, machine.Upstream)
	image := copyDisk(t)
	n.MountDisk(t, image, cacheDir, "ro,noload")
	a := n.start(t)
	n.waitReady(t)
	n.Output(t, "umount", n.anchor(t))
	n.waitMetric(t, `heals_total{reason="mount"}`, is(1))
	n.runs(t, world.refs[0])
	// Its own directory may go: the mount that containers use serves as well.
	n.Output(t, "umount", cacheDir)
	n.ctr(t, "images", "label", world.refs[0], "io.cri-containerd.pinned=")
	waitFor(t, "the pin", func() bool { return n.pinned(t, world.refs[0]) })
	n.waitReady(t)

	// The device fails, and the same disk is attached as another one.
	device := n.anchorDevice(t)
	if err := os.Truncate(image, 0); err != nil {
		t.Fatal(err)
	}
	n.waitMetric(t, `disk_readable{cache_id="`+cacheID(t)+`"}`, is(0))
	again := copyDisk(t)
	n.MountDisk(t, again, cacheDir, "ro,noload")
	n.waitMetric(t, `heals_total{reason="mount"}`, is(2))
	if now := n.anchorDevice(t); now == device {
		t.Errorf("the mount is still of the device %s, which fails", device)
	}
	if got := n.mounts(t); got != 1 {
		t.Errorf("%d mounts below containerd's directory, want 1", got)
	}
	n.waitReady(t)
	n.runs(t, world.refs[1])
	replaced := regexp.MustCompile(`mounted the cache disk again: cache disk not readable: .*input/output error.* reason=Healed`)
	if !replaced.MatchString(a.log.String()) {
		t.Error("the log does not say why the mount was replaced")
	}

	// The same while no agent runs.
	a.stop(t)
	if err := os.Truncate(again, 0); err != nil {
		t.Fatal(err)
	}
	n.Output(t, "umount", "-l", cacheDir)
	n.attach(t)
	a = n.start(t)
	n.waitReady(t)
	n.runs(t, world.refs[2])
	if !replaced.MatchString(a.log.String()) {
		t.Error("the next agent's log does not say why the mount was replaced")
	}
}

// TestNoRoom has a node without room for registrations: its disk is mounted all the
// same, for the images that it has, and one that is gone is ejected.
func TestNoRoom(t *testing.T) {
	t.Parallel()
	n := newNode(t, machine.Upstream)
	n.Output(t, "systemctl", "stop", "containerd")
	n.Output(t, "mount", "-t", "tmpfs", "-o", "size=200m", "tmpfs", stateDir)
	n.Output(t, "systemctl", "start", "containerd")
	n.cri(t)
	image := copyDisk(t)
	n.MountDisk(t, image, cacheDir, "ro,noload")
	a := n.start(t)
	n.waitReady(t)
	a.stop(t)

	// As after a reboot.
	n.Output(t, "umount", n.anchor(t))
	n.ctr(t, "images", "rm", world.refs[0])
	n.Output(t, "sh", "-c", "fallocate -l $(($(df --output=avail -k "+stateDir+" | tail -1) - 16384))k "+stateDir+"/full")
	// The same images as another generation, of which there is nothing on the node yet.
	const other = "/mnt/disks/other"
	n.MountDisk(t, copyDisk(t), other, "rw")
	next := *world.cache
	next.Created = next.Created.AddDate(0, 0, 1)
	if err := cachedisk.WriteManifest(n.Path(other), &next); err != nil {
		t.Fatal(err)
	}
	a = n.start(t, "--cache", other, "--gone-after=3s", "--gate-deadline=2s")
	waitFor(t, "the log", func() bool { return strings.Contains(a.log.String(), "no room on the node") })
	n.runs(t, world.refs[1])

	if err := os.Truncate(image, 0); err != nil {
		t.Fatal(err)
	}
	waitFor(t, "the images of the disk that is gone to be ejected", func() bool { return !n.has(t, world.refs[1]) })
}

// anchor is where the cache disk is mounted for containerd.
func (n *node) anchor(t testing.TB) string {
	t.Helper()
	return strings.TrimSpace(n.Output(t, "sh", "-c", "findmnt -rno TARGET | grep "+stateDir+"/io.containerd.snapshotter"))
}

// anchorDevice is the device number of the disk that is mounted there.
func (n *node) anchorDevice(t testing.TB) string {
	t.Helper()
	return strings.TrimSpace(n.Output(t, "findmnt", "-rno", "MAJ:MIN", n.anchor(t)))
}

// TestReboot has systemd start the agent: after a reboot it waits for the disk and
// mounts it, and nothing is registered anew.
func TestReboot(t *testing.T) {
	t.Parallel()
	onEach(t, func(t *testing.T, n *node) {
		detach := n.attach(t)
		unit := "[Unit]\nAfter=containerd.service\n[Service]\nExecStart=" + program + " " + strings.Join(n.args("--gone-after=10m"), " ") +
			"\n[Install]\nWantedBy=multi-user.target\n"
		if err := n.WriteFile("/etc/systemd/system/agent.service", []byte(unit), 0o644); err != nil {
			t.Fatal(err)
		}
		n.Output(t, "systemctl", "-q", "enable", "--now", "agent")
		n.waitReady(t)
		before := n.ctr(t, "images", "ls")
		if err := n.Reboot(t.Context()); err != nil {
			t.Fatal(err)
		}
		detach()
		n.waitMetric(t, "ready", is(0))
		if _, err := n.Run(t.Context(), "ctr", "-n", "k8s.io", "run", "--rm", world.refs[0], "early", "/bin/busybox", "true"); err == nil {
			t.Error("a container started without the disk")
		}
		n.attach(t)
		n.waitReady(t)
		n.runs(t, world.refs[0])
		if diff := cmp.Diff(before, n.ctr(t, "images", "ls")); diff != "" {
			t.Errorf("the reboot changed: %s", diff)
		}
		log := n.Output(t, "journalctl", "-q", "-b", "-u", "agent", "-o", "cat")
		if !strings.Contains(log, "ready: ") || strings.Contains(log, "reason=Registered") {
			t.Errorf("images were registered anew after the reboot, or the log is not the agent's: %s", log)
		}
		if got := n.mounts(t); got != 1 {
			t.Errorf("%d mounts below containerd's directory, want 1", got)
		}
	})
}

// mounts counts those below the snapshotter's directory.
func (n *node) mounts(t testing.TB) int {
	t.Helper()
	return strings.Count(n.Output(t, "cat", "/proc/self/mountinfo"), " "+stateDir+"/io.containerd.snapshotter")
}

// copyDisk is a cache disk of one's own.
func copyDisk(t testing.TB) string {
	t.Helper()
	name := filepath.Join(t.TempDir(), "disk")
	info, err := os.Stat(world.disk)
	if err != nil {
		t.Fatal(err)
	}
	if err := host.NewDisk(name, info.Size()); err != nil {
		t.Fatal(err)
	}
	in, err := os.Open(world.disk)
	if err != nil {
		t.Fatal(err)
	}
	defer in.Close()
	out, err := os.OpenFile(name, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	if _, err := io.Copy(out, in); err != nil {
		t.Fatal(err)
	}
	return name
}

func cacheID(t testing.TB) string {
	t.Helper()
	id, err := world.cache.ID()
	if err != nil {
		t.Fatal(err)
	}
	return id.String()
}

// layersOf is the length of the image's chain.
func layersOf(t testing.TB, ref string) int {
	t.Helper()
	for _, img := range world.cache.Images {
		if slices.Contains(img.Names, ref) {
			chain, err := img.ChainIDs()
			if err != nil {
				t.Fatal(err)
			}
			return len(chain)
		}
	}
	t.Fatalf("no %s on the disk", ref)
	return 0
}
