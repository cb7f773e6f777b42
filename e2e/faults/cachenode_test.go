//go:build e2e

package faults_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/selkies-project/packer-plugin-selkies/e2e/host"
	"github.com/selkies-project/packer-plugin-selkies/e2e/machine"
)

// cacheNode is a machine with the injector and a cache disk.
type cacheNode struct {
	*machine.Machine
	cache  string    // the image of the disk
	device *host.NBD // what it is attached by, if that can go
	detach func()    // takes it away
}

func newCacheNode(t *testing.T) *cacheNode {
	t.Helper()
	n := &cacheNode{Machine: machine.New(t, machine.Config{Name: "node"})}
	if err := n.Install(world.injector, program); err != nil {
		t.Fatal(err)
	}
	n.attach(t, world.disk)
	return n
}

// attach attaches and mounts a cache disk.
func (n *cacheNode) attach(t *testing.T, disk string) {
	t.Helper()
	n.cache, n.device, n.detach = disk, nil, n.MountDisk(t, disk, cacheDir, "ro,noload")
}

// ownCache gives the node a copy of the cache disk, which can be damaged.
func (n *cacheNode) ownCache(t *testing.T) {
	t.Helper()
	image := filepath.Join(t.TempDir(), "cache")
	copyDisk(t, world.disk, image)
	n.Output(t, "umount", cacheDir)
	n.detach()
	n.attach(t, image)
}

// mortalCache attaches the cache disk anew, by a device that can go. Nothing may be
// registered.
func (n *cacheNode) mortalCache(t *testing.T) {
	t.Helper()
	n.Output(t, "umount", cacheDir)
	n.detach()
	// Not for longer than the test, but also while it cleans up.
	d, err := host.AttachNBD(context.WithoutCancel(t.Context()), true, true, "--command", "nbdkit", "-s", "-r", "file", world.disk)
	if err != nil {
		t.Fatal(err)
	}
	n.device, n.detach = d, n.MountDevice(t, d.Path, d, cacheDir, "ro,noload")
}

// failCache has the device fail; the kernel goes on answering from memory.
func (n *cacheNode) failCache() error { return os.Truncate(n.cache, 0) }

// unmountCache takes the mount away that the injector reads from, as kubelet does when
// a pod is deleted.
func (n *cacheNode) unmountCache(t *testing.T) error {
	_, err := n.Run(t.Context(), "umount", "--lazy", cacheDir)
	return err
}

func (n *cacheNode) replaceCache(t *testing.T) {
	t.Helper()
	n.Output(t, "sh", "-c", "! mountpoint -q "+cacheDir+" || umount --lazy "+cacheDir)
	n.detach()
	n.attach(t, world.disk)
}

// newStore is an empty disk for the store of a runtime, with room for few files.
func newStore(t *testing.T) (image string) {
	t.Helper()
	image = filepath.Join(t.TempDir(), "store")
	if err := host.NewDisk(image, 256<<20); err != nil {
		t.Fatal(err)
	}
	// All for root, since the runtimes are root's.
	if _, err := host.Output(exec.CommandContext(t.Context(), "mkfs.ext4", "-q", "-F", "-b", "4096", "-m", "0", "-N", "4096",
		"-E", "lazy_itable_init=0,lazy_journal_init=0", image)); err != nil {
		t.Fatal(err)
	}
	return image
}

// copyDisk copies a disk image, sparse.
func copyDisk(t *testing.T, from, to string) {
	t.Helper()
	if _, err := host.Output(exec.CommandContext(t.Context(), "cp", "--sparse=always", from, to)); err != nil {
		t.Fatal(err)
	}
}

// filler is the directory in which a store's disk is filled.
const filler = "filler"

// filling fills the file system of a directory, which it makes.
type filling func(r *rand.Rand, dir string, most int64) error

// fillDisk leaves room for a random part of what a run takes, most bytes at most.
func fillDisk(r *rand.Rand, dir string, most int64) error {
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	var st syscall.Statfs_t
	if err := syscall.Statfs(dir, &st); err != nil {
		return err
	}
	f, err := os.Create(filepath.Join(dir, "0"))
	if err != nil {
		return err
	}
	defer f.Close()
	size := max(1, int64(st.Bfree)*st.Bsize-r.Int64N(most))
	for {
		// The file's own metadata takes blocks, and so do others meanwhile.
		err := syscall.Fallocate(int(f.Fd()), 0, 0, size)
		if err != syscall.ENOSPC || size < 64<<10 {
			return err
		}
		size -= 64 << 10
	}
}

// fillInodes leaves a random part of the inodes that a run takes, most at most.
func fillInodes(r *rand.Rand, dir string, most int64) error {
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	var st syscall.Statfs_t
	if err := syscall.Statfs(dir, &st); err != nil {
		return err
	}
	for i := range int64(st.Ffree) - r.Int64N(most) {
		f, err := os.Create(filepath.Join(dir, fmt.Sprint(i)))
		if errors.Is(err, syscall.ENOSPC) {
			return nil
		}
		if err != nil {
			return err
		}
		f.Close()
	}
	return nil
}
