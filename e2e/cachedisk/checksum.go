package cachedisk

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"testing"

	"golang.org/x/sys/unix"
)

// Checksum is of a disk image's contents. Blocks of zeros do not count: where such a
// file has holes may change by itself.
func Checksum(t testing.TB, image string) string {
	t.Helper()
	f, err := os.Open(image)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	sum, err := checksum(f)
	if err != nil {
		t.Fatalf("hashing %s: %v", image, err)
	}
	return sum
}

func checksum(f *os.File) (string, error) {
	h := sha256.New()
	block, zeros := make([]byte, 4096), make([]byte, 4096)
	for end := int64(0); ; {
		start, err := f.Seek(end, unix.SEEK_DATA)
		if errors.Is(err, unix.ENXIO) {
			return hex.EncodeToString(h.Sum(nil)), nil
		}
		if err != nil {
			return "", err
		}
		if end, err = f.Seek(start, unix.SEEK_HOLE); err != nil {
			return "", err
		}
		for at := start; at < end; at += int64(len(block)) {
			if _, err := f.ReadAt(block, at); err != nil {
				return "", err
			}
			if !bytes.Equal(block, zeros) {
				fmt.Fprintf(h, "%d:", at)
				h.Write(block)
			}
		}
	}
}
