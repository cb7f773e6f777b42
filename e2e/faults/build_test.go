//go:build e2e

package faults_test

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/selkies-project/packer-plugin-selkies/e2e/buildvm"
	"github.com/selkies-project/packer-plugin-selkies/e2e/host"
	"github.com/selkies-project/packer-plugin-selkies/e2e/images"
	"github.com/selkies-project/packer-plugin-selkies/e2e/machine"
	"github.com/selkies-project/packer-plugin-selkies/e2e/registry"
	"github.com/selkies-project/packer-plugin-selkies/manifest"
)

// buildLimit is far more than any build takes, cleanLimit than the VM takes to clean up.
const (
	buildLimit = 4 * time.Minute
	cleanLimit = time.Minute
)

// dockerdUnit is the daemon that a build starts on its disk.
const dockerdUnit = "selkies-image-cache-dockerd.service"

// builds are builds of one cache disk after another on one VM.
type builds struct {
	vm   *buildvm.VM
	reg  *registry.Registry
	refs []string

	state string // of the VM without a build
	took  time.Duration
	// blank and older are disks to begin with: an empty one, and one with a cache of
	// some of the images. want is what the layer manifest is in the end.
	blank, older string
	want         *manifest.Manifest
}

func newBuilds(t *testing.T) *builds {
	t.Helper()
	packer, err := buildvm.InstallPacker(t.Context(), t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	b := &builds{reg: registry.New(t, registry.Config{})}
	if b.vm, err = buildvm.Boot(t.Context(), packer, machine.Debian); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := b.vm.Close(); err != nil {
			t.Error(err)
		}
	})
	all, err := catalogue(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if b.refs, err = images.Push(t.Context(), b.reg.Addr, all); err != nil {
		t.Fatal(err)
	}
	b.learn(t)
	return b
}

// learn makes builds without a fault.
func (b *builds) learn(t *testing.T) {
	t.Helper()
	b.state = b.vm.State(t)
	// Of smaller disks mkfs.ext4 makes blocks of 1 KiB, into which not all attributes fit.
	d := buildvm.NewDisk(t, b.vm, 512)
	b.blank = filepath.Join(t.TempDir(), "blank")
	copyDisk(t, d.Image, b.blank)
	b.plain(t, d, b.refs[:2])
	b.older = filepath.Join(t.TempDir(), "older")
	copyDisk(t, d.Image, b.older)
	d = buildvm.OpenDisk(t, b.vm, b.copyOf(t, b.blank))
	start := time.Now()
	b.plain(t, d, b.refs)
	b.took = time.Since(start)
	b.want = normal(t, d)
	t.Logf("a build takes %v", b.took)
}

func (b *builds) copyOf(t *testing.T, image string) string {
	t.Helper()
	to := filepath.Join(t.TempDir(), "disk")
	copyDisk(t, image, to)
	return to
}

// plain runs a build without a fault; it must succeed and leave the VM as it was.
func (b *builds) plain(t *testing.T, d *buildvm.Disk, refs []string) {
	t.Helper()
	out, err := b.vm.Build(t, buildvm.Images(refs...), d.Block(), "verify = true")
	if err != nil {
		t.Fatalf("packer build: %v\n%s", err, out)
	}
	if diff := cmp.Diff(b.state, b.vm.State(t)); diff != "" {
		t.Errorf("after a build the VM is not as it was: %s", diff)
	}
}

// normal is the layer manifest without what differs from build to build.
func normal(t *testing.T, d *buildvm.Disk) *manifest.Manifest {
	t.Helper()
	m, _ := d.Manifest(t)
	m.Created = time.Time{}
	for i := range m.Layers {
		m.Layers[i].Directory = ""
	}
	return m
}

// build is one that is under way.
type build struct {
	*builds
	disk  *buildvm.Disk
	cmd   *exec.Cmd
	out   bytes.Buffer
	ended chan struct{}
}

func (b *builds) start(t *testing.T, d *buildvm.Disk, options ...string) *build {
	t.Helper()
	u := &build{builds: b, disk: d, ended: make(chan struct{})}
	u.cmd = b.vm.PackerBuild(t, append(options, buildvm.Images(b.refs...), d.Block())...)
	u.cmd.Stdout, u.cmd.Stderr = &u.out, &u.out
	if err := u.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		_ = u.cmd.Wait() // what it says is looked at
		close(u.ended)
	}()
	return u
}

// buildFault is something that goes wrong during a build.
type buildFault struct {
	kind string
	// disturb, if any, is what the registry does wrong to some requests.
	disturb registry.Fault
	// fill, if any, fills a disk that has a cache already, before the build, but for a
	// random part of room.
	fill filling
	room int64
	// strike comes at a random moment, and says errNotRunning where there is nothing to
	// strike then.
	strike func(t *testing.T, u *build, r *rand.Rand) error
	// passive is true of a fault that strikes only a build that fails by it.
	passive bool
	// mute is true of what leaves nobody to say what is wrong.
	mute bool
	heal func(t *testing.T, u *build)
}

