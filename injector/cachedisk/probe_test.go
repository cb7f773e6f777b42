package cachedisk_test

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"

	testdisk "github.com/selkies-project/packer-plugin-selkies/e2e/cachedisk"
	"github.com/selkies-project/packer-plugin-selkies/injector/cachedisk"
	"github.com/selkies-project/packer-plugin-selkies/manifest"
)

func TestProbe(t *testing.T) {
	dir := t.TempDir()
	if err := cachedisk.Probe(dir); !errors.Is(err, fs.ErrNotExist) || errors.Is(err, cachedisk.ErrUnreadable) {
		t.Errorf("without a manifest: %v", err)
	}
	testdisk.Example(t, dir)
	for range 2 {
		if err := cachedisk.Probe(dir); err != nil {
			t.Error(err)
		}
	}
	file := filepath.Join(dir, manifest.Path)
	if err := os.Truncate(file, 0); err != nil {
		t.Fatal(err)
	}
	if err := cachedisk.Probe(dir); err == nil || errors.Is(err, cachedisk.ErrUnreadable) {
		t.Errorf("empty: %v", err)
	}
	if err := os.Remove(file); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(file, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := cachedisk.Probe(dir); err == nil || errors.Is(err, cachedisk.ErrUnreadable) {
		t.Errorf("a directory: %v", err)
	}
}

// TestProbeAgain asks as soon as there is an answer.
func TestProbeAgain(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, manifest.Path)
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte("{}"), 0o644); err != nil {
		t.Fatal(err)
	}
	for range 5000 {
		if err := cachedisk.Probe(dir); err != nil {
			t.Fatal(err)
		}
	}
}
