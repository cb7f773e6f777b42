package cachedisk_test

import (
	"bytes"
	"context"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"

	testdisk "github.com/selkies-project/packer-plugin-selkies/e2e/cachedisk"
	"github.com/selkies-project/packer-plugin-selkies/injector/cachedisk"
	"github.com/selkies-project/packer-plugin-selkies/manifest"
)

func TestOpen(t *testing.T) {
	layer := func(dir string, m *manifest.Manifest) string { return filepath.Join(dir, m.LayerPath(m.Layers[1])) }
	tests := map[string]struct {
		spoil func(t *testing.T, dir string, m *manifest.Manifest) error
		want  string // in the error, empty for none
	}{
		"good": {func(*testing.T, string, *manifest.Manifest) error { return nil }, ""},
		"no manifest": {func(_ *testing.T, dir string, _ *manifest.Manifest) error {
			return os.Remove(filepath.Join(dir, manifest.Path))
		}, "no layer manifest at "},
		"truncated": {func(_ *testing.T, dir string, _ *manifest.Manifest) error {
			return os.Truncate(filepath.Join(dir, manifest.Path), 100)
		}, "truncated"},
		"empty": {func(_ *testing.T, dir string, _ *manifest.Manifest) error {
			return os.Truncate(filepath.Join(dir, manifest.Path), 0)
		}, "is empty; build the disk again"},
		"newer schema": {func(_ *testing.T, dir string, _ *manifest.Manifest) error {
			file := filepath.Join(dir, manifest.Path)
			data, err := os.ReadFile(file)
			if err != nil {
				return err
			}
			return os.WriteFile(file, bytes.Replace(data, []byte(`"schemaVersion": 1`), []byte(`"schemaVersion": 9`), 1), 0o644)
		}, "schemaVersion is 9"},
		"layer missing": {func(_ *testing.T, dir string, m *manifest.Manifest) error {
			return os.Remove(layer(dir, m))
		}, "build the disk again"},
		"layer is a file": {func(_ *testing.T, dir string, m *manifest.Manifest) error {
			if err := os.Remove(layer(dir, m)); err != nil {
				return err
			}
			return os.WriteFile(layer(dir, m), nil, 0o644)
		}, "not a directory; build the disk again"},
		"layer below a file": {func(_ *testing.T, dir string, m *manifest.Manifest) error {
			above := filepath.Dir(layer(dir, m))
			if err := os.RemoveAll(above); err != nil {
				return err
			}
			return os.WriteFile(above, nil, 0o644)
		}, "not a directory; build the disk again"},
		"layer leads out of the disk": {func(t *testing.T, dir string, m *manifest.Manifest) error {
			// The directory that holds diff: diff itself is looked at without following.
			above := filepath.Dir(layer(dir, m))
			if err := os.RemoveAll(above); err != nil {
				return err
			}
			outside := t.TempDir()
			if err := os.Mkdir(filepath.Join(outside, "diff"), 0o755); err != nil {
				return err
			}
			return os.Symlink(outside, above)
		}, "a symbolic link leads there"},
		"layer is a link": {func(t *testing.T, dir string, m *manifest.Manifest) error {
			return errors.Join(os.Remove(layer(dir, m)), os.Symlink(t.TempDir(), layer(dir, m)))
		}, "not a directory; build the disk again"},
		// The host would find the same directory, but nothing makes such links.
		"store behind a link": {func(_ *testing.T, dir string, m *manifest.Manifest) error {
			store := filepath.Join(dir, m.Store.Root)
			return errors.Join(os.Rename(store, store+"-moved"), os.Symlink(filepath.Base(store)+"-moved", store))
		}, "a symbolic link leads there"},
		"manifest is a link": {func(t *testing.T, dir string, m *manifest.Manifest) error {
			outside := t.TempDir()
			file := filepath.Join(dir, manifest.Path)
			return errors.Join(testdisk.WriteManifest(outside, m), os.Remove(file), os.Symlink(filepath.Join(outside, manifest.Path), file))
		}, "not a regular file; build the disk again"},
		"manifest in a linked directory": {func(t *testing.T, dir string, m *manifest.Manifest) error {
			outside := t.TempDir()
			own := filepath.Join(dir, manifest.Dir)
			return errors.Join(testdisk.WriteManifest(outside, m), os.RemoveAll(own), os.Symlink(filepath.Join(outside, manifest.Dir), own))
		}, "a symbolic link leads there"},
		"manifest is a pipe": {func(_ *testing.T, dir string, _ *manifest.Manifest) error {
			file := filepath.Join(dir, manifest.Path)
			return errors.Join(os.Remove(file), unix.Mkfifo(file, 0o644))
		}, "not a regular file; build the disk again"},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			m := testdisk.Example(t, dir)
			if err := tt.spoil(t, dir, m); err != nil {
				t.Fatal(err)
			}
			d, err := cachedisk.Open(dir)
			if tt.want != "" {
				if err == nil || !strings.Contains(err.Error(), tt.want) {
					t.Errorf("error is %v, want %q", err, tt.want)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if id, err := m.ID(); err != nil || d.ID != id {
				t.Errorf("ID is %s, want %s (%v)", d.ID, id, err)
			}
		})
	}
}

