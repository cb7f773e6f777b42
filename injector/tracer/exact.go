package tracer

import (
	"bytes"
	"errors"
	"fmt"
	"os/exec"
	"strconv"
	"strings"
	"syscall"

	"github.com/moby/sys/mountinfo"
	"golang.org/x/sys/unix"
)

// ahead is how much the kernel reads around what is asked for while a start is recorded,
// in bytes. With less there is less in the trace that nobody needs, and the start takes
// longer: docs/read-ahead.md has figures.
const ahead = 32 << 10

// lessAhead sets how much the kernel reads ahead from the device $0, in units of 512 bytes,
// until standard input ends. It is a process of its own, so that this holds for an injector
// that was killed as well.
const lessAhead = `was=$(blockdev --getra "$0") && blockdev --setra "$1" "$0" && echo ready && cat >/dev/null
blockdev --setra "$was" "$0"`

// Exact has the kernel read no more than little around what is asked for from the disk
// that has the image's files, until done is called: what it reads ahead on its own is no
// part of a start, but would be of the trace. Where the disk's file system is not on a
// block device it does nothing.
func (t *Tracer) Exact() (done func() error, err error) {
	device, err := t.device()
	if err != nil {
		return nil, err
	}
	if device == "" {
		return func() error { return nil }, nil
	}
	cmd := exec.Command("sh", "-c", lessAhead, device, strconv.Itoa(ahead/512))
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true} // what ends this program's group spares it
	var said bytes.Buffer
	cmd.Stderr = &said
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	done = func() error {
		stdin.Close()
		if err := cmd.Wait(); err != nil {
			return fmt.Errorf("setting how much is read ahead from %s: %w: %s", device, err, bytes.TrimSpace(said.Bytes()))
		}
		return nil
	}
	if n, _ := stdout.Read(make([]byte, 16)); n == 0 {
		return nil, errors.Join(done(), err)
	}
	return done, nil
}

// device is the block device that the disk's file system is on, "" if it is on none.
func (t *Tracer) device() (string, error) {
	var st unix.Stat_t
	if err := unix.Stat(t.disk.Dir, &st); err != nil {
		return "", err
	}
	mounts, err := mountinfo.GetMounts(func(m *mountinfo.Info) (skip, stop bool) {
		this := unix.Mkdev(uint32(m.Major), uint32(m.Minor)) == st.Dev && strings.HasPrefix(m.Source, "/dev/")
		return !this, this
	})
	if err != nil || len(mounts) == 0 {
		return "", err
	}
	return mounts[0].Source, nil
}
