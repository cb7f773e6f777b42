// Package hardware makes real what package gcp keeps records of: disks and images
// are sparse files, instances are machines of package machine in which their disks
// appear by the names that Compute Engine gives them.
//
// A machine's root is Debian's whatever it was booted from. Of its boot disk only
// Docker's store is real: the disk is an ext4 file system with that in
// var/lib/docker, as on any machine, but mounted beside the root. So an image made
// from it, and what boots from that, have the images that were pulled. Each machine's
// sshd listens on a loopback address of its own.
package hardware

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/selkies-project/packer-plugin-selkies/e2e/gcp"
	"github.com/selkies-project/packer-plugin-selkies/e2e/host"
	"github.com/selkies-project/packer-plugin-selkies/e2e/machine"
)

// Hardware is a gcp.Hardware.
type Hardware struct {
	// Dir has the files of the disks and images.
	Dir string
	// SSHPort is where sshd listens in every machine, 22 by default, which this host
	// must not use on all its addresses.
	SSHPort int
	// Files are written into every machine: path to contents.
	Files map[string]string

	mu        sync.Mutex
	instances map[string]*instance
}

// instance is a machine with its disks.
type instance struct {
	*machine.Machine
	adopted bool

	mu    sync.Mutex
	loops map[string]*host.Loop // by device name
}

var _ gcp.Hardware = (*Hardware)(nil)

// bootDisk is where the boot disk is mounted in a machine.
const bootDisk = "/mnt/boot-disk"

// shutdownTimeout is how long Compute Engine waits for a machine to shut down before
// it pulls the plug.
const shutdownTimeout = 90 * time.Second

// File is the file of a disk or an image.
func (h *Hardware) File(path string) string { return filepath.Join(h.Dir, path) }

// Machine is the machine of an instance, nil if there is none.
func (h *Hardware) Machine(name string) *machine.Machine {
	if i, err := h.instance(name); err == nil {
		return i.Machine
	}
	return nil
}

// Adopt makes a machine that is there already that of an instance, so that disks
// can be attached to it. It outlives the instance.
func (h *Hardware) Adopt(name string, m *machine.Machine) {
	h.add(name, &instance{Machine: m, adopted: true, loops: map[string]*host.Loop{}})
}

func (h *Hardware) add(name string, i *instance) {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.instances == nil {
		h.instances = map[string]*instance{}
	}
	h.instances[name] = i
}

func (h *Hardware) instance(name string) (*instance, error) {
	h.mu.Lock()
	defer h.mu.Unlock()
	i, ok := h.instances[name]
	if !ok {
		return nil, fmt.Errorf("no machine is %s: one that hardware did not start has to be adopted", name)
	}
	return i, nil
}