var buildFaults = []buildFault{
	{kind: "Packer killed", mute: true, strike: func(_ *testing.T, u *build, _ *rand.Rand) error {
		return syscall.Kill(-u.cmd.Process.Pid, syscall.SIGKILL)
	}},
	{kind: "provisioner killed", mute: true, strike: killPlugin},
	{kind: "sshd killed", strike: killSSHD, heal: func(t *testing.T, u *build) { u.vm.Output(t, "systemctl", "restart", "ssh.service") }},
	{kind: "dockerd of a build killed", strike: killUnit(dockerdUnit)},
	{kind: "disk full, build VM", fill: fillDisk, room: 4 << 20, passive: true},
	{kind: "inodes used up, build VM", fill: fillInodes, room: 256, passive: true},
	{kind: "registry stopped", passive: true, strike: func(_ *testing.T, u *build, _ *rand.Rand) error { return u.reg.Stop() },
		heal: func(t *testing.T, u *build) {
			if err := u.reg.Start(); err != nil {
				t.Fatal(err)
			}
		}},
	{kind: "registry: connections dropped", disturb: registry.Drop},
	{kind: "registry: wrong bytes", disturb: registry.Corrupt},
	{kind: "registry: 429", disturb: registry.Busy},
	{kind: "registry: stalls", disturb: registry.Stall},
}

func killPlugin(_ *testing.T, u *build, _ *rand.Rand) error {
	dirs, err := filepath.Glob("/proc/[0-9]*")
	if err != nil {
		return err
	}
	killed := 0
	for _, dir := range dirs {
		pid, err := strconv.Atoi(filepath.Base(dir))
		if err != nil {
			return err
		}
		cmdline, _ := os.ReadFile(filepath.Join(dir, "cmdline"))
		name, _, _ := strings.Cut(string(cmdline), "\x00")
		if group, err := syscall.Getpgid(pid); err != nil || group != u.cmd.Process.Pid || !strings.HasPrefix(filepath.Base(name), "packer-plugin-selkies") {
			continue
		}
		if err := syscall.Kill(pid, syscall.SIGKILL); err == nil {
			killed++
		}
	}
	if killed == 0 {
		return errNotRunning
	}
	return nil
}

// killSSHD kills those of open sessions too.
func killSSHD(_ *testing.T, u *build, _ *rand.Rand) error {
	return killed(u.vm.Machine, "sshd")
}

func killUnit(unit string) func(*testing.T, *build, *rand.Rand) error {
	return func(t *testing.T, u *build, _ *rand.Rand) error {
		if _, err := u.vm.Run(t.Context(), "systemctl", "kill", "--signal=SIGKILL", unit); err != nil {
			return errNotRunning
		}
		return nil
	}
}

// onDisk mounts a disk that no build uses.
func (b *builds) onDisk(t *testing.T, d *buildvm.Disk, f func(dir string)) {
	t.Helper()
	const dir = "/run/disk"
	b.vm.Output(t, "sh", "-ec", "mkdir "+dir+"; mount "+d.Device+" "+dir)
	f(b.vm.Path(dir))
	b.vm.Output(t, "sh", "-ec", "umount "+dir+"; rmdir "+dir)
}

// TestBuild lets one fault after another strike builds.
func TestBuild(t *testing.T) {
	t.Parallel()
	b := newBuilds(t)
	rounds(t, share(40), func(t *testing.T, r *rand.Rand) {
		f := pick(r, buildFaults)
		from := pick(r, []string{b.blank, b.older})
		if f.fill != nil {
			from = b.older
		}
		u, what := b.suffer(t, r, f, from)
		if f.heal != nil {
			f.heal(t, u)
		}
		if f.fill != nil {
			b.onDisk(t, u.disk, func(dir string) {
				if err := os.RemoveAll(filepath.Join(dir, filler)); err != nil {
					t.Error(err)
				}
			})
		}
		checkCache(t, u.disk, what)
		b.plain(t, u.disk, b.refs)
		total.state()
		if diff := cmp.Diff(b.want, normal(t, u.disk)); diff != "" {
			t.Errorf("%s, then a plain build: %s", what, diff)
		}
		u.disk.CheckStore(t, len(b.want.Layers))
		if t.Failed() {
			t.Logf("%s; what the build said:\n%s", what, u.out.String())
		}
	})
}

