package powerdisk

import (
	"fmt"
	"math/rand/v2"
	"os"
)

// sector is what a disk writes whole or not at all. Those of Compute Engine have physical
// blocks of 4 KiB, and ext4 does not survive less: its superblock, which has a checksum,
// is of two sectors of 512 bytes.
const sector = 4096

// entry is a write or, without data, a flush.
type entry struct {
	offset int64
	data   []byte
}

func (e entry) flush() bool { return e.data == nil }

// Log is a recording: writes and flushes in the order in which they were completed.
type Log struct{ entries []entry }

// Len is the number of entries.
func (l *Log) Len() int { return len(l.entries) }

// Flushes is the number of those that are flushes.
func (l *Log) Flushes() int {
	n := 0
	for _, e := range l.entries {
		if e.flush() {
			n++
		}
	}
	return n
}

// BeforeFlush is the number of entries up to the next flush after the first n, when the
// most writes are not flushed.
func (l *Log) BeforeFlush(n int) int {
	for n < len(l.entries) && !l.entries[n].flush() {
		n++
	}
	return n
}

// Cut writes to image, a copy of the disk as it was when the recording began, what a
// power loss after the first n entries leaves: all that was flushed by then, and of what
// was not, a random part. It says how many writes that part lacks.
func (l *Log) Cut(r *rand.Rand, image string, n int) (lost int, err error) {
	f, err := os.OpenFile(image, os.O_WRONLY, 0)
	if err != nil {
		return 0, err
	}
	defer func() {
		if e := f.Close(); err == nil {
			err = e
		}
	}()
	flushed := 0
	for i, e := range l.entries[:n] {
		if e.flush() {
			flushed = i
		}
	}
	// Many, or few, of what the disk still had in its memory.
	kept := r.Float64()
	for i, e := range l.entries[:n] {
		if e.flush() {
			continue
		}
		data := e.data
		if i > flushed {
			if r.Float64() > kept {
				lost++
				continue
			}
			if r.IntN(10) == 0 { // cut off in the middle
				data = data[:r.IntN(len(data)/sector+1)*sector]
			}
		}
		if _, err := f.WriteAt(data, e.offset); err != nil {
			return lost, fmt.Errorf("writing what a power loss leaves: %w", err)
		}
	}
	return lost, nil
}
