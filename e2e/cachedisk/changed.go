package cachedisk

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/selkies-project/packer-plugin-selkies/e2e/host"
)

// Copied is a copy of a disk image for a test.
func Copied(t testing.TB, image string) (file string) {
	t.Helper()
	file = filepath.Join(t.TempDir(), "disk")
	if _, err := host.Output(exec.CommandContext(t.Context(), "cp", "--sparse=always", image, file)); err != nil {
		t.Fatal(err)
	}
	return file
}

// Changed is a copy of a disk image for a test, changed by edit where it is mounted.
func Changed(t testing.TB, image string, edit func(dir string) error) (file string) {
	t.Helper()
	file = Copied(t, image)
	loop, err := host.AttachLoop(file, false)
	if err != nil {
		t.Fatal(err)
	}
	defer loop.Close()
	dir := t.TempDir()
	if err := unix.Mount(loop.Path, dir, "ext4", 0, ""); err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	}()
	if err := errors.Join(edit(dir), flush(dir)); err != nil {
		t.Fatal(err)
	}
	return file
}

// flush writes a file system to its device, the journal too. Its unmount alone may not: a
// machine that another test has just booted may have it mounted for a moment more.
func flush(dir string) error {
	const freeze, thaw = 0xC0045877, 0xC0045878 // FIFREEZE, FITHAW: package unix has neither
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := unix.IoctlSetInt(int(f.Fd()), freeze, 0); err != nil {
		return fmt.Errorf("freezing %s: %w", dir, err)
	}
	return unix.IoctlSetInt(int(f.Fd()), thaw, 0)
}
