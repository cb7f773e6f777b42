package imagecache

import (
	"context"
	"fmt"
	"path"
	"strings"

	"github.com/selkies-project/packer-plugin-selkies/manifest"
)

// removeOrphans removes the layer directories that the store's own metadata does not
// name. Docker leaves one behind when it is stopped while it unpacks a layer, and
// never looks at it again. Layers that it has registered stay, also those of an image
// that never was complete: it takes them for present in the next pull. No daemon may
// run on the store.
func (d *cacheDisk) removeOrphans(ctx context.Context) error {
	root := path.Join(d.config.MountPoint, d.config.DockerRoot)
	store := path.Join(root, manifest.DriverOverlay2)
	metadata := path.Join(root, "image", manifest.DriverOverlay2, "layerdb")
	if _, err := d.vm.run(ctx, "stat", "--format=%F", metadata); exitStatus(err) > 0 {
		return nil // no store yet
	} else if err != nil {
		return err
	}
	// Metadata of layers that were about to be registered.
	if _, err := d.vm.run(ctx, "rm", "--recursive", "--force", path.Join(metadata, "tmp")); err != nil {
		return fmt.Errorf("removing half-unpacked layers: %w", err)
	}
	used, err := d.usedDirectories(ctx, metadata)
	if err != nil {
		return fmt.Errorf("reading Docker's layer metadata on %s: %w", d.option(), err)
	}
	out, err := d.vm.run(ctx, "find", store, "-mindepth", "1", "-maxdepth", "1", "-type", "d", "-not", "-name", "l", "-printf", `%f\0`)
	if err != nil {
		return fmt.Errorf("listing the layers on %s: %w", d.option(), err)
	}
	for dir := range strings.SplitSeq(strings.TrimSuffix(string(out), "\x00"), "\x00") {
		if used[dir] || dir == "" {
			continue
		}
		// A connection that breaks can pass for the end of a list. Only status 1 says
		// that nothing names the directory.
		_, err := d.vm.run(ctx, "grep", "--recursive", "--quiet", "--fixed-strings", "--include=*-id", "--regexp="+dir, metadata)
		if err == nil {
			return fmt.Errorf("reading Docker's layer metadata on %s: it was read in part; build again", d.option())
		}
		if exitStatus(err) != 1 {
			return fmt.Errorf("reading Docker's layer metadata on %s: %w", d.option(), err)
		}
		d.say("removing the half-unpacked layer %s of an earlier build", dir)
		if _, err := d.vm.run(ctx, "rm", "--recursive", "--one-file-system", path.Join(store, dir)); err != nil {
			return fmt.Errorf("removing half-unpacked layers: %w", err)
		}
	}
	// The driver's short names of what has gone.
	if _, err := d.vm.run(ctx, "find", path.Join(store, "l"), "-xtype", "l", "-delete"); err != nil {
		return fmt.Errorf("removing half-unpacked layers: %w", err)
	}
	return nil
}

// usedDirectories are the directories of layers (sha256/*/cache-id) and of containers
// (mounts/*/mount-id and init-id; their parent is one of the layers). The Engine API
// tells only those of complete images.
func (d *cacheDisk) usedDirectories(ctx context.Context, metadata string) (map[string]bool, error) {
	// The files have one line without an end. Serial paste makes it a line of its output.
	out, err := d.vm.run(ctx, "find", metadata, "-mindepth", "3", "-maxdepth", "3",
		"(", "-name", "cache-id", "-o", "-name", "mount-id", "-o", "-name", "init-id", ")", "-exec", "paste", "--serial", "{}", "+")
	if err != nil {
		return nil, err
	}
	used := map[string]bool{}
	for line := range strings.Lines(string(out)) {
		used[strings.TrimSuffix(line, "\n")] = true
	}
	return used, nil
}
