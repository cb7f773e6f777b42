package cachedisk

import (
	"cmp"
	"slices"
)

// NewestFirst sorts disks so that the newest generation comes first: its names win.
func NewestFirst(disks []*Disk) []*Disk {
	sorted := slices.Clone(disks)
	slices.SortFunc(sorted, func(a, b *Disk) int {
		return cmp.Or(b.Manifest.Created.Compare(a.Manifest.Created), cmp.Compare(a.ID, b.ID))
	})
	return sorted
}
