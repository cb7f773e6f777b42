package verify

import (
	"archive/tar"
	"crypto/sha256"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/selkies-project/packer-plugin-selkies/injector/cachedisk"
)

// BenchmarkDisk verifies four layers of 64 MiB, half of it in files of 16 KiB, that are
// not in the page cache, and reports how long that takes as a multiple of reading the
// same files, several at once, and of hashing as many bytes on every core: no verification
// is quicker than either.
func BenchmarkDisk(b *testing.B) {
	d := benchDisk(b)
	var verifying, reading, hashing time.Duration
	var bytes int64
	for b.Loop() {
		uncache(b, d.Dir)
		start := time.Now()
		bytes = readAll(b, d.Dir)
		reading += time.Since(start)

		start = time.Now()
		hashAll(b, bytes)
		hashing += time.Since(start)

		uncache(b, d.Dir)
		start = time.Now()
		r, err := Disk(b.Context(), d, Options{})
		if err != nil || len(r.Damaged) > 0 {
			b.Fatalf("says %+v, %v", r, err)
		}
		verifying += time.Since(start)
	}
	b.SetBytes(bytes)
	b.ReportMetric(float64(bytes)*float64(b.N)/1e6/verifying.Seconds(), "verifiedMB/s")
	b.ReportMetric(verifying.Seconds()/reading.Seconds(), "x-read")
	b.ReportMetric(verifying.Seconds()/hashing.Seconds(), "x-sha256")
}

func benchDisk(b *testing.B) *cachedisk.Disk {
	b.Helper()
	random := rand.NewChaCha8([32]byte{})
	file := func(name string, size int) entry {
		body := make([]byte, size)
		_, _ = random.Read(body) // never fails
		return entry{tar.Header{Name: name, Mode: 0o644}, string(body)}
	}
	layer := func(i int) (entries []entry) {
		for j := range 4 {
			entries = append(entries, file(fmt.Sprintf("layer%d/large%d", i, j), 8<<20))
		}
		for j := range 2048 {
			entries = append(entries, file(fmt.Sprintf("layer%d/dir%d/small%d", i, j/100, j), 16<<10))
		}
		return entries
	}
	d, _ := newDisk(b, layer(0))
	for i := range 3 {
		addLayer(b, d, layer(i+1))
	}
	unix.Sync()
	return d
}

// each calls use for every file below dir, several at once.
func each(b *testing.B, dir string, use func(f *os.File) error) {
	b.Helper()
	var g errgroup.Group
	g.SetLimit(depth)
	err := filepath.WalkDir(dir, func(name string, e fs.DirEntry, err error) error {
		if err != nil || !e.Type().IsRegular() {
			return err
		}
		g.Go(func() error {
			f, err := os.Open(name)
			if err != nil {
				return err
			}
			defer f.Close()
			return use(f)
		})
		return nil
	})
	if err == nil {
		err = g.Wait()
	}
	if err != nil {
		b.Fatal(err)
	}
}

func uncache(b *testing.B, dir string) {
	b.Helper()
	each(b, dir, func(f *os.File) error { return unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED) })
}

func readAll(b *testing.B, dir string) int64 {
	b.Helper()
	sizes := make(chan int64, 1<<20)
	each(b, dir, func(f *os.File) error {
		n, err := io.Copy(io.Discard, f)
		sizes <- n
		return err
	})
	close(sizes)
	var sum int64
	for n := range sizes {
		sum += n
	}
	return sum
}

func hashAll(b *testing.B, bytes int64) {
	b.Helper()
	var g errgroup.Group
	for range runtime.NumCPU() {
		g.Go(func() error {
			h, buf := sha256.New(), make([]byte, chunk)
			for left := bytes / int64(runtime.NumCPU()); left > 0; left -= chunk {
				h.Write(buf)
			}
			return nil
		})
	}
	_ = g.Wait() // returns nil
}
