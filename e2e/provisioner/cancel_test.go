//go:build e2e

package provisioner_test

import (
	"bytes"
	"io"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/selkies-project/packer-plugin-selkies/e2e/registry"
	"github.com/selkies-project/packer-plugin-selkies/manifest"
)

// stalling is a registry in front of another that serves half of a blob and then
// nothing more.
type stalling struct {
	addr    string
	stalled chan struct{}
}

func newStalling(t *testing.T, reg *registry.Registry, blob v1.Hash) *stalling {
	t.Helper()
	s := &stalling{stalled: make(chan struct{})}
	target := &url.URL{Scheme: "http", Host: reg.Addr}
	proxy := httputil.NewSingleHostReverseProxy(target)
	ending := make(chan struct{})
	var once sync.Once
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
		io.CopyN(w, resp.Body, resp.ContentLength/2)
		w.(http.Flusher).Flush()
		once.Do(func() { close(s.stalled) })
		select {
		case <-r.Context().Done():
		case <-ending:
		}
	}))
	t.Cleanup(func() {
		close(ending)
		server.Close()
	})
	s.addr = server.Listener.Addr().String()
	return s
}

// TestCancel ends a build in the middle of a pull, in every way in which a build can
// end, and finds the VM as it was and the disk good for the next build.
func TestCancel(t *testing.T) {
	v := world.debian
	reg := registry.New(t, registry.Config{})
	small := layer(t, map[string]int{"small": 1 << 20})
	image := newImage(t, small, layer(t, map[string]int{"large": 8 << 20}))
	pushed(t, reg, "app:1", image)
	layers, err := image.Layers()
	if err != nil {
		t.Fatal(err)
	}
	large, err := layers[1].Digest()
	if err != nil {
		t.Fatal(err)
	}
	tests := []struct {
		name   string
		signal syscall.Signal
		group  bool
	}{
		{"Ctrl-C in a terminal", syscall.SIGINT, true},
		// Packer's parent process passes on SIGTERM only.
		{"SIGTERM to Packer", syscall.SIGTERM, false},
		{"SIGKILL to all of Packer", syscall.SIGKILL, true},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			slow := newStalling(t, reg, large)
			d := newDisk(t, v, 256)
			before := v.state(t)
			cmd := v.packerBuild(t, imagesOption(slow.addr+"/app:1"), d.block())
			var out bytes.Buffer
			cmd.Stdout, cmd.Stderr = &out, &out
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			ended := make(chan error, 1)
			go func() { ended <- cmd.Wait() }()
			select {
			case <-slow.stalled:
			case err := <-ended:
				t.Fatalf("the build ended before the pull: %v\n%s", err, out.String())
			}
			started := time.Now()
			pid := cmd.Process.Pid
			if tt.group {
				pid = -pid
			}
			if err := syscall.Kill(pid, tt.signal); err != nil {
				t.Fatal(err)
			}
			if err := <-ended; err == nil {
				t.Errorf("the build succeeded:\n%s", out.String())
			}
			t.Logf("packer ended after %s", time.Since(started).Round(time.Millisecond))
			// The VM cleans up by itself, also when nobody is left to wait for it.
			after := v.state(t)
			for ; after != before && time.Since(started) < 15*time.Second; after = v.state(t) {
			}
			if diff := cmp.Diff(before, after); diff != "" {
				t.Errorf("15 seconds after the end the VM is not as it was: %s\n%s", diff, out.String())
			}
			t.Logf("the VM was clean after %s", time.Since(started).Round(time.Millisecond))

			v.mustBuild(t, imagesOption(reg.Addr+"/app:1"), d.block())
			m, _ := d.manifest(t)
			if len(m.Images) != 1 || len(m.Layers) != 2 {
				t.Errorf("the next build recorded %d images with %d layers", len(m.Images), len(m.Layers))
			}
			// What was half pulled takes no room for ever.
			d.mount(t, func(dir string) {
				store := filepath.Join(dir, m.Store.Root)
				layers, err := filepath.Glob(filepath.Join(store, manifest.DriverOverlay2, "*/diff"))
				if err != nil || len(layers) != 2 {
					t.Errorf("the store has %d layer directories (%v)", len(layers), err)
				}
				if parts, err := filepath.Glob(filepath.Join(store, "tmp/*")); err != nil || len(parts) > 0 {
					t.Errorf("the store has left-over downloads %v (%v)", parts, err)
				}
			})
		})
	}
}

// TestLeftovers builds on a disk that an earlier build has mounted and runs a daemon
// on, as after the Packer host lost its power: the connection is still there.
func TestLeftovers(t *testing.T) {
	v := world.debian
	reg := registry.New(t, registry.Config{})
	image := newImage(t, layer(t, map[string]int{"large": 8 << 20}))
	ref := pushed(t, reg, "app:1", image)
	layers, err := image.Layers()
	if err != nil {
		t.Fatal(err)
	}
	large, err := layers[0].Digest()
	if err != nil {
		t.Fatal(err)
	}
	slow := newStalling(t, reg, large)
	d := newDisk(t, v, 256)
	before := v.state(t)
	first := v.packerBuild(t, imagesOption(slow.addr+"/app:1"), d.block())
	if err := first.Start(); err != nil {
		t.Fatal(err)
	}
	<-slow.stalled
	// Stopped, Packer keeps its connection and answers nothing any more.
	if err := syscall.Kill(-first.Process.Pid, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	out := v.mustBuild(t, imagesOption(ref), d.block())
	if err := syscall.Kill(-first.Process.Pid, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	first.Wait()
	if !strings.Contains(out, "which an earlier build left running") {
		t.Errorf("does not say that it stopped the earlier build:\n%s", out)
	}
	if diff := cmp.Diff(before, v.state(t)); diff != "" {
		t.Errorf("the VM is not as it was: %s", diff)
	}
}
