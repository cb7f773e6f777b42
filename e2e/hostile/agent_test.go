//go:build e2e

package hostile_test

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net/http"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/selkies-project/packer-plugin-selkies/e2e/cachedisk"
	"github.com/selkies-project/packer-plugin-selkies/e2e/machine"
)

// TestAgentVerifies has the agent prove the layers of a disk with one bit flipped, in the
// background, end, and go on where it was.
func TestAgentVerifies(t *testing.T) {
	l := layer(t, 0)
	image := cachedisk.Copied(t, world.disk)
	flip(t, image, contentAt(t, image, layerPath(l, "kept/mode"), 0), 0)
	attach(t, image)
	defer world.node.Output(t, injector, "eject", "--runtime", "containerd")

	sound := len(world.built.Layers) - 1
	for _, run := range []string{"first", "second"} {
		t.Run(run, func(t *testing.T) {
			port, err := machine.FreePort()
			if err != nil {
				t.Fatal(err)
			}
			address := fmt.Sprintf("127.0.0.1:%d", port)
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			cmd := world.node.Command(ctx, injector, "run", "--kubernetes=false", "--runtime", "containerd", "--cache", cacheDir,
				"--check-interval", "1s", "--metrics-address", address, "--verify-rate", "100MB")
			log, err := cmd.StderrPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			defer func() {
				_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGTERM)
				_, _ = io.Copy(io.Discard, log)
				_ = cmd.Wait() // ended by a signal
			}()
			damaged := ""
			for lines := bufio.NewScanner(log); damaged == "" && lines.Scan(); {
				if strings.Contains(lines.Text(), "is damaged") {
					damaged = lines.Text()
				}
			}
			if !strings.Contains(damaged, "kept/mode") || !strings.Contains(damaged, "reason=LayerDamaged") {
				t.Errorf("the agent says %q", damaged)
			}
			// The metrics are those of the pass before.
			var metrics string
			tick := time.NewTicker(100 * time.Millisecond)
			defer tick.Stop()
			for range 100 {
				metrics = get(t, "http://"+address+"/metrics")
				if strings.Contains(metrics, fmt.Sprintf("layers_verified{cache_id=%q} %d\n", id(t), sound)) &&
					strings.Contains(metrics, fmt.Sprintf("layers_damaged{cache_id=%q} 1\n", id(t))) {
					return
				}
				<-tick.C
			}
			t.Errorf("the metrics are %s", metrics)
		})
	}
	note := world.node.Output(t, "sh", "-c", "cat /run/selkies-image-injector/verified-*")
	if n := strings.Count(note, "sha256:"); n != 1+sound {
		t.Errorf("noted %q, want the cache ID and %d layers", note, sound)
	}
}

func id(t *testing.T) string {
	t.Helper()
	id, err := world.built.ID()
	if err != nil {
		t.Fatal(err)
	}
	return id.String()
}

func get(t *testing.T, url string) string {
	t.Helper()
	resp, err := http.Get(url)
	if err != nil {
		return err.Error()
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		return err.Error()
	}
	return string(body)
}
