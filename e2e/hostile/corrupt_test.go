//go:build e2e

package hostile_test

import (
	"path/filepath"
	"testing"

	"github.com/selkies-project/packer-plugin-selkies/e2e/cachedisk"
	"github.com/selkies-project/packer-plugin-selkies/manifest"
)

// TestCorrupt has file systems that the kernel reports damaged where inject looks.
func TestCorrupt(t *testing.T) {
	l := layer(t, 1)
	for _, tt := range []struct {
		name  string
		at    func(t *testing.T, image string) int64
		words []string
	}{
		{"inode of the manifest", func(t *testing.T, image string) int64 { return inodeAt(t, image, manifest.Path) }, []string{manifest.Path}},
		{"inode of the manifest's directory", func(t *testing.T, image string) int64 { return inodeAt(t, image, manifest.Dir) }, []string{manifest.Path}},
		{"the manifest's directory", func(t *testing.T, image string) int64 { return contentAt(t, image, manifest.Dir, 40) }, []string{manifest.Path}},
		{"inode of the store", func(t *testing.T, image string) int64 { return inodeAt(t, image, "docker") }, []string{"layer sha256:"}},
		{"the graph driver's directory", func(t *testing.T, image string) int64 { return contentAt(t, image, "docker/overlay2", 40) }, []string{"layer sha256:"}},
		{"inode of a layer", func(t *testing.T, image string) int64 { return inodeAt(t, image, filepath.Dir(layerPath(l, ""))) }, []string{l.ChainID.String(), l.Directory}},
		{"inode of a layer's files", func(t *testing.T, image string) int64 { return inodeAt(t, image, layerPath(l, "")) }, []string{l.ChainID.String(), l.Directory}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			image := cachedisk.Copied(t, world.disk)
			flip(t, image, tt.at(t, image), 3)
			attach(t, image)
			for _, runtime := range runtimes {
				t.Run(runtime, func(t *testing.T) {
					tr := runTraced(t, "inject", "--runtime", runtime, "--cache", cacheDir)
					tr.checkRefused(t, append(tt.words, "build the disk again")...)
					tr.checkAccesses(t, mayLock)
				})
			}
		})
	}
	t.Run("superblock", func(t *testing.T) {
		image := cachedisk.Copied(t, world.disk)
		flip(t, image, 1024+0x68, 0) // of the UUID, which the checksum covers
		if err := mounted(t, image, func(string) {}); err == nil {
			t.Error("the kernel mounts it")
		}
	})
}
