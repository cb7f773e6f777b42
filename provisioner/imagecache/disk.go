package imagecache

import (
	"context"
	"fmt"
	"path"
	"slices"
	"strings"

	"github.com/selkies-project/packer-plugin-selkies/manifest"
)

const fileSystemLabel = "selkies-cache"

// cacheDisk is the disk that the build fills, mounted on the build VM.
type cacheDisk struct {
	vm     *vm
	config Disk
	say    func(format string, a ...any)

	device string
	// dockerVersion is that of the daemon that is to run on the disk.
	dockerVersion string
	// blank is a disk that is about to be formatted.
	blank bool
	// growth is by how many bytes the file system is about to grow.
	growth   int64
	lifeline *lifeline
}

// look checks the disk and finds out what a build starts from. It changes nothing on the
// disk: one with a file system is left mounted read-only.
func (d *cacheDisk) look(ctx context.Context) error {
	major, minor, err := d.find(ctx)
	if err != nil {
		return err
	}
	if err := d.checkDocker(ctx); err != nil {
		return err
	}
	if err := stopLeftovers(ctx, d.vm, d.say); err != nil {
		return err
	}
	if err := d.checkUnmounted(ctx, major, minor); err != nil {
		return err
	}
	if d.blank, err = d.toFormat(ctx); err != nil || d.blank {
		return err
	}
	if err := d.makeMountPoint(ctx); err != nil {
		return err
	}
	// Not even its journal is touched if the disk is refused.
	if err := d.attach(ctx, "ro,noload"); err != nil {
		return err
	}
	if err := d.checkOurs(ctx); err != nil {
		return err
	}
	d.growth, err = d.unused(ctx)
	return err
}

// prepare makes the disk ready for a daemon, and mounts it for writing.
func (d *cacheDisk) prepare(ctx context.Context) error {
	if d.blank {
		if err := d.format(ctx); err != nil {
			return err
		}
		if err := d.makeMountPoint(ctx); err != nil {
			return err
		}
	} else {
		if _, err := d.vm.run(ctx, "umount", d.config.MountPoint); err != nil {
			return fmt.Errorf("mounting %s for writing: %w", d.option(), err)
		}
		if err := d.grow(ctx); err != nil {
			return err
		}
	}
	if err := d.attach(ctx, "nodev,noatime"); err != nil {
		return err
	}
	if _, err := d.vm.run(ctx, "mkdir", "--parents", path.Join(d.config.MountPoint, manifest.Dir)); err != nil {
		return fmt.Errorf("marking %s as an image cache: %w", d.option(), err)
	}
	return nil
}

// option names what the configuration calls the disk.
func (d *cacheDisk) option() string {
	if d.config.Label != "" {
		return fmt.Sprintf("disk.label %q", d.config.Label)
	}
	return fmt.Sprintf("disk.device %q", d.config.Device)
}

func (d *cacheDisk) find(ctx context.Context) (major, minor int, err error) {
	d.device = d.config.Device
	if d.config.Label != "" {
		out, err := d.vm.run(ctx, "findfs", "LABEL="+d.config.Label)
		if err != nil {
			if exitStatus(err) < 0 {
				return 0, 0, err
			}
			return 0, 0, fmt.Errorf("%s: no disk of the build VM has a file system with that label; format it first with disk.device", d.option())
		}
		d.device = strings.TrimSpace(string(out))
	}
	out, err := d.vm.run(ctx, "stat", "--dereference", "--format=%t %T %F", d.device)
	if err != nil {
		if exitStatus(err) < 0 {
			return 0, 0, err
		}
		return 0, 0, fmt.Errorf("%s: the build VM has no such device; attach the disk to it", d.option())
	}
	var kind string
	if _, err := fmt.Sscanf(string(out), "%x %x %s", &major, &minor, &kind); err != nil || kind != "block" {
		return 0, 0, fmt.Errorf("%s is not a block device", d.option())
	}
	return major, minor, nil
}

// checkUnmounted refuses a device that someone else uses and a mount point that
// is taken.
func (d *cacheDisk) checkUnmounted(ctx context.Context, major, minor int) error {
	mounts, err := mountTable(ctx, d.vm)
	if err != nil {
		return err
	}
	stale := false
	for _, m := range mounts {
		same := m.major == major && m.minor == minor
		switch {
		case same && (m.point == d.config.MountPoint || strings.HasPrefix(m.point, d.config.MountPoint+"/")):
			stale = true
		case same:
			return fmt.Errorf("%s is mounted on %s of the build VM; unmount it there first", d.option(), m.point)
		case m.point == d.config.MountPoint:
			return fmt.Errorf("disk.mount_point %q has %s mounted on it on the build VM; choose another", d.config.MountPoint, m.source)
		}
	}
	if stale {
		d.say("unmounting %s, which an earlier build left mounted", d.config.MountPoint)
		if _, err := d.vm.run(ctx, "umount", "--recursive", d.config.MountPoint); err != nil {
			return fmt.Errorf("unmounting what an earlier build left mounted: %w", err)
		}
	}
	return nil
}

// toFormat decides whether the disk is formatted, and refuses one that may not be used.
func (d *cacheDisk) toFormat(ctx context.Context) (bool, error) {
	holds, err := d.holds(ctx)
	if err != nil {
		return false, err
	}
	switch {
	case d.config.Format == formatAlways:
	case holds == "an ext4 file system":
		return false, nil
	case holds != "":
		return false, fmt.Errorf(`%s holds %s; choose another disk, or erase this one with disk.format = "always"`, d.option(), holds)
	case d.config.Format == formatNever:
		return false, fmt.Errorf(`%s is blank; set disk.format = "if-blank" to have it formatted`, d.option())
	}
	return true, nil
}