// Close ends all machines. The files stay.
func (h *Hardware) Close() error {
	h.mu.Lock()
	names := slices.Collect(maps.Keys(h.instances))
	h.mu.Unlock()
	var errs []error
	for _, name := range names {
		i, err := h.instance(name)
		if err == nil {
			err = h.remove(name, i)
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// remove ends a machine, unless it was adopted, and lets go of its disks.
func (h *Hardware) remove(name string, i *instance) error {
	h.mu.Lock()
	delete(h.instances, name)
	h.mu.Unlock()
	var errs []error
	if !i.adopted {
		errs = append(errs, i.Close())
	}
	for _, l := range i.loops {
		errs = append(errs, l.Close())
	}
	return errors.Join(errs...)
}

// CreateDisk makes a sparse file. An image without a file, such as a public one,
// has nothing that would count: see the package comment.
func (h *Hardware) CreateDisk(ctx context.Context, disk, image string, size int64) error {
	file := h.File(disk)
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		return err
	}
	// An operation that failed may have left the file: the records know best.
	if err := os.Remove(file); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if image != "" {
		err := copyFile(ctx, h.File(image), file)
		if err == nil {
			return os.Truncate(file, size)
		}
		if !errors.Is(err, os.ErrNotExist) {
			return err
		}
	}
	return host.NewDisk(file, size)
}

// DeleteDisk removes a disk's file.
func (h *Hardware) DeleteDisk(_ context.Context, disk string) error { return os.Remove(h.File(disk)) }

// CreateImage copies a disk's file once no instance has it attached.
func (h *Hardware) CreateImage(ctx context.Context, image, disk string) error {
	if err := waitDetached(ctx, h.File(disk)); err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(h.File(image)), 0o755); err != nil {
		return err
	}
	return copyFile(ctx, h.File(disk), h.File(image))
}

// DeleteImage removes an image's file.
func (h *Hardware) DeleteImage(_ context.Context, image string) error {
	return os.Remove(h.File(image))
}

// copyFile copies a file without its holes, without copying at all where the file
// system can share blocks.
func copyFile(ctx context.Context, from, to string) error {
	if _, err := os.Stat(from); err != nil {
		return err
	}
	_, err := host.Output(exec.CommandContext(ctx, "cp", "--reflink=auto", "--sparse=always", from, to))
	return err
}

// waitDetached waits for the kernel to let go of a file that a loop device showed:
// mounts of a machine that was ended disappear a little after it.
func waitDetached(ctx context.Context, file string) error {
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		used, err := loopOf(file)
		if err != nil || used == "" {
			return err
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("%s is still the contents of %s: %w", file, used, ctx.Err())
		}
	}
}

// loopOf is the loop device that shows a file, "" if none does.
func loopOf(file string) (string, error) {
	files, err := filepath.Glob("/sys/block/loop*/loop/backing_file")
	if err != nil {
		return "", err
	}
	for _, f := range files {
		// The device may disappear at any time.
		if backing, err := os.ReadFile(f); err == nil && strings.TrimSpace(string(backing)) == file {
			return filepath.Base(filepath.Dir(filepath.Dir(f))), nil
		}
	}
	return "", nil
}

// StartInstance boots a machine with Docker, as from a public image with Docker
// installed.
func (h *Hardware) StartInstance(ctx context.Context, name string, metadata map[string]string, disks []gcp.Attachment) (gcp.Address, error) {
	port := h.SSHPort
	if port == 0 {
		port = 22
	}
	address := fmt.Sprintf("127.%d.%d.%d", 1+rand.IntN(254), rand.IntN(256), 1+rand.IntN(254))
	files := map[string]string{
		"/etc/ssh/sshd_config.d/e2e.conf": fmt.Sprintf("Port %d\nListenAddress %s\n", port, address),
		"/etc/sudoers.d/google_sudoers":   "%google-sudoers ALL=(ALL:ALL) NOPASSWD:ALL\n",
	}
	maps.Copy(files, h.Files)
	m, err := machine.Boot(ctx, machine.Config{Name: filepath.Base(name), SSHPort: port, Files: files})
	if err != nil {
		return gcp.Address{}, err
	}
	i := &instance{Machine: m, loops: map[string]*host.Loop{}}
	h.add(name, i)
	if err := h.equip(ctx, name, i, metadata, disks); err != nil {
		return gcp.Address{}, errors.Join(err, h.remove(name, i))
	}
	return gcp.Address{External: address, Internal: address}, nil
}

