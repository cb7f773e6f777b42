//go:build e2e

package host_test

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/moby/sys/mountinfo"

	"github.com/selkies-project/packer-plugin-selkies/e2e/host"
)

// TestRoot makes a root after an attempt that was cut off, and takes it from the
// cache folder the second time.
func TestRoot(t *testing.T) {
	cache := t.TempDir()
	t.Setenv("SELKIES_BUILD_CACHE", cache)
	packages := []string{"less"}
	finished := 0
	finish := func(dir string) error {
		finished++
		return os.WriteFile(filepath.Join(dir, "finished"), nil, 0o644)
	}

	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		defer cancel()
		// dpkg is there once packages are being unpacked, with /proc mounted.
		tick := time.NewTicker(50 * time.Millisecond)
		defer tick.Stop()
		for range tick.C {
			if found, _ := filepath.Glob(cache + "/roots/*.tmp/usr/bin/dpkg"); len(found) > 0 || ctx.Err() != nil {
				return
			}
		}
	}()
	_, err := host.Root(ctx, packages, "test", finish)
	cancel()
	if err == nil || finished > 0 {
		t.Fatalf("a root that was cut off: %v, finished %d times", err, finished)
	}
	left, err := mountinfo.GetMounts(mountinfo.PrefixFilter(cache))
	if err != nil || len(left) > 0 {
		t.Errorf("left mounted: %v, %v", left, err)
	}

	for range 2 {
		dir, err := host.Root(t.Context(), packages, "test", finish)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := os.Stat(filepath.Join(dir, "finished")); err != nil {
			t.Error(err)
		}
		if _, err := os.Stat(dir + ".tmp"); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s.tmp is there: %v", dir, err)
		}
	}
	if finished != 1 {
		t.Errorf("the root was made %d times", finished)
	}
}
