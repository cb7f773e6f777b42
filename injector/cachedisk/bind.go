package cachedisk

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// Bind is one bind mount, both paths as the host sees them.
type Bind struct{ Source, Target string }

// BindOnHost makes bind mounts in the host's mount namespace. They are read-only
// where the mount of their source is.
func BindOnHost(hostRoot string, binds []Bind) error {
	return inHost(hostRoot, func() error {
		for _, b := range binds {
			if err := unix.Mount(b.Source, b.Target, "", unix.MS_BIND, ""); err != nil {
				return fmt.Errorf("binding the host's %s on %s: %w", b.Source, b.Target, Explain(err))
			}
		}
		return nil
	})
}
