//go:build e2e

package cluster_test

import (
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/selkies-project/packer-plugin-selkies/e2e/host"
)

// TestReproducible builds the injector's image in two folders. The digest, which the
// program prints, must be the same.
func TestReproducible(t *testing.T) {
	t.Parallel()
	src, dir := world.source, t.TempDir()
	var digests []string
	for _, name := range []string{"one", "another/place"} {
		folder := filepath.Join(dir, name)
		if err := os.MkdirAll(filepath.Dir(folder), 0o755); err != nil {
			t.Fatal(err)
		}
		// The second copy is the first one's, should somebody be at work on the source.
		if _, err := host.Output(exec.CommandContext(t.Context(), "cp", "-a", src, folder)); err != nil {
			t.Fatal(err)
		}
		src = folder
		cmd := exec.CommandContext(t.Context(), "go", "run", "./injector/image")
		cmd.Dir = folder
		digest, err := host.Output(cmd)
		if err != nil {
			t.Fatal(err)
		}
		digests = append(digests, digest)
	}
	if digests[0] != digests[1] || digests[0] == "" {
		t.Errorf("two builds gave %q", digests)
	}
}
