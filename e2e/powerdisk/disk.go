// Package powerdisk is a disk that can lose its power: a loop device whose writes and
// flushes are recorded in their order, and what any moment of the recording can have
// left on the medium, if what was not flushed yet was written in part and in any order.
//
// The kernel's block devices that can do so (dm-log-writes, nbd, ublk) are not in every
// kernel. So the disk is a file by FUSE, nbdfuse's, whose contents come from a server of
// the NBD protocol in this process.
package powerdisk

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/selkies-project/packer-plugin-selkies/e2e/host"
)

// Disk is an attached disk.
type Disk struct {
	// Path is the block device.
	Path string

	server  *server
	served  chan error
	listen  net.Listener
	nbdfuse *exec.Cmd
	dir     string
	loop    *host.Loop
}

// Attach attaches the disk image, to which it writes, and begins to record.
func Attach(ctx context.Context, image string) (_ *Disk, err error) {
	dir, err := os.MkdirTemp("", "powerdisk-")
	if err != nil {
		return nil, err
	}
	d := &Disk{dir: dir, served: make(chan error, 1)}
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
	go func() { d.served <- d.server.serve(d.listen) }()
	if err := os.Mkdir(d.mount(), 0o700); err != nil {
		return nil, err
	}
	// In the foreground, it ends when its directory is unmounted.
	d.nbdfuse = exec.CommandContext(ctx, "nbdfuse", d.mount(), "nbd+unix:///?socket="+socket)
	d.nbdfuse.Stderr = os.Stderr
	if err := d.nbdfuse.Start(); err != nil {
		return nil, err
	}
	file := filepath.Join(d.mount(), "nbd")
	if err := d.waitFor(file); err != nil {
		return nil, err
	}
	if d.loop, err = host.AttachLoop(file, false); err != nil {
		return nil, err
	}
	d.Path = d.loop.Path
	return d, nil
}

func (d *Disk) mount() string { return filepath.Join(d.dir, "fuse") }

func (d *Disk) waitFor(file string) error {
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	timeout := time.After(20 * time.Second)
	for {
		if fi, err := os.Stat(file); err == nil && fi.Size() > 0 {
			return nil
		}
		select {
		case <-tick.C:
		case err := <-d.served:
			return fmt.Errorf("serving the disk: %w", err)
		case <-timeout:
			return errors.New("nbdfuse does not serve the disk")
		}
	}
}

// Close detaches the disk, which must not be mounted any more.
func (d *Disk) Close() error {
	var errs []error
	if d.loop != nil {
		errs = append(errs, d.loop.Close())
	}
	if d.nbdfuse != nil && d.nbdfuse.Process != nil {
		// The kernel lets go of a loop device's file a moment later.
		errs = append(errs, unix.Unmount(d.mount(), unix.MNT_DETACH), d.nbdfuse.Wait())
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
