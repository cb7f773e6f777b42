//go:build e2e

package powerdisk_test

import (
	"bytes"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/selkies-project/packer-plugin-selkies/e2e/host"
	"github.com/selkies-project/packer-plugin-selkies/e2e/powerdisk"
)

// TestPowerLoss writes files to an ext4 on the disk, one flushed and one not. Whenever
// the power goes, the file system can be mounted; what was flushed before is there, and
// what was not is lost at least once.
func TestPowerLoss(t *testing.T) {
	dir := t.TempDir()
	image := filepath.Join(dir, "disk")
	run(t, "truncate", "-s", "64M", image)
	run(t, "mkfs.ext4", "-q", "-F", "-E", "lazy_itable_init=0,lazy_journal_init=0", image)
	before := filepath.Join(dir, "before")
	run(t, "cp", "--sparse=always", image, before)

	d, err := powerdisk.Attach(t.Context(), image)
	if err != nil {
		t.Fatal(err)
	}
	mnt := t.TempDir()
	if err := unix.Mount(d.Path, mnt, "ext4", 0, ""); err != nil {
		t.Fatal(err)
	}
	write := func(name string) {
		t.Helper()
		f, err := os.Create(filepath.Join(mnt, name))
		if err == nil {
			_, err = f.Write(content(name))
		}
		if err == nil && name == "flushed" {
			err = f.Sync()
		}
		if err != nil {
			t.Fatal(err)
		}
		f.Close()
	}
	write("flushed")
	flushed := d.Log().Len()
	write("unflushed")
	run(t, "sync", "-f", mnt)
	if err := unix.Unmount(mnt, 0); err != nil {
		t.Fatal(err)
	}
	log := d.Log()
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	if log.Flushes() < 3 || flushed == 0 || log.Len() <= flushed {
		t.Fatalf("recorded %d entries, %d of them flushes, %d before the second file", log.Len(), log.Flushes(), flushed)
	}

	r := rand.New(rand.NewPCG(1, 2))
	without := 0
	for n := flushed; n <= log.Len(); n++ {
		after := filepath.Join(dir, "after")
		run(t, "cp", "--sparse=always", before, after)
		if _, err := log.Cut(r, after, n); err != nil {
			t.Fatal(err)
		}
		loop, err := host.AttachLoop(after, false)
		if err != nil {
			t.Fatal(err)
		}
		if err := unix.Mount(loop.Path, mnt, "ext4", 0, ""); err != nil {
			t.Fatalf("mounting it after %d entries: %v", n, err)
		}
		if got, err := os.ReadFile(filepath.Join(mnt, "flushed")); err != nil || !bytes.Equal(got, content("flushed")) {
			t.Errorf("after %d entries the flushed file has %d bytes: %v", n, len(got), err)
		}
		if _, err := os.Stat(filepath.Join(mnt, "unflushed")); err != nil {
			without++
		}
		if err := unix.Unmount(mnt, 0); err != nil {
			t.Fatal(err)
		}
		loop.Close()
		run(t, "rm", after)
	}
	if without == 0 {
		t.Error("what was not flushed was never lost")
	}
}

func content(name string) []byte { return bytes.Repeat([]byte(name), 10000) }

func run(t *testing.T, args ...string) {
	t.Helper()
	if _, err := host.Output(exec.CommandContext(t.Context(), args[0], args[1:]...)); err != nil {
		t.Fatal(err)
	}
}
