// Package powerdisk is a disk that can lose its power: a loop device whose writes and
// flushes are recorded in their order, and what any moment of the recording can have
// left on the medium, if what was not flushed yet was written in part and in any order.
//
// Its contents come from a server of the NBD protocol in this process.
package powerdisk

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"

	"github.com/selkies-project/packer-plugin-selkies/e2e/host"
)

// Disk is an attached disk.
type Disk struct {
	// Path is the block device.
	Path string

	server *server
	listen net.Listener
	dir    string
	nbd    *host.NBD
}

// Attach attaches the disk image, to which it writes, and begins to record.
func Attach(ctx context.Context, image string) (_ *Disk, err error) {
	dir, err := os.MkdirTemp("", "powerdisk-")
	if err != nil {
		return nil, err
	}
	d := &Disk{dir: dir}
	defer func() {
		if err != nil {
			err = fmt.Errorf("attaching %s: %w", image, errors.Join(err, d.Close()))
		}
	}()
	if d.server, err = newServer(image); err != nil {
		return nil, err
	}
	socket := filepath.Join(dir, "socket")
	if d.listen, err = net.Listen("unix", socket); err != nil {
		return nil, err
	}
	go func() {
		if err := d.server.serve(d.listen); err != nil && !errors.Is(err, net.ErrClosed) {
			fmt.Fprintf(os.Stderr, "serving %s: %v\n", image, err)
		}
	}()
	if d.nbd, err = host.AttachNBD(ctx, false, false, "nbd+unix:///?socket="+socket); err != nil {
		return nil, err
	}
	d.Path = d.nbd.Path
	return d, nil
}

// Close detaches the disk, which must not be mounted any more.
func (d *Disk) Close() error {
	var errs []error
	if d.nbd != nil {
		errs = append(errs, d.nbd.Close())
	}
	if d.listen != nil {
		errs = append(errs, d.listen.Close())
	}
	if d.server != nil {
		errs = append(errs, d.server.file.Close())
	}
	return errors.Join(append(errs, os.RemoveAll(d.dir))...)
}

// Log is what has been recorded so far.
func (d *Disk) Log() *Log { return d.server.snapshot() }
