package cachedisk

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// Root is an open directory of a cache disk. The disk is data from elsewhere, and what
// is below a Root is reached as the kernel allows (openat2): through no symbolic
// link, so that the host, which resolves the same path when it mounts a layer, comes
// out at the same place; and not on another mount, since the clone that MountOnHost
// makes has none.
type Root struct{ dir *os.File }

// OpenRoot opens the root directory of a cache disk.
func OpenRoot(dir string) (*Root, error) {
	f, err := os.OpenFile(dir, unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, err
	}
	return &Root{f}, nil
}

// Close closes the directory.
func (r *Root) Close() error { return r.dir.Close() }

// Sub opens a directory below r.
func (r *Root) Sub(name string) (*Root, error) {
	f, err := r.open(name, unix.O_PATH|unix.O_DIRECTORY, unix.RESOLVE_NO_SYMLINKS)
	if err != nil {
		return nil, err
	}
	return &Root{f}, nil
}

// CheckDir says why name is not a directory below r, or nil if it is one.
func (r *Root) CheckDir(name string) error {
	fd, err := r.openFD(name, unix.O_PATH|unix.O_DIRECTORY, unix.RESOLVE_NO_SYMLINKS)
	if err != nil {
		return err
	}
	return unix.Close(fd)
}

// CheckFile says why name is not a regular file below r, or nil if it is one. It gives
// the file's size in bytes.
func (r *Root) CheckFile(name string) (size int64, err error) {
	return r.checkFile(name, unix.RESOLVE_NO_SYMLINKS)
}

// Open opens a regular file below r for reading.
func (r *Root) Open(name string) (*os.File, error) {
	return r.openFile(name, 0, unix.RESOLVE_NO_SYMLINKS)
}

// OpenInside opens a regular file of a layer whose root r is for reading. Symbolic links
// on the way to it count as in a container: r is the root directory of the absolute ones.
func (r *Root) OpenInside(name string) (*os.File, error) {
	return r.openFile(name, 0, unix.RESOLVE_IN_ROOT)
}

// openFile opens regular files only: the end of a named pipe may never come, and the
// opening alone of a device can do something.
func (r *Root) openFile(name string, flags int, resolve uint64) (*os.File, error) {
	if _, err := r.checkFile(name, resolve); err != nil {
		return nil, err
	}
	return r.open(name, unix.O_RDONLY|flags, resolve)
}

func (r *Root) checkFile(name string, resolve uint64) (size int64, err error) {
	f, err := r.open(name, unix.O_PATH, resolve)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err == nil && !fi.Mode().IsRegular() {
		err = &fs.PathError{Op: "open", Path: f.Name(), Err: errors.New("not a regular file")}
	}
	if err != nil {
		return 0, err
	}
	return fi.Size(), nil
}

func (r *Root) open(name string, flags int, resolve uint64) (*os.File, error) {
	fd, err := r.openFD(name, flags, resolve)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), filepath.Join(r.dir.Name(), name)), nil
}

func (r *Root) openFD(name string, flags int, resolve uint64) (int, error) {
	if resolve&unix.RESOLVE_IN_ROOT == 0 {
		resolve |= unix.RESOLVE_BENEATH
	}
	for tries := 1000; ; {
		fd, err := r.openat2(name, &unix.OpenHow{
			Flags:   uint64(flags | unix.O_CLOEXEC | unix.O_NOFOLLOW),
			Resolve: resolve | unix.RESOLVE_NO_MAGICLINKS | unix.RESOLVE_NO_XDEV,
		})
		switch {
		case err == nil:
			return fd, nil
		case errors.Is(err, unix.EINTR):
			continue
		// Something was renamed or mounted, anywhere, while it went through "..".
		case errors.Is(err, unix.EAGAIN) && tries > 0:
			tries--
			continue
		case errors.Is(err, unix.ELOOP):
			err = fmt.Errorf("a symbolic link leads there: %w", err)
		case errors.Is(err, unix.EXDEV):
			err = fmt.Errorf("it is not on the cache disk: %w", err)
		case errors.Is(err, unix.ENOSYS):
			err = Explain(err)
		}
		return -1, &fs.PathError{Op: "open", Path: filepath.Join(r.dir.Name(), name), Err: err}
	}
}

// openat2 keeps the directory open meanwhile, whoever closes it.
func (r *Root) openat2(name string, how *unix.OpenHow) (fd int, err error) {
	dir, err := r.dir.SyscallConn()
	if err != nil {
		return -1, err
	}
	closed := dir.Control(func(dir uintptr) { fd, err = unix.Openat2(int(dir), name, how) })
	if closed != nil {
		return -1, closed
	}
	return fd, err
}
