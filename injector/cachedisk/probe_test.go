package cachedisk_test

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sync/errgroup"

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

// TestProbeAtOnce asks while others do.
func TestProbeAtOnce(t *testing.T) {
	dir := t.TempDir()
	testdisk.Example(t, dir)
	var g errgroup.Group
	for range 200 {
		g.Go(func() error { return cachedisk.Probe(dir) })
	}
	if err := g.Wait(); err != nil {
		t.Error(err)
	}
}

// TestMoved opens a file by a link upward while a directory on the file system gets other
// names, which the kernel answers with EAGAIN.
func TestMoved(t *testing.T) {
	dir, other := t.TempDir(), t.TempDir()
	err := errors.Join(os.MkdirAll(filepath.Join(dir, "a/b"), 0o755), os.WriteFile(filepath.Join(dir, "file"), nil, 0o644),
		os.Symlink(strings.Repeat("../a/", 50)+"..", filepath.Join(dir, "a/link")), os.Mkdir(filepath.Join(other, "0"), 0o755))
	if err != nil {
		t.Fatal(err)
	}
	root, err := cachedisk.OpenRoot(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	var g errgroup.Group
	stop := make(chan struct{})
	g.Go(func() error {
		for i := 0; ; i++ {
			select {
			case <-stop:
				return nil
			default:
			}
			if err := os.Rename(filepath.Join(other, strconv.Itoa(i)), filepath.Join(other, strconv.Itoa(i+1))); err != nil {
				return err
			}
		}
	})
	for range 5000 {
		f, err := root.OpenInside("a/link/file")
		if err != nil {
			t.Error(err)
			break
		}
		f.Close()
	}
	close(stop)
	if err := g.Wait(); err != nil {
		t.Error(err)
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
