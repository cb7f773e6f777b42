package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/selkies-project/packer-plugin-selkies/e2e/host"
	"github.com/selkies-project/packer-plugin-selkies/e2e/machine"
	"github.com/selkies-project/packer-plugin-selkies/injector/containerd"
	"github.com/selkies-project/packer-plugin-selkies/injector/report"
)

// Where the runtimes keep everything.
const (
	containerdRoot = "/var/lib/containerd"
	dockerRoot     = "/var/lib/docker"
)

// node is a machine with one of the runtimes, which begins anew for each measurement.
type node struct {
	*machine.Machine
	root    string // of the runtime, a file system of its own
	device  string // that it is on
	unpacks int    // of the containerd that is configured
}

// storeSize is that of a runtime's file system. A pull of the desktop takes half of it.
const storeSize = 5 << 30

// newNode boots a node, with Debian's Docker or the pinned containerd.
func (s *session) newNode(root string) (*node, error) {
	name := strings.TrimPrefix(root, "/var/lib/")
	s.progress("booting a node with %s", name)
	m, err := machine.Boot(s.ctx, machine.Config{Name: name})
	if err != nil {
		return nil, err
	}
	s.cleanup = append(s.cleanup, m.Close)
	n := &node{Machine: m, root: root}
	if err := n.Install(s.injector, "/usr/local/bin/selkies-image-injector"); err != nil {
		return nil, err
	}
	store := filepath.Join(s.dir, name+".img")
	if err := writeZeros(store, storeSize); err != nil {
		return nil, err
	}
	loop, err := host.AttachLoop(store, false)
	if err != nil {
		return nil, err
	}
	s.cleanup = append(s.cleanup, loop.Close)
	n.device = loop.Path
	if err := n.AttachDisk(n.device, "store"); err != nil {
		return nil, err
	}
	return n, n.fresh(s.ctx)
}

// writeZeros makes a file of size bytes that are really there: nothing has to be
// allocated for what is written to it later.
func writeZeros(file string, size int64) error {
	f, err := os.OpenFile(file, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	zeros := make([]byte, 1<<20)
	for ; size > 0 && err == nil; size -= int64(len(zeros)) {
		_, err = f.Write(zeros)
	}
	return errors.Join(err, f.Sync(), f.Close())
}

// anew stops the runtimes, and makes and mounts a new file system for one of them: on an
// old one what was deleted costs, and is there for the next to be reused. Nothing of it is
// left to be initialized in the background.
//
//	sh -c anew ROOT DEVICE
const anew = `systemctl stop docker.socket docker.service containerd.service
grep -E " ($0|/var/lib/selkies-image-cache)(/| )" /proc/self/mounts | cut -d " " -f 2 | tac | grep -vx "$0" | xargs -r umount -l
umount "$1" 2>/dev/null
rm -rf /var/lib/selkies-image-cache
mkfs.ext4 -q -F -E nodiscard,lazy_itable_init=0,lazy_journal_init=0 "$1" && mount "$1" "$0" && chmod 711 "$0"`

// fresh gives the node a runtime that never had an image, and cold caches.
func (n *node) fresh(ctx context.Context) error { return n.freshWith(ctx, 1) }

// freshWith is fresh, with a containerd that unpacks so many layers at a time.
func (n *node) freshWith(ctx context.Context, unpacks int) error {
	if _, err := n.Run(ctx, "sh", "-c", anew, n.root, n.device); err != nil {
		return err
	}
	if err := n.start(ctx, unpacks); err != nil {
		return err
	}
	return host.DropCaches()
}

func (n *node) start(ctx context.Context, unpacks int) error {
	configured := n.unpacks == unpacks
	n.unpacks = unpacks
	if n.root == dockerRoot {
		if configured {
			return n.startDockerd(ctx)
		}
		return n.StartDocker(ctx, machine.Docker{Release: machine.Debian})
	}
	if configured {
		if _, err := n.Run(ctx, "systemctl", "start", "containerd.service"); err != nil {
			return err
		}
	} else if err := n.StartContainerd(ctx, machine.Containerd{Release: machine.Upstream, Unpacks: unpacks}); err != nil {
		return err
	}
	return n.awaitCRI(ctx)
}

func (n *node) startDockerd(ctx context.Context) error {
	if err := n.forgetStarts(ctx); err != nil {
		return err
	}
	_, err := n.Run(ctx, "systemctl", "start", "docker.service")
	return err
}

// forgetStarts has systemd start units again that it has started often of late.
func (n *node) forgetStarts(ctx context.Context) error {
	_, err := n.Run(ctx, "systemctl", "reset-failed")
	return err
}

// startTimeout is many times what containerd needs, on a slow machine too.
const startTimeout = time.Minute

// awaitCRI waits for what containerd starts last.
func (n *node) awaitCRI(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		ok, err := containerd.ServesCRI(ctx, n.Path(machine.Socket))
		if ok {
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			log, _ := n.Run(context.WithoutCancel(ctx), "journalctl", "-q", "--no-pager", "-o", "cat", "-n", "20", "-p", "warning", "-u", "containerd.service")
			return fmt.Errorf("waiting for the CRI: %w; containerd's log: %s", errors.Join(err, ctx.Err()), log)
		}
	}
}

