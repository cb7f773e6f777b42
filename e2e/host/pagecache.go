package host

import (
	"fmt"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"
)

// DropCaches writes out all that is in the page cache and empties it, as that of a
// machine that has just booted.
func DropCaches() error {
	unix.Sync()
	if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0); err != nil {
		return fmt.Errorf("emptying the page cache: %w", err)
	}
	return nil
}

// Resident is how many bytes of a part of a file are in the page cache, whole pages. The
// part begins with a page.
func Resident(file string, offset, length int64) (int64, error) {
	f, err := os.Open(file)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	m, err := unix.Mmap(int(f.Fd()), offset, int(length), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return 0, fmt.Errorf("mapping %s: %w", file, err)
	}
	defer func() { _ = unix.Munmap(m) }()
	page := os.Getpagesize()
	pages := make([]byte, (len(m)+page-1)/page)
	_, _, errno := unix.Syscall(unix.SYS_MINCORE, uintptr(unsafe.Pointer(&m[0])), uintptr(len(m)), uintptr(unsafe.Pointer(&pages[0])))
	if errno != 0 {
		return 0, fmt.Errorf("mincore of %s: %w", file, errno)
	}
	var n int64
	for _, p := range pages {
		n += int64(p&1) * int64(page)
	}
	return n, nil
}
