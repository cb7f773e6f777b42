//go:build e2e

package provisioner_test

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
	"syscall"
	"testing"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/selkies-project/packer-plugin-selkies/e2e/buildvm"
	"github.com/selkies-project/packer-plugin-selkies/e2e/host"
	"github.com/selkies-project/packer-plugin-selkies/e2e/registry"
)

// maxBuildMemory is what Packer and the plugin may take for answers that have no end, in
// bytes: the larger of the two processes.
const maxBuildMemory = 512 << 20

// TestBomb has a registry answer with what expands without end. It runs alone: what other
// tests have in memory would count.
func TestBomb(t *testing.T) {
	v := debian(t)
	reg := registry.New(t, registry.Config{})
	good := pushed(t, reg, "app:1", newImage(t, layer(t, map[string]int{"a": 1000})))
	claimed := claimConfig(t, reg, "app", 1<<40)
	for _, tt := range []struct{ name, part, options, want string }{
		{"manifest", "/manifests/", buildvm.Images(good), "more than 67108864 bytes"},
		{"config", "/blobs/", buildvm.Images(good), "error verifying"},
		{"list of tags", "/tags/", fmt.Sprintf("catalog {\n repository = %q\n}", reg.Addr+"/app"), "more than 67108864 bytes"},
		{"config of a terabyte", "/nothing/", buildvm.Images(claimed), "its config has 1099511627776 bytes"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			reg.Disturb(func(req *http.Request) registry.Fault {
				if strings.Contains(req.URL.Path, tt.part) {
					return registry.Bomb
				}
				return ""
			})
			defer reg.Disturb(nil)
			cmd := v.PackerBuild(t, tt.options, "insecure_registries = [\""+reg.Addr+"\"]")
			var out bytes.Buffer
			cmd.Stdout, cmd.Stderr = &out, &out
			if err := host.ResetPeak(); err != nil {
				t.Fatal(err)
			}
			if err := cmd.Run(); err == nil || !strings.Contains(errorLine(t, out.String()), tt.want) {
				t.Errorf("packer build: %v\n%s", err, out.String())
			}
			memory := cmd.ProcessState.SysUsage().(*syscall.Rusage).Maxrss << 10
			t.Logf("at most %d MiB", memory>>20)
			if memory > maxBuildMemory {
				t.Errorf("the build took %d MiB", memory>>20)
			}
		})
	}
}

// claimConfig pushes an image of the repository again, with a manifest that says that its
// config has so many bytes.
func claimConfig(t *testing.T, reg *registry.Registry, repository string, size int64) (ref string) {
	t.Helper()
	url := "http://" + reg.Addr + "/v2/" + repository + "/manifests/"
	resp, err := http.Get(url + "1")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	text, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	var m ocispec.Manifest
	if err := json.Unmarshal(text, &m); err != nil {
		t.Fatal(err)
	}
	m.Config.Size = size
	if text, err = json.Marshal(m); err != nil {
		t.Fatal(err)
	}
	req, err := http.NewRequestWithContext(t.Context(), http.MethodPut, url+"claimed", bytes.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	req.Header.Set("Content-Type", resp.Header.Get("Content-Type"))
	put, err := http.DefaultClient.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	put.Body.Close()
	if put.StatusCode != http.StatusCreated {
		t.Fatalf("pushing a manifest: %s", put.Status)
	}
	return reg.Addr + "/" + repository + ":claimed"
}