// attached is a cache disk that is attached to a node and mounted there.
type attached struct {
	*disk
	node *node
	dir  string // where it is mounted
	loop *host.Loop
}

// attach attaches a cache disk as GKE does.
func (s *session) attach(n *node, d *disk) (*attached, error) {
	loop, err := host.AttachLoop(d.file, true)
	if err != nil {
		return nil, err
	}
	s.cleanup = append(s.cleanup, loop.Close)
	return s.attachLoop(n, d, loop)
}

// attachLoop attaches a cache disk that is on a loop device.
func (s *session) attachLoop(n *node, d *disk, loop *host.Loop) (*attached, error) {
	name := filepath.Base(loop.Path)
	a := &attached{disk: d, node: n, dir: "/mnt/disks/" + name, loop: loop}
	if err := n.AttachDisk(loop.Path, name); err != nil {
		return nil, err
	}
	if _, err := n.Run(s.ctx, "mkdir", "-p", a.dir); err != nil {
		return nil, err
	}
	_, err := n.Run(s.ctx, "mount", "-o", "ro,noload", loop.Path, a.dir)
	return a, err
}

// warm reads what an injection reads, and its program.
func (a *attached) warm(ctx context.Context) error {
	args := append([]string{"selkies-image-injector", "plan"}, a.flags()...)
	if _, err := a.node.Run(ctx, args...); err != nil {
		return err
	}
	// For those that copy Docker's metadata.
	_, err := a.node.Run(ctx, "grep", "-r", "-q", "--exclude-dir=diff", "no such text", filepath.Join(a.dir, a.manifest.Store.Root))
	if exit, ok := errors.AsType[*exec.ExitError](err); ok && exit.ExitCode() == 1 {
		return nil // there is none
	}
	return err
}

// flags are those that the injector needs.
func (a *attached) flags() []string {
	return []string{"--cache", a.dir, "--runtime", strings.TrimPrefix(a.node.root, "/var/lib/")}
}

// timed runs a command on the node and takes its time.
func (n *node) timed(ctx context.Context, args ...string) (string, time.Duration, error) {
	began := time.Now()
	out, err := n.Run(ctx, args...)
	return out, time.Since(began), err
}

// inject registers the disk's images, and fails unless it was all of them.
func (a *attached) inject(ctx context.Context, options ...string) (time.Duration, error) {
	r, took, err := a.injector(ctx, options...)
	if err != nil {
		return 0, err
	}
	if got, want := r.Disks[0].Registered, len(a.manifest.Layers); got != want {
		return 0, fmt.Errorf("inject registered %d layers, not %d", got, want)
	}
	return took, nil
}

// injectAgain runs inject where nothing is to be done, and fails if it did something.
func (a *attached) injectAgain(ctx context.Context, options ...string) (time.Duration, error) {
	r, took, err := a.injector(ctx, options...)
	if err != nil {
		return 0, err
	}
	for _, img := range r.Disks[0].Images {
		if img.State != report.Present {
			return 0, fmt.Errorf("inject has %s %s again", img.State, img.Names[0])
		}
	}
	return took, nil
}

func (a *attached) injector(ctx context.Context, options ...string) (*report.Inject, time.Duration, error) {
	args := slices.Concat([]string{"selkies-image-injector", "inject", "--output", "json"}, a.flags(), options)
	out, took, err := a.node.timed(ctx, args...)
	if err != nil {
		return nil, 0, err
	}
	var r report.Inject
	if err := json.Unmarshal([]byte(out), &r); err != nil {
		return nil, 0, fmt.Errorf("decoding inject's report: %w", err)
	}
	return &r, took, nil
}

// reads is what has been read from a block device.
type reads struct{ requests, bytes int64 }

func (a *attached) reads() (r reads, err error) {
	data, err := os.ReadFile(filepath.Join("/sys/block", filepath.Base(a.loop.Path), "stat"))
	if err != nil {
		return r, err
	}
	// Documentation/block/stat.rst: requests, merged, sectors of 512 bytes.
	fields := strings.Fields(string(data))
	if r.requests, err = strconv.ParseInt(fields[0], 10, 64); err != nil {
		return r, err
	}
	r.bytes, err = strconv.ParseInt(fields[2], 10, 64)
	r.bytes *= 512
	return r, err
}

// manifestSize is that of the layer manifest's file.
func (a *attached) manifestSize() (int64, error) {
	fi, err := os.Stat(a.node.Path(filepath.Join(a.dir, "selkies-image-cache/manifest.json")))
	if err != nil {
		return 0, err
	}
	return fi.Size(), nil
}

// copyLayers copies the disk's layers to the node's own disk.
func (a *attached) copyLayers(ctx context.Context) (time.Duration, error) {
	args := []string{"sh", "-ec", `mkdir "$1"; cp -a -t "$@"; sync -f "$1"`, "copy", a.node.root + "/copy"}
	for _, l := range a.manifest.Layers {
		args = append(args, filepath.Dir(filepath.Join(a.dir, a.manifest.LayerPath(l))))
	}
	_, took, err := a.node.timed(ctx, args...)
	return took, err
}
