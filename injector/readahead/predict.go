package readahead

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// prediction are the parts of a trace that come next, and all others of their files. When
// others bring them into the page cache, they are what the trace is of.
type prediction struct {
	parts []part
	there int64 // bytes of them in the page cache
}

func newPrediction(left []part) *prediction {
	files := map[int]bool{}
	for _, p := range left[:min(depth, len(left))] {
		files[p.file] = true
	}
	p := &prediction{}
	for _, l := range left {
		if files[l.file] {
			p.parts = append(p.parts, l)
		}
	}
	return p
}

// comesTrue says if more of it is in the page cache than at the last call, or than nothing.
func (p *prediction) comesTrue() bool {
	var there int64
	for _, next := range p.parts {
		there += next.resident()
	}
	more := there > p.there
	p.there = there
	return more
}

// resident is how much of the part is in the page cache, in bytes, whole pages; 0 if it
// cannot be told.
func (p part) resident() (n int64) {
	f, err := p.open()
	if err != nil {
		return 0
	}
	fi, err := f.Stat()
	if err != nil {
		return 0
	}
	offset := p.offset / pageSize * pageSize
	length := min(p.offset+p.length, fi.Size()) - offset
	if length <= 0 {
		return 0
	}
	m, err := unix.Mmap(int(f.Fd()), offset, int(length), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return 0
	}
	defer func() { _ = unix.Munmap(m) }()
	pages := make([]byte, (length+pageSize-1)/pageSize)
	_, _, errno := unix.Syscall(unix.SYS_MINCORE, uintptr(unsafe.Pointer(&m[0])), uintptr(len(m)), uintptr(unsafe.Pointer(&pages[0])))
	if errno != 0 {
		return 0
	}
	for _, in := range pages {
		n += int64(in&1) * pageSize
	}
	return n
}
