package cachedisk

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/selkies-project/packer-plugin-selkies/manifest"
)

// Example makes a directory that looks like a cache disk, of the golden layer manifest.
// Its layers are empty. The test's package lies two folders deep.
func Example(t testing.TB, dir string) *manifest.Manifest {
	t.Helper()
	data, err := os.ReadFile("../../manifest/testdata/manifest.json")
	if err != nil {
		t.Fatal(err)
	}
	m, err := manifest.Decode(data)
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range m.Layers {
		if err := os.MkdirAll(filepath.Join(dir, m.LayerPath(l)), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := WriteManifest(dir, m); err != nil {
		t.Fatal(err)
	}
	return m
}