func (d *cacheDisk) format(ctx context.Context) error {
	d.say("making an ext4 file system on %s", d.device)
	// No blocks are reserved for root: nothing else will ever write to this disk.
	if _, err := d.vm.run(ctx, "mkfs.ext4", "-q", "-F", "-m", "0", "-L", fileSystemLabel, d.device); err != nil {
		return fmt.Errorf("formatting %s: %w", d.option(), err)
	}
	return nil
}

// holds says what is on the device, "" if it is blank.
func (d *cacheDisk) holds(ctx context.Context) (string, error) {
	// Low-level probing, past the cache: exit status 2 is "nothing found".
	out, err := d.vm.run(ctx, "blkid", "--probe", "--output", "export", d.device)
	if s := exitStatus(err); s == 8 {
		return "signatures of several file systems", nil
	} else if err != nil && s != 2 {
		return "", fmt.Errorf("probing %s: %w", d.option(), err)
	}
	found := map[string]string{}
	for line := range strings.Lines(string(out)) {
		if k, v, ok := strings.Cut(strings.TrimSpace(line), "="); ok {
			found[k] = v
		}
	}
	switch {
	case found["TYPE"] == "ext4":
		return "an ext4 file system", nil
	case found["TYPE"] != "":
		return fmt.Sprintf("a foreign %s file system", found["TYPE"]), nil
	case found["PTTYPE"] != "":
		return fmt.Sprintf("a %s partition table", found["PTTYPE"]), nil
	}
	// A second opinion before anything is erased: wipefs also reports what blkid
	// takes for ambiguous or too weak.
	out, err = d.vm.run(ctx, "wipefs", "--no-act", "--noheadings", "--output", "TYPE", d.device)
	if err != nil {
		return "", fmt.Errorf("probing %s: %w", d.option(), err)
	}
	if types := strings.Fields(string(out)); len(types) > 0 {
		return "a signature of " + strings.Join(types, ", "), nil
	}
	return "", nil
}

// makeMountPoint makes the mount point, and starts the lifeline that undoes what follows.
func (d *cacheDisk) makeMountPoint(ctx context.Context) error {
	var made []string
	for _, dir := range []string{d.config.MountPoint, dockerConfig, containerdState} {
		dirs, err := missing(ctx, d.vm, dir)
		if err != nil {
			return err
		}
		made = append(made, dirs...)
	}
	var err error
	if d.lifeline, err = startLifeline(ctx, d.vm, d.config.MountPoint, made); err != nil {
		return err
	}
	if _, err := d.vm.run(ctx, "mkdir", "--parents", d.config.MountPoint); err != nil {
		return fmt.Errorf("making disk.mount_point: %w", err)
	}
	return nil
}

// missing are the directories that have to be made for dir to exist, dir first.
func missing(ctx context.Context, r *vm, dir string) (dirs []string, err error) {
	for ; ; dir = path.Dir(dir) {
		if _, err := r.run(ctx, "stat", "--format=%F", dir); err == nil {
			return dirs, nil
		} else if exitStatus(err) <= 0 {
			return nil, err
		}
		dirs = append(dirs, dir)
	}
}

func (d *cacheDisk) attach(ctx context.Context, options string) error {
	if _, err := d.vm.run(ctx, "mount", "-t", "ext4", "-o", options, d.device, d.config.MountPoint); err != nil {
		return fmt.Errorf("mounting %s: %w", d.option(), err)
	}
	return nil
}

// checkOurs refuses a file system with files that are not a cache: pruning would
// go for a Docker store in it. The cache's directory is the mark, and is made
// before anything else is.
func (d *cacheDisk) checkOurs(ctx context.Context) error {
	out, err := d.vm.run(ctx, "find", d.config.MountPoint, "-mindepth", "1", "-maxdepth", "1", "-not", "-name", "lost+found", "-printf", `%f\0`)
	if err != nil {
		return fmt.Errorf("looking at what %s holds: %w", d.option(), err)
	}
	names := strings.FieldsFunc(string(out), func(r rune) bool { return r == 0 })
	if len(names) > 0 && !slices.Contains(names, manifest.Dir) {
		return fmt.Errorf(`%s holds an ext4 file system with files that are no image cache, such as %q; choose another disk, or erase this one with disk.format = "always"`, d.option(), names[0])
	}
	return nil
}

// release flushes, trims and unmounts the disk.
func (d *cacheDisk) release(ctx context.Context) error {
	if d.lifeline == nil {
		return nil
	}
	if _, err := d.vm.run(ctx, "sync", "--file-system", d.config.MountPoint); err != nil {
		return fmt.Errorf("flushing %s: %w", d.option(), err)
	}
	if _, err := d.vm.run(ctx, "fstrim", d.config.MountPoint); err != nil && ctx.Err() == nil {
		// A disk without discard only makes for a larger image of it.
		d.say("%s was not trimmed: %v", d.device, err)
	}
	d.endContainerd(ctx)
	return d.free(ctx)
}

// free ends what runs on the disk, unmounts it and proves that it is unmounted.
func (d *cacheDisk) free(ctx context.Context) error {
	if d.lifeline == nil {
		return nil
	}
	if err := d.lifeline.end(ctx); err != nil {
		return err
	}
	d.lifeline = nil
	mounts, err := mountTable(ctx, d.vm)
	if err != nil {
		return err
	}
	for _, m := range mounts {
		if m.point == d.config.MountPoint {
			return fmt.Errorf("%s could not be unmounted from %s; see systemctl status %s on the build VM", d.option(), m.point, lifelineUnit)
		}
	}
	return nil
}
