//go:build e2e

package provisioner_test

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/selkies-project/packer-plugin-selkies/e2e/buildvm"
	"github.com/selkies-project/packer-plugin-selkies/e2e/registry"
)

// serveBlob is a registry in front of another that leaves to serve how one blob comes.
func serveBlob(t *testing.T, reg *registry.Registry, blob v1.Hash, serve func(http.ResponseWriter, *http.Request, *http.Response)) (addr string) {
	t.Helper()
	target := &url.URL{Scheme: "http", Host: reg.Addr}
	proxy := httputil.NewSingleHostReverseProxy(target)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodGet || !strings.HasSuffix(r.URL.Path, "/blobs/"+blob.String()) {
			proxy.ServeHTTP(w, r)
			return
		}
		resp, err := http.Get(target.String() + r.URL.Path)
		if err != nil {
			http.Error(w, err.Error(), http.StatusBadGateway)
			return
		}
		defer resp.Body.Close()
		w.Header().Set("Content-Length", resp.Header.Get("Content-Length"))
		serve(w, r, resp)
	}))
	t.Cleanup(server.Close)
	return server.Listener.Addr().String()
}

// stalling is a registry that serves half of a blob and then nothing more.
type stalling struct {
	addr    string
	stalled chan struct{} // closed by then
}

func (s *stalling) hasStalled() bool {
	select {
	case <-s.stalled:
		return true
	default:
		return false
	}
}

func newStalling(t *testing.T, reg *registry.Registry, blob v1.Hash) *stalling {
	t.Helper()
	s := &stalling{stalled: make(chan struct{})}
	ending := make(chan struct{})
	var once sync.Once
	s.addr = serveBlob(t, reg, blob, func(w http.ResponseWriter, r *http.Request, resp *http.Response) {
		_, _ = io.CopyN(w, resp.Body, resp.ContentLength/2)
		w.(http.Flusher).Flush()
		once.Do(func() { close(s.stalled) })
		select {
		case <-r.Context().Done():
		case <-ending:
		}
	})
	// Before the server closes, which waits for its requests.
	t.Cleanup(func() { close(ending) })
	return s
}

// cancelLimit stands for "within seconds" on a machine that does much else. It is
// short of all that a build that does not notice waits for: another answer of a
// registry that stalls, the limits on cleaning up, the minutes for which the SSH
// communicator blocks on a stream that nobody reads.
const cancelLimit = 30 * time.Second

// ending is a way in which a build can end.
type ending struct {
	name   string
	signal syscall.Signal
	// group is true of a signal to all of Packer's processes.
	group bool
}

var endings = []ending{
	{"Ctrl-C in a terminal", syscall.SIGINT, true},
	// Packer's parent process passes on SIGTERM only.
	{"SIGTERM to Packer", syscall.SIGTERM, false},
	{"SIGKILL to all of Packer", syscall.SIGKILL, true},
}

// building is a build that is under way.
type building struct {
	*exec.Cmd
	// out is what it said, once it has ended.
	out   bytes.Buffer
	ended chan error
}

// start starts a build and waits until it has come to a point.
func (v *vm) start(t *testing.T, reached func() bool, options ...string) *building {
	t.Helper()
	b := &building{Cmd: v.PackerBuild(t, options...), ended: make(chan error, 1)}
	b.Stdout, b.Stderr = &b.out, &b.out
	if err := b.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { b.ended <- b.Wait() }()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for !reached() {
		select {
		case <-tick.C:
		case err := <-b.ended:
			t.Fatalf("the build ended too soon: %v\n%s", err, b.out.String())
		}
	}
	return b
}

// cancel ends a build when it has come to a point, and waits for Packer to end and for
// the VM to be as it was.
func (v *vm) cancel(t *testing.T, e ending, reached func() bool, options ...string) {
	t.Helper()
	before := v.State(t)
	b := v.start(t, reached, options...)
	started := time.Now()
	pid := b.Process.Pid
	if e.group {
		pid = -pid
	}
	if err := syscall.Kill(pid, e.signal); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-b.ended:
		if err == nil {
			t.Errorf("the build succeeded:\n%s", b.out.String())
		}
	case <-time.After(cancelLimit):
		t.Fatalf("Packer goes on %s after the signal", cancelLimit)
	}
	t.Logf("Packer ended after %s", time.Since(started).Round(time.Millisecond))
	// The VM cleans up by itself, also when nobody is left to wait for it.
	after := v.State(t)
	for after != before && time.Since(started) < cancelLimit {
		after = v.State(t)
	}
	if diff := cmp.Diff(before, after); diff != "" {
		t.Errorf("%s after the signal the VM is not as it was: %s\n%s", cancelLimit, diff, b.out.String())
	}
	t.Logf("the VM was clean after %s", time.Since(started).Round(time.Millisecond))
}

