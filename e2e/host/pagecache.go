package host

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// DropCaches writes out all that is in the page cache and empties it, as that of a
// machine that has just booted.
func DropCaches() error {
	unix.Sync()
	if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0); err != nil {
		return fmt.Errorf("emptying the page cache: %w", err)
	}
	return nil
}