// suffer runs a build that the fault strikes, and says what happened. The VM has to
// clean up by itself.
func (b *builds) suffer(t *testing.T, r *rand.Rand, f buildFault, from string) (*build, string) {
	t.Helper()
	for {
		var disturbed atomic.Int64
		d := buildvm.OpenDisk(t, b.vm, b.copyOf(t, from))
		var options []string
		what := f.kind
		if f.fill != nil {
			b.onDisk(t, d, func(dir string) {
				if err := f.fill(r, filepath.Join(dir, filler), f.room); err != nil {
					t.Error(err)
				}
			})
		}
		if f.disturb != "" {
			share, random := r.Float64(), rand.New(rand.NewPCG(r.Uint64(), 0))
			faults := make(chan *rand.Rand, 1) // requests come at once
			faults <- random
			b.reg.Disturb(func(*http.Request) registry.Fault {
				r := <-faults
				defer func() { faults <- r }()
				if r.Float64() < share {
					disturbed.Add(1)
					return f.disturb
				}
				return ""
			})
			// The provisioner gives a download that stalls five minutes, Packer what it is told to.
			options = append(options, fmt.Sprintf("timeout = %q", (4*b.took).Round(time.Second)))
		}
		u := b.start(t, d, options...)
		struck := f.strike == nil
		if f.strike != nil {
			after := time.Duration(r.Int64N(int64(b.took)))
			what = fmt.Sprintf("%s, %v into a build", f.kind, after.Round(time.Millisecond))
			if u.runsFor(after) {
				err := f.strike(t, u, r)
				if err != nil && !errors.Is(err, errNotRunning) {
					t.Fatalf("%s: %v", what, err)
				}
				struck = err == nil
			}
		}
		u.wait(t, what)
		b.reg.Disturb(nil)
		b.waitClean(t, what, u)
		status := u.cmd.ProcessState.ExitCode()
		if status != 0 && !f.mute {
			u.checkError(t, what)
		}
		if f.disturb != "" {
			struck = disturbed.Load() > 0
		}
		if struck && (!f.passive || status != 0) {
			t.Logf("%s: exit status %d", what, status)
			total.fault(f.kind)
			return u, what
		}
		if f.heal != nil {
			f.heal(t, u)
		}
	}
}

func (u *build) runsFor(d time.Duration) bool {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-u.ended:
		return false
	case <-timer.C:
		return true
	}
}

func (u *build) wait(t *testing.T, what string) {
	t.Helper()
	u.waitFor(t, what, buildLimit)
}

func (u *build) waitFor(t *testing.T, what string, limit time.Duration) {
	t.Helper()
	timer := time.NewTimer(limit)
	defer timer.Stop()
	select {
	case <-u.ended:
	case <-timer.C:
		_ = syscall.Kill(-u.cmd.Process.Pid, syscall.SIGKILL)
		<-u.ended
		t.Fatalf("%s: the build hangs:\n%s", what, u.out.String())
	}
	// Packer 1.15 panics where it asks a plugin for its options that has been killed.
	out := strings.ReplaceAll(u.out.String(), "panic: ConfigSpec failed: connection is shut down", "")
	if strings.Contains(out, "panic:") && !u.lostCommunicator() {
		t.Errorf("%s: the build says:\n%s", what, out)
	}
}

// lostCommunicator says whether the builder's plugin has ended by the panic of the SDK's
// communicator, at a connection that is reset as it is made: NewClientConn of no connection
// (packer-plugin-sdk 0.6.4). Then all that Packer says is "unexpected EOF".
func (u *build) lostCommunicator() bool {
	return strings.Contains(u.out.String(), "sdk-internals/communicator/ssh.(*comm).reconnect")
}

// checkError wants one line of error, which names an image, the disk or the VM.
func (u *build) checkError(t *testing.T, what string) {
	t.Helper()
	out := u.out.String()
	_, rest, ok := strings.Cut(out, "\n--> null.vm: ")
	line, more, _ := strings.Cut(rest, "\n")
	if next, _, _ := strings.Cut(more, "\n"); !ok || next != "" {
		t.Errorf("%s: the build did not end with one line of error:\n%s", what, out)
		return
	}
	if err := host.CheckLine(line); err != nil {
		t.Errorf("%s: %v", what, err)
	}
	if strings.Contains(out, "Cancelling provisioner after a timeout") || u.lostCommunicator() {
		return // which Packer says instead
	}
	names := append([]string{u.disk.Device, "disk", "build VM"}, u.refs...)
	if !slices.ContainsFunc(names, func(name string) bool { return strings.Contains(line, name) }) {
		t.Errorf("%s: %q names no image, no disk and not the VM", what, line)
	}
}

// waitClean waits for the VM to be as it was before the build.
func (b *builds) waitClean(t *testing.T, what string, u *build) {
	t.Helper()
	deadline := time.Now().Add(cleanLimit)
	for {
		now := b.vm.State(t)
		if now == b.state {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s: %s later the VM is not as it was: %s\n%s", what, cleanLimit, cmp.Diff(b.state, now), u.out.String())
		}
		time.Sleep(200 * time.Millisecond)
	}
}

// checkCache proves every layer that the disk's manifest names, if there is one.
func checkCache(t *testing.T, d *buildvm.Disk, what string) {
	t.Helper()
	if out, err := exec.CommandContext(t.Context(), "blkid", "--probe", d.Device).CombinedOutput(); len(out) == 0 {
		return // still blank
	} else if err != nil {
		t.Fatalf("%s: %v: %s", what, err, out)
	}
	d.Mount(t, func(dir string) {
		if _, err := os.Stat(filepath.Join(dir, manifest.Path)); errors.Is(err, os.ErrNotExist) {
			return
		}
		if _, err := host.Output(exec.CommandContext(t.Context(), world.injector, "verify", "--cache", dir)); err != nil {
			t.Errorf("%s: %v", what, err)
		}
	})
}
