package host

import (
	"context"
	"crypto/sha256"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// Suite is the Debian release of every root.
const Suite = "bookworm"

// Root is a minimal Debian root with the packages given, made once and kept in the
// cache folder. Nobody may write to it: mount an overlay on it, or copy it. finish
// completes a new root; version stands for it in the cache's key, so change both.
func Root(ctx context.Context, packages []string, version string, finish func(dir string) error) (string, error) {
	packages = slices.Sorted(slices.Values(packages))
	cache, err := Cache("roots")
	if err != nil {
		return "", err
	}
	key := sha256.Sum256([]byte(strings.Join(append([]string{Suite, version}, packages...), " ")))
	dir := filepath.Join(cache, fmt.Sprintf("%s-%.8x", Suite, key))

	// Test packages run as processes of their own, at the same time.
	lock, err := Lock(dir + ".lock")
	if err != nil {
		return "", err
	}
	defer lock.Close()
	if _, err := os.Stat(dir); err == nil {
		return dir, nil
	}

	tmp := dir + ".tmp"
	if err := os.RemoveAll(tmp); err != nil {
		return "", fmt.Errorf("removing a half-made root: %w", err)
	}
	fmt.Fprintf(os.Stderr, "making a Debian root with %d packages (once; kept in %s)\n", len(packages), dir)
	// In namespaces of its own, whatever it starts and mounts ends with it.
	cmd := exec.CommandContext(ctx, "unshare", "--mount", "--pid", "--fork", "--kill-child",
		"debootstrap", "--variant=minbase", "--include="+strings.Join(packages, ","), Suite, tmp)
	out, err := cmd.CombinedOutput()
	if err != nil {
		os.RemoveAll(tmp)
		return "", fmt.Errorf("running debootstrap: %w: %s", err, tail(string(out), 5))
	}
	if _, err := Output(exec.CommandContext(ctx, "chroot", tmp, "apt-get", "clean")); err != nil {
		return "", err
	}
	if err := finish(tmp); err != nil {
		return "", fmt.Errorf("completing the root: %w", err)
	}
	return dir, os.Rename(tmp, dir)
}

// tail is the last n lines of s in one line.
func tail(s string, n int) string {
	lines := strings.Split(strings.TrimSpace(s), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "; ")
}
