//go:build e2e

// Package supply_test looks at what is shipped: the bytes of the binaries and the list
// of what is in them.
package supply_test

import (
	"debug/buildinfo"
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/selkies-project/packer-plugin-selkies/e2e/host"
	"github.com/selkies-project/packer-plugin-selkies/version"
)

var binaries = []string{"packer-plugin-selkies", "selkies-image-injector"}

// TestReproducible builds both binaries in two directories. The compiler's results are
// shared where they do not depend on the directory; make reproducible shares nothing.
func TestReproducible(t *testing.T) {
	src, err := host.Source(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), filepath.Join(src, "tools/reproducible.sh"))
	cmd.Env = append(os.Environ(), "SHARE_CACHE=1")
	sums, err := host.Output(cmd)
	if err != nil {
		t.Fatal(err)
	}
	t.Log(sums)
}

// TestDev has make install the plugin as a development version.
func TestDev(t *testing.T) {
	src, err := host.Source(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	tools, err := host.Tool(t.Context(), "packer")
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	run := func(name string, args ...string) string {
		cmd := exec.CommandContext(t.Context(), name, args...)
		cmd.Dir = src
		cmd.Env = append(os.Environ(), "PATH="+tools+":"+os.Getenv("PATH"), "PACKER_CONFIG_DIR="+dir, "PACKER_PLUGIN_PATH="+dir, "CHECKPOINT_DISABLE=1")
		out, err := host.Output(cmd)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	run("make", "-s", "dev")
	if out := run(filepath.Join(tools, "packer"), "plugins", "installed"); !strings.Contains(out, "packer-plugin-selkies_v"+version.String()+"_") {
		t.Errorf("Packer has the plugins %s", out)
	}
}

// TestSBOM finds every module that a binary has in its SBOM, and no other.
func TestSBOM(t *testing.T) {
	src, err := host.Source(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), "make", "-s", "sbom")
	cmd.Dir = src
	if _, err := host.Output(cmd); err != nil {
		t.Fatal(err)
	}
	for _, name := range binaries {
		binary := filepath.Join(src, "build", name)
		info, err := buildinfo.ReadFile(binary)
		if err != nil {
			t.Fatal(err)
		}
		var want []string
		for _, m := range info.Deps {
			if m.Replace != nil {
				m = m.Replace
			}
			want = append(want, m.Path+" "+m.Version)
		}
		data, err := os.ReadFile(binary + ".cdx.json")
		if err != nil {
			t.Fatal(err)
		}
		var bom struct {
			Components []struct{ Name, Version string }
		}
		if err := json.Unmarshal(data, &bom); err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, c := range bom.Components {
			if c.Name != "std" {
				got = append(got, c.Name+" "+c.Version)
			}
		}
		slices.Sort(want)
		slices.Sort(got)
		if !slices.Equal(want, got) {
			t.Errorf("%s: the SBOM has %d components, the binary %d modules: %q, %q", name, len(got), len(want), got, want)
		}
	}
}
