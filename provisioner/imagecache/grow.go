package imagecache

import (
	"context"
	"fmt"
	"strconv"
	"strings"

	"github.com/docker/go-units"
)

// minGrowth is the least that is worth growing a file system for. mkfs.ext4 leaves a
// piece at the end unused that is too short for a block group of its own.
const minGrowth = 16 << 20

// room is how many bytes the file system can take, once it has been made or grown. It
// counts on the high side: what ext4 needs for itself is not known before.
func (d *cacheDisk) room(ctx context.Context) (int64, error) {
	if d.blank {
		return d.deviceSize(ctx)
	}
	free, err := freeBytes(ctx, d.vm, d.config.MountPoint)
	return free + d.growth, err
}

// unused is how many bytes at the end of the device its file system does not use: those
// of a disk that was made larger than the image that it was made from.
func (d *cacheDisk) unused(ctx context.Context) (int64, error) {
	size, err := d.deviceSize(ctx)
	if err != nil {
		return 0, err
	}
	out, err := d.vm.run(ctx, "dumpe2fs", "-h", d.device)
	if err != nil {
		return 0, fmt.Errorf("reading the size of the file system on %s: %w", d.option(), err)
	}
	used := int64(1)
	for _, field := range []string{"Block count:", "Block size:"} {
		_, rest, _ := strings.Cut(string(out), "\n"+field)
		value, _, _ := strings.Cut(rest, "\n")
		n, err := strconv.ParseInt(strings.TrimSpace(value), 10, 64)
		if err != nil {
			return 0, fmt.Errorf("reading the size of the file system on %s: %s %w", d.option(), field, err)
		}
		used *= n
	}
	if size-used < minGrowth {
		return 0, nil
	}
	return size - used, nil
}

func (d *cacheDisk) deviceSize(ctx context.Context) (int64, error) {
	out, err := d.vm.run(ctx, "blockdev", "--getsize64", d.device)
	if err != nil {
		return 0, fmt.Errorf("asking for the size of %s: %w", d.option(), err)
	}
	size, err := strconv.ParseInt(strings.TrimSpace(string(out)), 10, 64)
	if err != nil {
		return 0, fmt.Errorf("asking for the size of %s: %w", d.option(), err)
	}
	return size, nil
}

// grow makes the file system as large as its device. The disk is not mounted: the kernel
// grows a mounted one for CAP_SYS_RESOURCE only, which root in a container lacks, and
// before it grows one that is not, resize2fs asks for a check.
func (d *cacheDisk) grow(ctx context.Context) error {
	if d.growth == 0 {
		return nil
	}
	d.say("growing the file system on %s by %s to the size of the disk", d.device, units.HumanSize(float64(d.growth)))
	// Exit status 1 is for errors that were put right.
	if _, err := d.vm.run(ctx, "e2fsck", "-f", "-p", d.device); err != nil && exitStatus(err) != 1 {
		return fmt.Errorf(`checking the file system on %s before it grows: %w; erase it with disk.format = "always"`, d.option(), err)
	}
	if _, err := d.vm.run(ctx, "resize2fs", d.device); err != nil {
		return fmt.Errorf("growing the file system on %s: %w", d.option(), err)
	}
	return nil
}
