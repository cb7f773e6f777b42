package verify

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"hash"
	"hash/crc64"
	"io"
	"io/fs"
	"path"
	"strings"

	"github.com/vbatts/tar-split/tar/storage"
)

// chunk is how much is read and hashed at a time, in bytes.
const chunk = 256 << 10

// stream rebuilds a layer's tar stream.
type stream struct {
	headers *pieces
	hash    hash.Hash
	// claim is called for each file, with the size that the headers give it, before it
	// is read.
	claim func(int64) error
	// read is called before bytes of contents are read.
	read func(context.Context, int) error
	// named is whether every damaged file is named, by the checksum that tar-split keeps
	// of it. Without, the first that cannot be read ends the stream: it is the diff ID
	// that proves the layer, and two sums cost more than one.
	named    bool
	problems []string
	buf      []byte
}

// errDamaged is of a stream that cannot be the layer's.
var errDamaged = errors.New("damaged")

// rebuild goes through the stream to its end.
func (s *stream) rebuild(ctx context.Context, records <-chan record) error {
	s.buf = make([]byte, chunk)
	for e := range records {
		switch {
		case e.err != nil:
			return fmt.Errorf("reading its recorded headers: %w", e.err)
		case e.Type == storage.SegmentType:
			s.hash.Write(e.Payload)
			s.headers.send(piece{bytes: e.Payload})
		case e.Type != storage.FileType:
			return fmt.Errorf("reading its recorded headers: record %d is of an unknown type", e.Position)
		case e.file != nil:
			if err := s.claim(e.Size); err != nil {
				e.close()
				return err
			}
			s.headers.send(piece{gap: e.Size, name: e.GetName()})
			if err := s.file(ctx, e); err != nil {
				return err
			}
		}
	}
	return ctx.Err()
}

// file reads a file's contents. The error, unless it is errDamaged, is for what may not
// be read: it says nothing about the layer.
func (s *stream) file(ctx context.Context, e record) error {
	var o opened
	select {
	case o = <-e.file:
	case <-ctx.Done():
		go e.close()
		return ctx.Err()
	}
	if o.f != nil {
		defer o.f.Close()
	}
	failed := o.err
	sum := crc64.New(storage.CRCTable)
	for left := e.Size; left > 0 && failed == nil; {
		buf := s.buf[:min(left, chunk)]
		if err := s.read(ctx, len(buf)); err != nil {
			return err
		}
		var n int
		n, failed = io.ReadFull(o.f, buf)
		if s.named {
			sum.Write(buf[:n])
		} else {
			s.hash.Write(buf[:n])
		}
		left -= int64(n)
	}
	name := clean(e.GetName())
	switch {
	case errors.Is(failed, fs.ErrPermission):
		return failed
	case failed != nil && !s.named:
		return errDamaged
	case errors.Is(failed, io.EOF), errors.Is(failed, io.ErrUnexpectedEOF): // told by its size
	case failed != nil:
		s.problems = append(s.problems, fmt.Sprintf("%q cannot be read: %v", name, failed))
	case s.named && !bytes.Equal(sum.Sum(nil), e.Payload):
		s.problems = append(s.problems, fmt.Sprintf("%q has other contents", name))
	}
	return nil
}

// escapes says if dockerd, which joins its store's directory and the name, would leave
// the layer. It unpacks no such name.
func escapes(name string) bool {
	name = path.Clean(name)
	return name == ".." || strings.HasPrefix(name, "../")
}

// clean is the name of a tar entry relative to the layer's root, "." for the root.
func clean(name string) string {
	if name = strings.TrimPrefix(path.Join("/", name), "/"); name == "" {
		return "."
	}
	return name
}
