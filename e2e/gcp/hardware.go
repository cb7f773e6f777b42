package gcp

import "context"

// Hardware makes real what the server keeps records of. Resources are named by
// their paths, as in "projects/p/zones/z/disks/d". Calls about different resources
// come at the same time.
type Hardware interface {
	// CreateDisk makes a disk of size bytes with the contents of an image, or a
	// blank one where image is "".
	CreateDisk(ctx context.Context, disk, image string, size int64) error
	DeleteDisk(ctx context.Context, disk string) error
	// CreateImage makes an image of a disk that nobody writes to.
	CreateImage(ctx context.Context, image, disk string) error
	DeleteImage(ctx context.Context, image string) error
	// StartInstance boots a machine and returns once it runs.
	StartInstance(ctx context.Context, instance string, metadata map[string]string, disks []Attachment) (Address, error)
	DeleteInstance(ctx context.Context, instance string) error
	SetMetadata(ctx context.Context, instance string, metadata map[string]string) error
	AttachDisk(ctx context.Context, instance string, a Attachment) error
	DetachDisk(ctx context.Context, instance string, a Attachment) error
	// SerialOutput is what the machine has printed on its console.
	SerialOutput(instance string) string
}

// Attachment is a disk in an instance.
type Attachment struct {
	Disk string
	// DeviceName is the NAME of /dev/disk/by-id/google-NAME.
	DeviceName     string
	ReadOnly, Boot bool
}

// Address is where an instance can be reached.
type Address struct {
	// External and Internal are IP addresses, which may be the same.
	External, Internal string
}
