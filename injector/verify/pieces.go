package verify

import (
	"archive/tar"
	"context"
	"errors"
	"fmt"
	"io"
)

// pieces is a tar stream without the files' contents, which whoever reads the headers
// seeks across.
type pieces struct {
	in  chan piece
	cur piece
	pos int64
	// contents is whether the headers have come to a file's contents: there, and only
	// there, may a gap be.
	contents bool
	end      chan struct{} // closed when nobody reads any more
	paths    int           // that the headers may still make
}

// piece is bytes, or a gap as long as the contents of a file.
type piece struct {
	bytes []byte
	gap   int64
	name  string
}

func newPieces() *pieces {
	return &pieces{in: make(chan piece, depth), end: make(chan struct{}), paths: maxPaths}
}

func (p *pieces) send(next piece) {
	select {
	case p.in <- next:
	case <-p.end:
	}
}

// errGap is of contents in the place of headers.
var errGap = errors.New("a file's contents are where no file is")

// next has a piece that is not used up.
func (p *pieces) next() error {
	for len(p.cur.bytes) == 0 && p.cur.gap == 0 {
		var ok bool
		if p.cur, ok = <-p.in; !ok {
			return io.EOF
		}
	}
	if p.cur.gap > 0 && !p.contents {
		return errGap
	}
	return nil
}

// Read reads zeros in a gap.
func (p *pieces) Read(b []byte) (int, error) {
	if err := p.next(); err != nil {
		return 0, err
	}
	n := copy(b, p.cur.bytes)
	p.cur.bytes = p.cur.bytes[n:]
	if n == 0 {
		n = int(min(p.cur.gap, int64(len(b))))
		clear(b[:n])
		p.cut(int64(n))
	}
	p.pos += int64(n)
	return n, nil
}

func (p *pieces) cut(n int64) {
	if p.cur.gap -= n; p.cur.gap == 0 {
		p.contents = false
	}
}

// Seek goes forward from where it is, no further than to the end, as package tar does
// to pass a file.
func (p *pieces) Seek(offset int64, whence int) (int64, error) {
	if whence != io.SeekCurrent || offset < 0 {
		return 0, errors.ErrUnsupported
	}
	for offset > 0 {
		if err := p.next(); errors.Is(err, io.EOF) {
			break
		} else if err != nil {
			return 0, err
		}
		n := min(int64(len(p.cur.bytes)), offset)
		p.cur.bytes = p.cur.bytes[n:]
		if n == 0 {
			n = min(p.cur.gap, offset)
			p.cut(n)
		}
		offset -= n
		p.pos += n
	}
	return p.pos, nil
}

// maxPaths is how many headers there can be, in blocks of 512 bytes. No layer needs more
// directories that it has no header for.
const maxPaths = maxHeaders / 512

// tree reads the headers.
func (p *pieces) tree(ctx context.Context) (tree, error) {
	defer close(p.end)
	t := tree{}
	tr := tar.NewReader(p)
	for {
		hdr, err := tr.Next()
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		if errors.Is(err, io.EOF) {
			return t, nil
		}
		if err != nil {
			return nil, err
		}
		if hdr.Size > 0 {
			if err := p.readsFile(hdr); err != nil {
				return nil, err
			}
		}
		made, err := t.add(hdr)
		if err != nil {
			return nil, err
		}
		if p.paths -= made; p.paths < 0 {
			return nil, fmt.Errorf("more than %d paths", maxPaths)
		}
	}
}

// readsFile says if what follows are the contents of the header's file, as a whole. Were
// they among the headers, or another file's, the stream would be the layer's and the
// file on the disk need not be.
func (p *pieces) readsFile(hdr *tar.Header) error {
	p.contents = true
	if err := p.next(); err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	if p.cur.gap != hdr.Size || clean(p.cur.name) != clean(hdr.Name) {
		return fmt.Errorf("%q: its contents are not read from the file", hdr.Name)
	}
	return nil
}
