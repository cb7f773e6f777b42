package verify

import (
	"archive/tar"
	"errors"
	"io"
)

// pieces is a tar stream without the files' contents, which whoever reads the headers
// seeks across.
type pieces struct {
	in  chan piece
	cur piece
	pos int64
	end chan struct{} // closed when nobody reads any more
}

// piece is bytes, or a gap of that length.
type piece struct {
	bytes []byte
	gap   int64
}

func newPieces() *pieces { return &pieces{in: make(chan piece, depth), end: make(chan struct{})} }

func (p *pieces) send(bytes []byte, gap int64) {
	select {
	case p.in <- piece{bytes, gap}:
	case <-p.end:
	}
}

// next has a piece that is not used up.
func (p *pieces) next() error {
	for len(p.cur.bytes) == 0 && p.cur.gap == 0 {
		var ok bool
		if p.cur, ok = <-p.in; !ok {
			return io.EOF
		}
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
		p.cur.gap -= int64(n)
	}
	p.pos += int64(n)
	return n, nil
}

// Seek goes forward from where it is, no further than to the end, as package tar does
// to pass a file.
func (p *pieces) Seek(offset int64, whence int) (int64, error) {
	if whence != io.SeekCurrent || offset < 0 {
		return 0, errors.ErrUnsupported
	}
	for offset > 0 && p.next() == nil {
		n := min(int64(len(p.cur.bytes)), offset)
		p.cur.bytes = p.cur.bytes[n:]
		if n == 0 {
			n = min(p.cur.gap, offset)
			p.cur.gap -= n
		}
		offset -= n
		p.pos += n
	}
	return p.pos, nil
}

// tree reads the headers. It is nil if they cannot be read.
func (p *pieces) tree() tree {
	defer close(p.end)
	t := tree{}
	tr := tar.NewReader(p)
	for {
		hdr, err := tr.Next()
		if err == io.EOF {
			return t
		}
		if err != nil {
			return nil
		}
		t.add(hdr)
	}
}
