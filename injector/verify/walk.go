package verify

import (
	"errors"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// file is what the disk has at a path.
type file struct {
	st     unix.Stat_t
	link   string
	xattrs map[string]string
}

// walk calls visit for everything below dir, by its path relative to dir, and for dir
// itself. A cache disk is read-only, so a path cannot turn into a symbolic link between
// being listed and being looked at. A directory may have more entries than memory.
func walk(dir string, visit func(name string, f *file) error) error {
	return walkFrom(dir, ".", visit)
}

func walkFrom(dir, name string, visit func(name string, f *file) error) error {
	path := filepath.Join(dir, name)
	f, err := readFile(path)
	if err == nil {
		err = visit(name, f)
	}
	if err != nil || f.st.Mode&unix.S_IFMT != unix.S_IFDIR {
		return err
	}
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	defer d.Close()
	for {
		names, err := d.Readdirnames(1000)
		for _, below := range names {
			if err := walkFrom(dir, filepath.Join(name, below), visit); err != nil {
				return err
			}
		}
		if err == io.EOF {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

// readFile reads what the disk has at a path.
func readFile(path string) (*file, error) {
	f := &file{}
	err := unix.Lstat(path, &f.st)
	if err != nil {
		return nil, &fs.PathError{Op: "lstat", Path: path, Err: err}
	}
	if f.st.Mode&unix.S_IFMT == unix.S_IFLNK {
		if f.link, err = os.Readlink(path); err != nil {
			return nil, err
		}
	}
	if f.xattrs, err = readXattrs(path); err != nil {
		return nil, &fs.PathError{Op: "getxattr", Path: path, Err: err}
	}
	return f, nil
}

func readXattrs(name string) (map[string]string, error) {
	size, err := unix.Llistxattr(name, nil)
	if err != nil || size == 0 {
		if errors.Is(err, syscall.ENOTSUP) {
			err = nil
		}
		return nil, err
	}
	list := make([]byte, size)
	if size, err = unix.Llistxattr(name, list); err != nil {
		return nil, err
	}
	attrs := map[string]string{}
	for _, attr := range strings.Split(strings.TrimSuffix(string(list[:size]), "\x00"), "\x00") {
		n, err := unix.Lgetxattr(name, attr, nil)
		if err != nil {
			return nil, err
		}
		value := make([]byte, n)
		if n, err = unix.Lgetxattr(name, attr, value); err != nil {
			return nil, err
		}
		attrs[attr] = string(value[:n])
	}
	return attrs, nil
}
