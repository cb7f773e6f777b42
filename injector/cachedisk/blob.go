package cachedisk

import (
	"context"
	"fmt"
	"os"
	"sync/atomic"
	"time"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// chunk is how many bytes of a blob are read at once.
const chunk = 1 << 20

// CheckBlob says why name is not a regular file below r, the root of a disk, with that
// digest and size, or nil if it is one. It reads all of the file and leaves nothing of it
// in the page cache. A device that hangs ends it as it ends Probe.
func (r *Root) CheckBlob(ctx context.Context, name string, want digest.Digest, size int64) error {
	if err := r.CheckSize(name, size); err != nil {
		return err
	}
	f, err := r.Open(name)
	if err != nil {
		return err
	}
	var read atomic.Int64
	done := make(chan error, 1)
	go func() { // which may hang with its device
		defer f.Close()
		done <- checkDigest(ctx, f, want, size, &read)
	}()
	tick := time.NewTicker(probeTime)
	defer tick.Stop()
	for before := int64(0); ; {
		select {
		case err := <-done:
			return unreadable(err)
		case <-ctx.Done():
			return ctx.Err()
		case <-tick.C:
		}
		now := read.Load()
		if now == before {
			if err := Probe(r.dir.Name()); err != nil {
				return err
			}
		}
		before = now
	}
}

// CheckSize is CheckFile for a file that is to have size bytes.
func (r *Root) CheckSize(name string, size int64) error {
	got, err := r.CheckFile(name)
	if err == nil && got != size {
		err = fmt.Errorf("%s has %d bytes, not %d", name, got, size)
	}
	return err
}

func checkDigest(ctx context.Context, f *os.File, want digest.Digest, size int64, read *atomic.Int64) error {
	digester := want.Algorithm().Digester()
	buf := make([]byte, chunk)
	for at := int64(0); at < size; at = read.Load() {
		if err := ctx.Err(); err != nil {
			return err
		}
		n, err := f.ReadAt(buf[:min(size-at, chunk)], at)
		if n == 0 && err != nil {
			return err
		}
		digester.Hash().Write(buf[:n])
		// What is read once is not worth anyone else's memory.
		_ = unix.Fadvise(int(f.Fd()), at, int64(n), unix.FADV_DONTNEED)
		read.Add(int64(n))
	}
	if got := digester.Digest(); got != want {
		return fmt.Errorf("%s hashes to %s", f.Name(), got)
	}
	return nil
}
