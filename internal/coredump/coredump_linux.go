package coredump

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// Forbid has the kernel write no core of this process, and none of those that it starts
// either. Users other than root can no longer read its memory or trace it.
//
// The limit holds for children too, but not for programs that take cores by a pipe, such as
// systemd-coredump; being dumpable is what they go by (core(5)).
func Forbid() error {
	if err := unix.Setrlimit(unix.RLIMIT_CORE, &unix.Rlimit{}); err != nil {
		return fmt.Errorf("setting RLIMIT_CORE to 0: %w", err)
	}
	if err := unix.Prctl(unix.PR_SET_DUMPABLE, 0, 0, 0, 0); err != nil {
		return fmt.Errorf("setting PR_SET_DUMPABLE to 0: %w", err)
	}
	return nil
}
