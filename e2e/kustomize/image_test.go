//go:build e2e

package kustomize_test

import (
	"os/exec"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/selkies-project/packer-plugin-selkies/e2e/host"
	"github.com/selkies-project/packer-plugin-selkies/e2e/treediff"
)

// TestReproducible builds the image in two folders. It must not matter which.
func TestReproducible(t *testing.T) {
	src, err := host.Source(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	var layouts []treediff.Tree
	for _, copied := range []string{"one", "another/place"} {
		copied = filepath.Join(dir, copied)
		if err := copyTree(t, src, copied); err != nil {
			t.Fatal(err)
		}
		// Should somebody work on src, the second copy is the first one's.
		src = copied
		out := filepath.Join(t.TempDir(), "image")
		if err := imageProgram(t.Context(), copied, out); err != nil {
			t.Fatal(err)
		}
		tree, err := treediff.Dir(out)
		if err != nil {
			t.Fatal(err)
		}
		layouts = append(layouts, tree)
	}
	if diff := treediff.Compare(layouts[0], layouts[1]); len(diff) > 0 {
		t.Errorf("two builds differ: %s", cmp.Diff(layouts[0], layouts[1]))
	}
}

func copyTree(t *testing.T, from, to string) error {
	t.Helper()
	if _, err := host.Output(exec.CommandContext(t.Context(), "mkdir", "-p", filepath.Dir(to))); err != nil {
		return err
	}
	_, err := host.Output(exec.CommandContext(t.Context(), "cp", "-a", from, to))
	return err
}
