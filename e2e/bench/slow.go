package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"

	"github.com/selkies-project/packer-plugin-selkies/e2e/host"
)

// profile is a kind of network disk: how long it takes to answer a request, however many
// there are at once, and how many bytes a second it gives.
type profile struct {
	delay time.Duration
	rate  int64
}

// slow is a disk image with a profile. The kernel need not have a block device for that:
// nbdkit has the delays, nbdfuse makes a file of it, and a loop device is on the file.
type slow struct {
	*host.Loop
	dir     string
	nbdfuse *exec.Cmd
}

// attachSlow attaches a disk image, read-only or, with what is written to it kept
// elsewhere, for writing.
func attachSlow(ctx context.Context, image string, p profile, readOnly bool) (_ *slow, err error) {
	dir, err := os.MkdirTemp("", "bench-slow-")
	if err != nil {
		return nil, err
	}
	d := &slow{dir: dir}
	defer func() {
		if err != nil {
			err = fmt.Errorf("attaching %s: %w", image, errors.Join(err, d.Close()))
		}
	}()
	args := []string{dir, "--command", "nbdkit", "-s", "--threads=64", "--filter=delay", "--filter=rate"}
	if readOnly {
		args = append([]string{"-r"}, append(args, "-r")...)
	} else {
		args = append(args, "--filter=cow")
	}
	// nbdkit's rate is in bits, and what it gives at once after a pause is two seconds' worth
	// by default.
	args = append(args, "file", image, fmt.Sprintf("rdelay=%dms", p.delay.Milliseconds()), fmt.Sprintf("rate=%d", 8*p.rate), "burstiness=0.02")
	d.nbdfuse = exec.CommandContext(ctx, "nbdfuse", args...)
	if err := d.nbdfuse.Start(); err != nil {
		return nil, err
	}
	file := filepath.Join(dir, "nbd")
	if err := await(ctx, file); err != nil {
		return nil, err
	}
	d.Loop, err = host.AttachDirectLoop(file, readOnly)
	return d, err
}

// await waits for a file that is not empty.
func await(ctx context.Context, file string) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		if fi, err := os.Stat(file); err == nil && fi.Size() > 0 {
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("waiting for %s: %w", file, ctx.Err())
		}
	}
}

// Close detaches the disk, which must not be mounted any more.
func (d *slow) Close() error {
	var errs []error
	if d.Loop != nil {
		errs = append(errs, d.Loop.Close())
	}
	if d.nbdfuse.Process != nil {
		// The kernel lets go of a loop device's file a moment later. A machine that was booted
		// meanwhile has a mount of its own, so that nbdfuse would not end by itself.
		errs = append(errs, unix.Unmount(d.dir, unix.MNT_DETACH), d.nbdfuse.Process.Signal(unix.SIGTERM))
		_ = d.nbdfuse.Wait()
	}
	return errors.Join(append(errs, os.RemoveAll(d.dir))...)
}