// equip attaches the disks of a new machine, starts Docker on the boot disk and lets
// in who may.
func (h *Hardware) equip(ctx context.Context, name string, i *instance, metadata map[string]string, disks []gcp.Attachment) error {
	for _, d := range disks {
		if err := h.AttachDisk(ctx, name, d); err != nil {
			return err
		}
		if !d.Boot {
			continue
		}
		device := i.loops[d.DeviceName].Path
		if _, err := i.Run(ctx, "blkid", device); err != nil {
			if _, err := i.Run(ctx, "mkfs.ext4", "-q", device); err != nil {
				return err
			}
		}
		if _, err := i.Run(ctx, "mkdir", "-p", bootDisk); err != nil {
			return err
		}
		if _, err := i.Run(ctx, "mount", device, bootDisk); err != nil {
			return err
		}
	}
	if err := i.StartContainerd(ctx, machine.Containerd{Release: machine.Debian}); err != nil {
		return err
	}
	if err := i.StartDocker(ctx, machine.Docker{Release: machine.Debian, Config: map[string]any{"data-root": bootDisk + "/var/lib/docker"}}); err != nil {
		return err
	}
	if _, err := i.Run(ctx, "groupadd", "google-sudoers"); err != nil {
		return err
	}
	return h.SetMetadata(ctx, name, metadata)
}

// DeleteInstance shuts the machine down.
func (h *Hardware) DeleteInstance(ctx context.Context, name string) error {
	i, err := h.instance(name)
	if err != nil {
		return err
	}
	if !i.adopted {
		orderly, cancel := context.WithTimeout(ctx, shutdownTimeout)
		defer cancel()
		// As on Compute Engine, what does not end in time is cut off.
		_ = i.Poweroff(orderly)
	}
	return h.remove(name, i)
}

// SetMetadata does what Google's guest agent does with the metadata "ssh-keys",
// "USER:KEY" a line: it makes the users and lets them in, as root if they like.
func (h *Hardware) SetMetadata(ctx context.Context, name string, metadata map[string]string) error {
	i, err := h.instance(name)
	if err != nil {
		return err
	}
	for line := range strings.Lines(metadata["ssh-keys"]) {
		user, key, ok := strings.Cut(strings.TrimSpace(line), ":")
		if !ok {
			continue
		}
		script := `id "$1" 2>/dev/null || useradd --create-home --shell /bin/bash --groups google-sudoers "$1"
			dir=$(getent passwd "$1" | cut -d: -f6)/.ssh
			install -d -m 700 -o "$1" "$dir"
			printf '%s\n' "$2" >>"$dir/authorized_keys"
			chown "$1" "$dir/authorized_keys"`
		if _, err := i.Run(ctx, "sh", "-ec", script, "agent", user, key); err != nil {
			return fmt.Errorf("letting %s in: %w", user, err)
		}
	}
	return nil
}

// AttachDisk makes a disk a device of an instance.
func (h *Hardware) AttachDisk(_ context.Context, name string, a gcp.Attachment) error {
	i, err := h.instance(name)
	if err != nil {
		return err
	}
	loop, err := host.AttachLoop(h.File(a.Disk), a.ReadOnly)
	if err != nil {
		return err
	}
	if err := i.AttachDisk(loop.Path, a.DeviceName); err != nil {
		return errors.Join(err, loop.Close())
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	i.loops[a.DeviceName] = loop
	return nil
}

// DetachDisk takes a disk from an instance.
func (h *Hardware) DetachDisk(_ context.Context, name string, a gcp.Attachment) error {
	i, err := h.instance(name)
	if err != nil {
		return err
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	loop, ok := i.loops[a.DeviceName]
	if !ok {
		return fmt.Errorf("%s has no disk %s", name, a.DeviceName)
	}
	delete(i.loops, a.DeviceName)
	err = i.Machine.DetachDisk(loop.Path, a.DeviceName)
	if errors.Is(err, os.ErrNotExist) {
		err = nil // a machine that is off has no devices
	}
	return errors.Join(err, loop.Close())
}

// SerialOutput is what the machine has printed, at most the last 1 MiB, as Compute
// Engine keeps it.
func (h *Hardware) SerialOutput(name string) string {
	i, err := h.instance(name)
	if err != nil {
		return ""
	}
	data, err := os.ReadFile(filepath.Join(i.Dir, "console.log"))
	if err != nil {
		return err.Error()
	}
	return string(data[max(0, len(data)-1<<20):])
}