// TestOpenUnprivileged does not count as damage what it may not read.
func TestOpenUnprivileged(t *testing.T) {
	if os.Geteuid() == 0 {
		// By this name another user finds the program too, in a directory of root's.
		cmd := exec.Command("/proc/self/exe", "-test.run=^TestOpenUnprivileged$")
		cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: 65534, Gid: 65534}}
		if out, err := cmd.CombinedOutput(); err != nil || !strings.Contains(string(out), "PASS") {
			t.Errorf("%v:\n%s", err, out)
		}
		return
	}
	dir := t.TempDir()
	m := testdisk.Example(t, dir)
	store := filepath.Join(dir, m.Store.Root, manifest.DriverOverlay2)
	if err := os.Chmod(store, 0); err != nil {
		t.Fatal(err)
	}
	_, err := cachedisk.Open(dir)
	if err := os.Chmod(store, 0o755); err != nil {
		t.Error(err)
	}
	if !errors.Is(err, cachedisk.ErrUnreadable) || !errors.Is(err, fs.ErrPermission) || !strings.Contains(err.Error(), "; run as root") {
		t.Errorf("error is %v", err)
	}
}

func TestFind(t *testing.T) {
	host := t.TempDir()
	for _, dir := range []string{"cache", "mnt/disks/gke-secondary-disks/a", "mnt/disks/gke-secondary-disks/empty"} {
		if err := os.MkdirAll(filepath.Join(host, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	gke := filepath.Join(host, "mnt/disks/gke-secondary-disks/a")
	testdisk.Example(t, gke)

	disks, err := cachedisk.Find(nil, host)
	if err != nil || len(disks) != 1 || disks[0].Dir != gke {
		t.Errorf("found %v, %v", disks, err)
	}
	// What only looks like one is found too, to be refused.
	fake := filepath.Join(host, "mnt/disks/gke-secondary-disks/empty", manifest.Dir)
	if err := os.Symlink(filepath.Join(gke, manifest.Dir), fake); err != nil {
		t.Fatal(err)
	}
	if disks, err = cachedisk.Find(nil, host); err == nil || len(disks) != 1 {
		t.Errorf("found %v, %v", disks, err)
	}
	if err := os.Remove(fake); err != nil {
		t.Fatal(err)
	}
	// The same disk by two paths is one.
	testdisk.Example(t, filepath.Join(host, "cache"))
	if disks, err = cachedisk.Find(nil, host); err != nil || len(disks) != 1 {
		t.Errorf("found %v, %v", disks, err)
	}
	// Or two, for who looks at their files.
	if disks, err = cachedisk.FindAll(nil, host); err != nil || len(disks) != 2 {
		t.Errorf("found %v, %v", disks, err)
	}
	if disks, err = cachedisk.FindAll([]string{gke, gke + "/."}, host); err != nil || len(disks) != 1 {
		t.Errorf("found %v, %v", disks, err)
	}
	// A broken one does not hide the other.
	disks, err = cachedisk.Find([]string{t.TempDir(), gke}, host)
	if err == nil || len(disks) != 1 {
		t.Errorf("found %v, %v", disks, err)
	}
}

func TestCheckBlob(t *testing.T) {
	dir := t.TempDir()
	data := bytes.Repeat([]byte("blob"), 700_000) // more than is read at once
	flipped := bytes.Clone(data)
	flipped[len(data)-1] ^= 1
	errs := []error{
		os.WriteFile(filepath.Join(dir, "good"), data, 0o600),
		os.WriteFile(filepath.Join(dir, "flipped"), flipped, 0o600),
		os.WriteFile(filepath.Join(dir, "longer"), append(data, 0), 0o600),
		os.Symlink("good", filepath.Join(dir, "link")),
		syscall.Mkfifo(filepath.Join(dir, "pipe"), 0o600),
	}
	root, err := cachedisk.OpenRoot(dir)
	if err := errors.Join(append(errs, err)...); err != nil {
		t.Fatal(err)
	}
	defer root.Close()
	for name, want := range map[string]string{
		"good": "", "flipped": "hashes to", "longer": "has 2800001 bytes, not 2800000",
		"link": "not a regular file", "pipe": "not a regular file", "missing": "no such file",
	} {
		err := root.CheckBlob(t.Context(), name, digest.FromBytes(data), int64(len(data)))
		if (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", name, err, want)
		}
	}
	ended, end := context.WithCancel(t.Context())
	end()
	if err := root.CheckBlob(ended, "good", digest.FromBytes(data), int64(len(data))); !errors.Is(err, context.Canceled) {
		t.Errorf("after the end: %v", err)
	}
}
