package cachedisk

import (
	"errors"
	"fmt"
	"io"
	"os"
	"slices"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/selkies-project/packer-plugin-selkies/manifest"
)

// ErrUnreadable is that of a cache disk whose device fails, is gone or hangs, or that
// this process may not read. What is on the disk is not to blame.
var ErrUnreadable = errors.New("cache disk not readable")

// probeTime bounds the wait for a device that hangs. A network disk answers in
// milliseconds, after a fail-over in seconds.
const probeTime = 20 * time.Second

// probing has a probe for each directory whose device has not answered yet.
var probing sync.Map

type probe struct {
	end  time.Time // of the wait for it
	done chan struct{}
	err  error
}

// Probe says why the device of the cache disk at dir cannot be read now, or nil if
// it can. What the page cache has of a device says nothing about it: the read goes
// past it.
func Probe(dir string) error {
	p := &probe{end: time.Now().Add(probeTime), done: make(chan struct{})}
	// A read that hangs cannot be interrupted. Its thread waits with it, once, whoever asks.
	if other, waits := probing.LoadOrStore(dir, p); waits {
		p = other.(*probe)
	} else {
		go func() {
			p.err = readBlock(dir)
			// First, so that who has the answer can ask again.
			probing.Delete(dir)
			close(p.done)
		}()
	}
	timeout := time.NewTimer(time.Until(p.end))
	defer timeout.Stop()
	select {
	case <-p.done:
		return unreadable(p.err)
	case <-timeout.C:
		return fmt.Errorf("%w: %s: the device does not answer", ErrUnreadable, dir)
	}
}

// unreadable makes an ErrUnreadable of an error that tells nothing of the files on the
// disk, and leaves others as they are.
func unreadable(err error) error {
	switch errno, ok := errors.AsType[unix.Errno](err); {
	case !ok, slices.Contains(ofFiles, errno):
		return err
	}
	return fmt.Errorf("%w: %w", ErrUnreadable, err)
}

// ofFiles are errors that stay, however often the disk is attached: of files that are
// others than those expected, and of a file system that the kernel finds damaged.
var ofFiles = []unix.Errno{unix.ENOENT, unix.ENOTDIR, unix.EISDIR, unix.ELOOP, unix.ENAMETOOLONG, unix.EXDEV, unix.EUCLEAN, unix.EBADMSG}

// readBlock reads the first bytes of the layer manifest from its device.
func readBlock(dir string) error {
	root, err := OpenRoot(dir)
	if err != nil {
		return err
	}
	defer root.Close()
	f, err := root.openFile(manifest.Path, unix.O_DIRECT, unix.RESOLVE_NO_SYMLINKS)
	if errors.Is(err, unix.EINVAL) { // such as tmpfs before Linux 6.6
		f, err = root.Open(manifest.Path)
	}
	if err != nil {
		return err
	}
	defer f.Close()
	if err := checkDevice(f); err != nil {
		return err
	}
	n, err := f.ReadAt(alignedBlock(), 0)
	if errors.Is(err, unix.EINVAL) { // blocks larger than ours
		n, err = readBuffered(root)
	}
	if n > 0 {
		return nil
	}
	if err == nil || errors.Is(err, io.EOF) {
		return fmt.Errorf("%s is empty", f.Name())
	}
	return err
}

func readBuffered(root *Root) (int, error) {
	f, err := root.Open(manifest.Path)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	return f.ReadAt(make([]byte, 1), 0)
}

// alignedBlock is a buffer as O_DIRECT wants it.
func alignedBlock() []byte {
	const size = 4096
	buf := make([]byte, 2*size)
	skip := -uintptr(unsafe.Pointer(&buf[0])) & (size - 1)
	return buf[skip : skip+size]
}

// checkDevice says whether the file's block device has been taken away: its mount
// can go on answering from memory.
func checkDevice(f *os.File) error {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return err
	}
	major, minor := unix.Major(st.Dev), unix.Minor(st.Dev)
	if major == 0 {
		return nil // not a block device's file system, such as overlay
	}
	_, err := os.Stat(fmt.Sprintf("/sys/dev/block/%d:%d", major, minor))
	if errors.Is(err, os.ErrNotExist) {
		// Without /sys at all it says nothing.
		if _, err := os.Stat("/sys/dev/block"); err == nil {
			return fmt.Errorf("%w: %s: its device %d:%d is gone", ErrUnreadable, f.Name(), major, minor)
		}
	}
	return nil
}
