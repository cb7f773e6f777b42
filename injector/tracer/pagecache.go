package tracer

import (
	"errors"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/selkies-project/packer-plugin-selkies/trace"
)

var pageSize = int64(os.Getpagesize())

// open calls do with the open file. An image has more files than a process may have open.
func (f *file) open(do func(fd int) error) error {
	fd, err := unix.Open(f.name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return do(fd)
}

// look gives the ranges of the file that have come into the page cache since the last
// look, in bytes. Their File is not set.
func (f *file) look() (fresh []trace.Range, err error) {
	err = f.open(func(fd int) error {
		count, err := f.cached(fd)
		if err != nil || count == f.count {
			return err
		}
		f.count = count
		pages, err := f.residency(fd)
		fresh = f.note(pages)
		return err
	})
	return fresh, err
}

// note gives what of pages was not there before.
func (f *file) note(pages []byte) (fresh []trace.Range) {
	if f.pages == nil {
		f.pages = make([]byte, len(pages))
	}
	for i := range pages {
		if pages[i]&1 == 0 || f.pages[i] != 0 {
			continue
		}
		f.pages[i] = 1
		offset := int64(i) * pageSize
		length := min(pageSize, f.size-offset)
		if last := len(fresh) - 1; last >= 0 && fresh[last].Offset+fresh[last].Length == offset {
			fresh[last].Length += length
		} else {
			fresh = append(fresh, trace.Range{Offset: offset, Length: length})
		}
	}
	return fresh
}

// cached counts the pages of the file in the page cache. Linux before 6.5 has no call for
// it: there it is another number each time.
func (f *file) cached(fd int) (uint64, error) {
	var stat unix.Cachestat_t
	err := unix.Cachestat(uint(fd), &unix.CachestatRange{}, &stat, 0)
	switch {
	case errors.Is(err, unix.ENOSYS), errors.Is(err, unix.EPERM): // by a seccomp profile that is older
		return f.count + 1, nil
	case err != nil:
		return 0, err
	}
	return stat.Cache, nil
}

// residency has a byte for each page, odd if it is in the page cache.
func (f *file) residency(fd int) ([]byte, error) {
	m, err := unix.Mmap(fd, 0, int(f.size), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return nil, err
	}
	defer func() { _ = unix.Munmap(m) }()
	pages := make([]byte, (f.size+pageSize-1)/pageSize)
	_, _, errno := unix.Syscall(unix.SYS_MINCORE, uintptr(unsafe.Pointer(&m[0])), uintptr(len(m)), uintptr(unsafe.Pointer(&pages[0])))
	if errno != 0 {
		return nil, errno
	}
	return pages, nil
}
