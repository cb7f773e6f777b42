package cachedisk

import (
	"errors"
	"fmt"
	"io/fs"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// TestRemedy tells a disk that is not there from one that is not what it should be.
func TestRemedy(t *testing.T) {
	for errno, want := range map[unix.Errno]string{
		unix.EIO:          "attach the disk again", // a device that fails
		unix.ENODEV:       "attach the disk again", // or is gone
		unix.EACCES:       "run as root",
		unix.ENOENT:       "build the disk again",
		unix.ELOOP:        "build the disk again", // a symbolic link
		unix.ENAMETOOLONG: "build the disk again",
		unix.EXDEV:        "build the disk again", // another mount
		unix.EUCLEAN:      "build the disk again", // ext4 is damaged
		unix.EBADMSG:      "build the disk again", // ext4's checksum is wrong
	} {
		err := remedy(unreadable(&fs.PathError{Op: "open", Path: "/cache/file", Err: errno}))
		if !strings.HasSuffix(err.Error(), "; "+want) || !errors.Is(err, errno) || !strings.Contains(err.Error(), "/cache/file") {
			t.Errorf("%v: %v, want %q", errno, err, want)
		}
		if got := errors.Is(err, ErrUnreadable); got != (want != "build the disk again") {
			t.Errorf("%v: unreadable %t", errno, got)
		}
	}
}

// TestExplain has the errors of the mount calls say what is missing.
func TestExplain(t *testing.T) {
	for errno, want := range map[unix.Errno]string{
		unix.ENOSYS: "the kernel is too old; Linux 5.12 or newer is needed",
		unix.EPERM:  "CAP_SYS_ADMIN",
		unix.EACCES: "CAP_SYS_ADMIN",
		unix.ENOENT: "--host-root",
		unix.EIO:    "input/output error",
	} {
		if err := Explain(fmt.Errorf("cloning the mount: %w", errno)); !strings.Contains(err.Error(), want) || !errors.Is(err, errno) {
			t.Errorf("%v: %v, want %q", errno, err, want)
		}
	}
}