// inStore finds files of the store on the disk that a build has mounted.
func (v *vm) inStore(t *testing.T, pattern string) []string {
	t.Helper()
	files, err := filepath.Glob(filepath.Join(v.Path("/mnt/selkies-image-cache/docker"), pattern))
	if err != nil {
		t.Fatal(err)
	}
	return files
}

// layerDescriptor is an image's layer, as the registry has it.
func layerDescriptor(t *testing.T, image v1.Image, i int) v1.Descriptor {
	t.Helper()
	m, err := image.Manifest()
	if err != nil {
		t.Fatal(err)
	}
	return m.Layers[i]
}

// TestCancel ends a build in the middle of a download, in every way in which a build
// can end, and finds the VM as it was and the disk good for the next build.
func TestCancel(t *testing.T) {
	t.Parallel()
	v := debian(t)
	reg := registry.New(t, registry.Config{})
	image := newImage(t, layer(t, map[string]int{"small": 1 << 20}), layer(t, map[string]int{"large": 8 << 20}))
	pushed(t, reg, "app:1", image)
	for _, e := range endings {
		t.Run(e.name, func(t *testing.T) {
			slow := newStalling(t, reg, layerDescriptor(t, image, 1).Digest)
			d := newDisk(t, v, 256)
			v.cancel(t, e, slow.hasStalled, buildvm.Images(slow.addr+"/app:1"), d.Block())
			v.MustBuild(t, buildvm.Images(reg.Addr+"/app:1"), d.Block(), "verify = true")
			d.CheckStore(t, 2)
		})
	}
}

// TestCancelExtraction ends a build while Docker unpacks a layer of many small files.
func TestCancelExtraction(t *testing.T) {
	t.Parallel()
	v := debian(t)
	reg := registry.New(t, registry.Config{})
	const files = 15000
	sizes := map[string]int{}
	for i := range files {
		sizes[fmt.Sprintf("%05d", i)] = 10
	}
	image := newImage(t, layer(t, map[string]int{"small": 1 << 20}), layer(t, sizes))
	ref := pushed(t, reg, "app:1", image)
	for _, e := range endings {
		t.Run(e.name, func(t *testing.T) {
			d := newDisk(t, v, 1024) // for the inodes
			unpacking := func() bool { return len(v.inStore(t, "overlay2/*/diff/0*")) > files/100 }
			v.cancel(t, e, unpacking, buildvm.Images(ref), d.Block())
			v.MustBuild(t, buildvm.Images(ref), d.Block(), "verify = true")
			d.CheckStore(t, 2)
		})
	}
}

// TestKilledDaemon has the daemon on the disk die when it has one layer of two. The
// layer has no image, but Docker has registered it and never pulls it again.
func TestKilledDaemon(t *testing.T) {
	t.Parallel()
	v := debian(t)
	reg := registry.New(t, registry.Config{})
	base := layer(t, map[string]int{"base": 1 << 20})
	alone, image := newImage(t, base), newImage(t, base, layer(t, map[string]int{"large": 8 << 20}))
	baseRef, appRef := pushed(t, reg, "base:1", alone), pushed(t, reg, "app:1", image)
	slow := newStalling(t, reg, layerDescriptor(t, image, 1).Digest)
	d := newDisk(t, v, 256)
	before := v.State(t)
	// By the blob's digest Docker knows that it has the layer. It writes that last.
	registered := func() bool {
		return slow.hasStalled() && len(v.inStore(t, "image/overlay2/distribution/diffid-by-digest/sha256/[0-9a-f]*")) > 0
	}
	b := v.start(t, registered, buildvm.Images(slow.addr+"/app:1"), d.Block(), "max_pull_attempts = 1")
	v.Output(t, "systemctl", "kill", "--signal=SIGKILL", "selkies-image-cache-dockerd.service")
	if err := <-b.ended; err == nil {
		t.Fatalf("the build succeeded:\n%s", b.out.String())
	}
	t.Log(errorLine(t, b.out.String()))
	if diff := cmp.Diff(before, v.State(t)); diff != "" {
		t.Errorf("the VM is not as it was: %s", diff)
	}

	reg.Reset()
	v.MustBuild(t, buildvm.Images(baseRef), d.Block(), "verify = true")
	if blobs := layerBlobs(t, reg, alone); len(blobs) > 0 {
		t.Errorf("pulled %v again", blobs)
	}
	d.CheckStore(t, 1)
	m, _ := d.Manifest(t)
	d.Mount(t, func(dir string) {
		fi, err := os.Stat(filepath.Join(dir, m.LayerPath(m.Layers[0]), "base"))
		if err != nil || fi.Size() != 1<<20 {
			t.Errorf("the layer is not complete: %v", err)
		}
	})
	v.MustBuild(t, buildvm.Images(baseRef, appRef), d.Block(), "verify = true")
	d.CheckStore(t, 2)
}

