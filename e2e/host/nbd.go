package host

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// NBD is a block device whose contents come from an NBD server, which can be slow, take
// down what is written, or die. A kernel need not have such devices (nbd, ublk, those of
// device-mapper): nbdfuse makes a file of what is served, and a loop device is on the file.
type NBD struct {
	*Loop
	dir     string
	nbdfuse *exec.Cmd
	ended   chan struct{}
}

// nbdTime is ten times what nbdfuse and its server take to start on two slow cores.
const nbdTime = 20 * time.Second

// AttachNBD attaches what nbdfuse is to serve: a URI, or "--command" and a server that
// speaks through its standard input and output. direct is that of AttachDirectLoop. The
// device ends with ctx as if it had been killed.
func AttachNBD(ctx context.Context, readOnly, direct bool, source ...string) (_ *NBD, err error) {
	dir, err := os.MkdirTemp("", "nbd-")
	if err != nil {
		return nil, err
	}
	d := &NBD{dir: dir, ended: make(chan struct{})}
	args := append([]string{dir}, source...)
	if readOnly {
		args = append([]string{"-r"}, args...)
	}
	// In the foreground, it ends when its directory is unmounted.
	d.nbdfuse = exec.CommandContext(ctx, "nbdfuse", args...)
	d.nbdfuse.Stderr = os.Stderr
	if err := d.nbdfuse.Start(); err != nil {
		return nil, errors.Join(fmt.Errorf("attaching %v: %w", source, err), os.RemoveAll(dir))
	}
	go func() {
		// What it says when it ends, it has said on standard error.
		_ = d.nbdfuse.Wait()
		close(d.ended)
	}()
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("attaching %v: %w", source, err), d.Close())
		}
	}()
	file := filepath.Join(dir, "nbd")
	if err := d.await(file); err != nil {
		return nil, err
	}
	if err := d.allowMany(); err != nil {
		return nil, err
	}
	if direct {
		d.Loop, err = AttachDirectLoop(file, readOnly)
	} else {
		d.Loop, err = AttachLoop(file, readOnly)
	}
	return d, err
}

// requests is how many requests the device has under way at once. For a file system in
// user space it is 12 by default (max_background in Documentation/filesystems/fuse.rst),
// and a network disk takes more.
const requests = "64"

func (d *NBD) allowMany() error {
	const control = "/sys/fs/fuse/connections"
	var st unix.Stat_t
	if err := unix.Stat(d.dir, &st); err != nil {
		return err
	}
	file := filepath.Join(control, fmt.Sprint(unix.Minor(st.Dev)), "max_background")
	if _, err := os.Stat(file); err != nil {
		// Debian's systemd has it mounted.
		if err := unix.Mount("fusectl", control, "fusectl", 0, ""); err != nil {
			return fmt.Errorf("mounting fusectl on %s: %w", control, err)
		}
	}
	return os.WriteFile(file, []byte(requests), 0)
}

// await waits for a file that is not empty.
func (d *NBD) await(file string) error {
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	timeout := time.NewTimer(nbdTime)
	defer timeout.Stop()
	for {
		if fi, err := os.Stat(file); err == nil && fi.Size() > 0 {
			return nil
		}
		select {
		case <-tick.C:
		case <-d.ended:
			return errors.New("nbdfuse has ended")
		case <-timeout.C:
			return errors.New("nbdfuse does not serve it")
		}
	}
}

// Hang has every request to the device wait, until Kill.
func (d *NBD) Hang() error {
	if err := d.nbdfuse.Process.Signal(unix.SIGSTOP); err != nil {
		return fmt.Errorf("stopping nbdfuse: %w", err)
	}
	return nil
}

// Kill lets the device go for good: from now on every request to it fails. What was
// mounted stays, and what the kernel has in memory of it.
func (d *NBD) Kill() error {
	if err := d.nbdfuse.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("killing nbdfuse: %w", err)
	}
	<-d.ended
	return nil
}

// Close detaches the device, which must not be mounted any more.
func (d *NBD) Close() error {
	var errs []error
	if d.Loop != nil {
		errs = append(errs, d.Loop.Close())
	}
	// The kernel lets go of a loop device's file a moment later. A machine that was booted
	// meanwhile has a mount of its own, so that nbdfuse would not end by itself.
	if err := unix.Unmount(d.dir, unix.MNT_DETACH); err != nil && !errors.Is(err, unix.EINVAL) {
		errs = append(errs, fmt.Errorf("unmounting %s: %w", d.dir, err))
	}
	if err := d.nbdfuse.Process.Signal(unix.SIGTERM); err != nil && !errors.Is(err, os.ErrProcessDone) {
		errs = append(errs, fmt.Errorf("ending nbdfuse: %w", err))
	}
	<-d.ended
	return errors.Join(append(errs, os.RemoveAll(d.dir))...)
}
