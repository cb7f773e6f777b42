//go:build e2e

package pipeline_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/selkies-project/packer-plugin-selkies/e2e/host"
)

// TestDocumentedBuilds has Packer validate every build that a document tells readers to
// type: its variables are the template's, of the right types.
func TestDocumentedBuilds(t *testing.T) {
	top, err := host.Source(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	pages, err := filepath.Glob(filepath.Join(top, "docs", "*.md"))
	if err != nil {
		t.Fatal(err)
	}
	found := 0
	for _, page := range pages {
		data, err := os.ReadFile(page)
		if err != nil {
			t.Fatal(err)
		}
		for _, after := range strings.Split(string(data), "\n    packer build ")[1:] {
			args, _, _ := strings.Cut(strings.ReplaceAll(after, "\\\n", " "), "\n")
			found++
			t.Run(filepath.Base(page), func(t *testing.T) {
				packer := packerCommand(t.Context())
				// A token, since the builder looks for the user's credentials.
				cmd := exec.CommandContext(t.Context(), "bash", "-ceu", `"$0" validate -var access_token=none `+args, packer.Path)
				cmd.Env, cmd.Dir = packer.Env, top
				if out, err := cmd.CombinedOutput(); err != nil {
					t.Errorf("packer validate %s: %v\n%s", args, err, out)
				}
			})
		}
	}
	if found < 3 {
		t.Errorf("found only %d builds in %v", found, pages)
	}
}
