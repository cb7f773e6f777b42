package verify

import (
	"bufio"
	"compress/gzip"
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/vbatts/tar-split/tar/storage"
	"golang.org/x/sys/unix"

	"github.com/selkies-project/packer-plugin-selkies/injector/cachedisk"
)

// What is read of a layer's recorded headers, uncompressed, in bytes. A file takes about
// one KiB of them, and they are in memory while the layer is verified.
const (
	maxHeaders = 1 << 30
	// maxRecord is for one header, which may have attributes, or the padding at the
	// stream's end.
	maxRecord = 32 << 20
)

// bounded is a reader with limits.
type bounded struct {
	r               io.Reader
	headers, record int64 // bytes left: of all, and of this one
}

func (b *bounded) Read(p []byte) (int, error) {
	left := min(b.headers, b.record)
	if left <= 0 {
		return 0, fmt.Errorf("more than %d bytes, or %d for one file", maxHeaders, maxRecord)
	}
	n, err := b.r.Read(p[:min(int64(len(p)), left)])
	b.headers -= int64(n)
	b.record -= int64(n)
	return n, err
}

// depth is how many files are opened ahead, so that a disk with some latency has several
// requests to work at.
const depth = 32

// ahead is how much of a file is asked for when it is opened, in bytes. The kernel's own
// readahead goes on from there.
const ahead = 4 << 20

// record is one of the recorded headers, or the place of a file's contents.
type record struct {
	*storage.Entry
	file chan opened // of a place
	err  error       // why there are no more
}

type opened struct {
	f   *os.File
	err error
}

// records gives the records of a layer's tar-split file in order, with the files whose
// contents belong there, opened below dir, depth of them ahead. Who does not take all
// of them cancels ctx and closes the rest.
func records(ctx context.Context, split io.Reader, dir *cachedisk.Root, depth int) <-chan record {
	out := make(chan record, depth)
	go func() {
		defer close(out)
		if err := sendRecords(ctx, split, dir, out); err != nil {
			select {
			case out <- record{err: err}:
			case <-ctx.Done():
			}
		}
	}()
	return out
}

func sendRecords(ctx context.Context, split io.Reader, dir *cachedisk.Root, out chan<- record) error {
	z, err := gzip.NewReader(bufio.NewReader(split))
	if err != nil {
		return err
	}
	r := &bounded{r: z, headers: maxHeaders}
	unpacker := storage.NewJSONUnpacker(r)
	for {
		r.record = maxRecord
		next, err := unpacker.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		e := record{Entry: next}
		if next.Type == storage.FileType && next.Size > 0 {
			e.file = make(chan opened, 1)
			go func() {
				f, err := open(dir, next.GetName())
				e.file <- opened{f, err}
			}()
		}
		select {
		case out <- e:
		case <-ctx.Done():
			e.close()
			return ctx.Err()
		}
	}
}

// close is for a record whose file nobody reads.
func (e record) close() {
	if e.file == nil {
		return
	}
	if o := <-e.file; o.f != nil {
		o.f.Close()
	}
}

func open(dir *cachedisk.Root, name string) (*os.File, error) {
	if escapes(name) {
		return nil, fmt.Errorf("open %q: it is outside of the layer", name)
	}
	f, err := dir.OpenInside(clean(name))
	if err != nil {
		return nil, err
	}
	// Only advice: what it cannot be given for is read all the same.
	_ = unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_SEQUENTIAL)
	_ = unix.Fadvise(int(f.Fd()), 0, ahead, unix.FADV_WILLNEED)
	return f, nil
}
