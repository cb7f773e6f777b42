package containerd

import (
	"fmt"

	"github.com/docker/go-units"
	"golang.org/x/sys/unix"
)

// What registering takes on the node's file system, rounded up: a layer has a
// snapshot directory with fs and work, and entries in two databases, which grow
// by up to 16 MiB at a time.
const (
	layerBytes  = 16 << 10
	layerInodes = 3
	blobInodes  = 2
	spareBytes  = 32 << 20
	spareInodes = 64
)

// checkRoom refuses to begin what the node has no room for. It is rough: what
// still runs out on the way is reported as such, and the images that were not
// reached stay invisible.
func (r *Runtime) checkRoom(jobs []*job) error {
	var bytes, inodes uint64
	for _, j := range jobs {
		if j.done() {
			continue
		}
		// Layers that images share are counted for each.
		bytes += uint64(len(j.absent)) * layerBytes
		inodes += uint64(len(j.absent)) * layerInodes
		for _, b := range j.blobs {
			bytes += uint64(len(b.desc.Data)) + 4096
			inodes += blobInodes
		}
	}
	if bytes == 0 {
		return nil
	}
	bytes, inodes = bytes+spareBytes, inodes+spareInodes
	var fs unix.Statfs_t
	if err := unix.Statfs(r.host(r.root), &fs); err != nil {
		return fmt.Errorf("looking at the room below %s: %w", r.root, err)
	}
	free := fs.Bavail * uint64(fs.Bsize)
	if free < bytes {
		return fmt.Errorf("no room on the node: %s has %s free, registering needs %s: free some space there",
			r.root, units.BytesSize(float64(free)), units.BytesSize(float64(bytes)))
	}
	// Some file systems have no inode limit and say 0 of 0.
	if fs.Files > 0 && fs.Ffree < inodes {
		return fmt.Errorf("no room on the node: %s has %d inodes free, registering needs %d: remove some files there",
			r.root, fs.Ffree, inodes)
	}
	return nil
}
