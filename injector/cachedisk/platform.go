package cachedisk

import (
	"errors"
	"fmt"
	"slices"

	"github.com/containerd/platforms"
)

// Runnable leaves out the disks of another platform, and the error names them:
// registered, their images would stand in the way of pulling those that this node
// can run.
func Runnable(disks []*Disk) ([]*Disk, error) {
	var errs []error
	disks = slices.DeleteFunc(disks, func(d *Disk) bool {
		if platforms.Default().Match(d.Manifest.Platform) {
			return false
		}
		errs = append(errs, fmt.Errorf("cache disk %s: its images are for %s, this node runs %s: build a disk for that platform",
			d.Dir, platforms.Format(d.Manifest.Platform), platforms.Format(platforms.DefaultSpec())))
		return true
	})
	return disks, errors.Join(errs...)
}