// TestLeftovers builds on a disk that an earlier build has mounted and runs a daemon
// on, as after the Packer host lost its power: the connection is still there.
func TestLeftovers(t *testing.T) {
	t.Parallel()
	v := debian(t)
	reg := registry.New(t, registry.Config{})
	image := newImage(t, layer(t, map[string]int{"large": 8 << 20}))
	ref := pushed(t, reg, "app:1", image)
	slow := newStalling(t, reg, layerDescriptor(t, image, 0).Digest)
	d := newDisk(t, v, 256)
	before := v.State(t)
	first := v.start(t, slow.hasStalled, buildvm.Images(slow.addr+"/app:1"), d.Block())
	// Stopped, Packer keeps its connection and answers nothing any more.
	if err := syscall.Kill(-first.Process.Pid, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	out := v.MustBuild(t, buildvm.Images(ref), d.Block())
	if err := syscall.Kill(-first.Process.Pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	if err := <-first.ended; err == nil {
		t.Error("the build that was killed succeeded")
	}
	if !strings.Contains(out, "which an earlier build left running") {
		t.Errorf("does not say that it stopped the earlier build:\n%s", out)
	}
	if diff := cmp.Diff(before, v.State(t)); diff != "" {
		t.Errorf("the VM is not as it was: %s", diff)
	}
}

// TestLeftoverStops builds while an earlier build's unit is still at work on the disk,
// as when a cancelled build has much to write back.
func TestLeftoverStops(t *testing.T) {
	t.Parallel()
	v := debian(t)
	reg := registry.New(t, registry.Config{})
	ref := pushed(t, reg, "app:1", newImage(t, layer(t, map[string]int{"a": 1000})))
	for _, unit := range []string{"selkies-image-cache.service", "selkies-image-cache-dockerd.service"} {
		t.Run(unit, func(t *testing.T) {
			d := newDisk(t, v, 64)
			before := v.State(t)
			release := "/run/release-" + unit
			v.Output(t, "systemd-run", "--unit="+unit, "--collect", "--quiet", "--property=TimeoutStopSec=600",
				"--property=ExecStopPost=-/bin/sh -c 'until test -e "+release+"; do sleep 0.1; done'", "true")
			t.Cleanup(func() { v.Run(context.Background(), "touch", release) })
			stopping := func() bool { return strings.Contains(v.Output(t, "systemctl", "list-jobs"), unit) }
			b := v.start(t, stopping, buildvm.Images(ref), d.Block())
			if out, err := exec.Command("blkid", "--probe", d.Device).CombinedOutput(); len(out) > 0 {
				t.Errorf("the disk changed meanwhile: %s (%v)", out, err)
			}
			v.Output(t, "touch", release)
			if err := <-b.ended; err != nil {
				t.Errorf("packer build: %v\n%s", err, b.out.String())
			}
			if diff := cmp.Diff(before, v.State(t)); diff != "" {
				t.Errorf("the VM is not as it was: %s", diff)
			}
		})
	}
}

// TestNoSystemd has a VM whose systemd cannot be asked: the disk stays as it is.
func TestNoSystemd(t *testing.T) {
	t.Parallel()
	v := debian(t)
	reg := registry.New(t, registry.Config{})
	ref := pushed(t, reg, "app:1", newImage(t, layer(t, map[string]int{"a": 1000})))
	d := newDisk(t, v, 64)
	hide := v.Path("/usr/bin/systemctl")
	if err := os.Rename(hide, hide+".hidden"); err != nil {
		t.Fatal(err)
	}
	out, err := v.Build(t, buildvm.Images(ref), d.Block())
	if err := os.Rename(hide+".hidden", hide); err != nil {
		t.Fatal(err)
	}
	if err == nil || !strings.Contains(errorLine(t, out), "disk { ... } needs a VM that runs systemd") {
		t.Errorf("packer build: %v\n%s", err, out)
	}
	if out, err := exec.Command("blkid", "--probe", d.Device).CombinedOutput(); len(out) > 0 {
		t.Errorf("the disk changed: %s (%v)", out, err)
	}
}
