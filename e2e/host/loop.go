package host

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// Loop is a block device whose contents are a file.
type Loop struct {
	// Path is the device, as in /dev/loop3.
	Path string
	dev  *os.File
}

// NewDisk makes an empty, sparse disk image of size bytes.
func NewDisk(image string, size int64) error {
	f, err := os.OpenFile(image, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	return errors.Join(f.Truncate(size), f.Close())
}

// AttachLoop makes a loop device of the file image. The kernel detaches it when it
// is closed, also by the end of the process, and no longer mounted anywhere.
func AttachLoop(image string, readOnly bool) (*Loop, error) {
	return attachLoop(image, readOnly, 0)
}

// AttachDirectLoop is AttachLoop for a file that is not to be kept in the page cache a
// second time: only so are several requests under way at once.
func AttachDirectLoop(image string, readOnly bool) (*Loop, error) {
	return attachLoop(image, readOnly, unix.LO_FLAGS_DIRECT_IO)
}

func attachLoop(image string, readOnly bool, flags uint32) (*Loop, error) {
	mode := os.O_RDWR
	config := unix.LoopConfig{Info: unix.LoopInfo64{Flags: unix.LO_FLAGS_AUTOCLEAR | flags}}
	if readOnly {
		mode = os.O_RDONLY
		config.Info.Flags |= unix.LO_FLAGS_READ_ONLY
	}
	file, err := os.OpenFile(image, mode, 0)
	if err != nil {
		return nil, err
	}
	defer file.Close()
	config.Fd = uint32(file.Fd())
	copy(config.Info.File_name[:len(config.Info.File_name)-1], image)

	control, err := os.OpenFile("/dev/loop-control", os.O_RDWR, 0)
	if err != nil {
		return nil, fmt.Errorf("attaching %s: %w", image, err)
	}
	defer control.Close()
	for {
		n, err := unix.IoctlRetInt(int(control.Fd()), unix.LOOP_CTL_GET_FREE)
		if err != nil {
			return nil, fmt.Errorf("finding a free loop device: %w", err)
		}
		path := fmt.Sprintf("/dev/loop%d", n)
		dev, err := os.OpenFile(path, mode, 0)
		if err != nil {
			return nil, fmt.Errorf("attaching %s: %w", image, err)
		}
		err = unix.IoctlLoopConfigure(int(dev.Fd()), &config)
		if err == nil {
			return &Loop{Path: path, dev: dev}, nil
		}
		dev.Close()
		// Someone else was quicker to take the free device.
		if !errors.Is(err, unix.EBUSY) {
			return nil, fmt.Errorf("attaching %s to %s: %w", image, path, err)
		}
	}
}

// Close detaches the device, or lets go of it if it is still mounted. Closing it
// again does nothing.
func (l *Loop) Close() error {
	if err := l.dev.Close(); err != nil && !errors.Is(err, os.ErrClosed) {
		return err
	}
	return nil
}
