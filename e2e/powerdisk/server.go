package powerdisk

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"

	"golang.org/x/sys/unix"
)

// The NBD protocol, github.com/NetworkBlockDevice/nbd/blob/master/doc/proto.md: its
// fixed newstyle negotiation and simple replies, as far as libnbd needs them.
const (
	magicServer   = 0x4e42444d41474943 // "NBDMAGIC"
	magicOption   = 0x49484156454f5054 // "IHAVEOPT"
	magicOptReply = 0x0003e889045565a9
	magicRequest  = 0x25609513
	magicReply    = 0x67446698

	flagFixedNewstyle = 1

	optAbort = 2
	optGo    = 7

	repAck            = 1
	repInfo           = 3
	repErrUnsupported = 1<<31 + 1
	infoExport        = 0

	flagHasFlags  = 1
	flagSendFlush = 1 << 2
	flagSendFUA   = 1 << 3

	cmdRead       = 0
	cmdWrite      = 1
	cmdDisconnect = 2
	cmdFlush      = 3
	cmdFlagFUA    = 1

	// maxRequest is more than libnbd ever sends.
	maxRequest = 64 << 20
)

// server serves one disk image to one client, one request after another, so that the
// order of completion is that of the recording.
type server struct {
	file *os.File
	size int64

	mu  sync.Mutex
	log []entry
}

func newServer(image string) (*server, error) {
	f, err := os.OpenFile(image, os.O_RDWR, 0)
	if err != nil {
		return nil, err
	}
	fi, err := f.Stat()
	if err != nil {
		f.Close()
		return nil, err
	}
	return &server{file: f, size: fi.Size()}, nil
}

func (s *server) snapshot() *Log {
	s.mu.Lock()
	defer s.mu.Unlock()
	return &Log{entries: s.log[:len(s.log):len(s.log)]}
}

func (s *server) record(e entry) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.log = append(s.log, e)
}

// serve serves a single connection.
func (s *server) serve(l net.Listener) error {
	conn, err := l.Accept()
	if err != nil {
		return err
	}
	defer conn.Close()
	if err := s.negotiate(conn); err != nil {
		return fmt.Errorf("negotiating: %w", err)
	}
	for {
		err := s.request(conn)
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
	}
}

func (s *server) negotiate(conn net.Conn) error {
	hello := binary.BigEndian.AppendUint64(nil, magicServer)
	hello = binary.BigEndian.AppendUint64(hello, magicOption)
	if _, err := conn.Write(binary.BigEndian.AppendUint16(hello, flagFixedNewstyle)); err != nil {
		return err
	}
	if _, err := io.ReadFull(conn, make([]byte, 4)); err != nil { // the client's flags
		return err
	}
	for {
		header := make([]byte, 16)
		if _, err := io.ReadFull(conn, header); err != nil {
			return err
		}
		option, length := binary.BigEndian.Uint32(header[8:]), binary.BigEndian.Uint32(header[12:])
		if magic := binary.BigEndian.Uint64(header); magic != magicOption || length > maxRequest {
			return fmt.Errorf("option %d of %d bytes with magic %#x", option, length, magic)
		}
		if _, err := io.CopyN(io.Discard, conn, int64(length)); err != nil {
			return err
		}
		switch option {
		case optGo:
			info := binary.BigEndian.AppendUint16(nil, infoExport)
			info = binary.BigEndian.AppendUint64(info, uint64(s.size))
			info = binary.BigEndian.AppendUint16(info, flagHasFlags|flagSendFlush|flagSendFUA)
			if err := optionReply(conn, option, repInfo, info); err != nil {
				return err
			}
			return optionReply(conn, option, repAck, nil)
		case optAbort:
			return errors.New("the client has given up")
		default:
			if err := optionReply(conn, option, repErrUnsupported, nil); err != nil {
				return err
			}
		}
	}
}

func optionReply(conn net.Conn, option, kind uint32, data []byte) error {
	b := binary.BigEndian.AppendUint64(nil, magicOptReply)
	b = binary.BigEndian.AppendUint32(b, option)
	b = binary.BigEndian.AppendUint32(b, kind)
	b = binary.BigEndian.AppendUint32(b, uint32(len(data)))
	_, err := conn.Write(append(b, data...))
	return err
}

// request answers one request; io.EOF is the end.
func (s *server) request(conn net.Conn) error {
	header := make([]byte, 28)
	if _, err := io.ReadFull(conn, header); err != nil {
		return err
	}
	flags, command := binary.BigEndian.Uint16(header[4:]), binary.BigEndian.Uint16(header[6:])
	offset, length := int64(binary.BigEndian.Uint64(header[16:])), binary.BigEndian.Uint32(header[24:])
	if magic := binary.BigEndian.Uint32(header); magic != magicRequest || length > maxRequest {
		return fmt.Errorf("request %d of %d bytes with magic %#x", command, length, magic)
	}
	var data []byte
	var err error
	switch command {
	case cmdRead:
		data = make([]byte, length)
		_, err = s.file.ReadAt(data, offset)
	case cmdWrite:
		written := make([]byte, length)
		if _, err := io.ReadFull(conn, written); err != nil {
			return err
		}
		if _, err = s.file.WriteAt(written, offset); err == nil {
			s.record(entry{offset, written})
		}
		if flags&cmdFlagFUA != 0 {
			s.record(entry{})
		}
	case cmdFlush:
		s.record(entry{})
	case cmdDisconnect:
		return io.EOF
	default:
		err = unix.EINVAL
	}
	reply := binary.BigEndian.AppendUint32(nil, magicReply)
	if err == nil {
		reply = binary.BigEndian.AppendUint32(reply, 0)
	} else {
		reply, data = binary.BigEndian.AppendUint32(reply, uint32(unix.EIO)), nil
	}
	reply = append(reply, header[8:16]...) // the request's cookie
	_, err = conn.Write(append(reply, data...))
	return err
}
