package imagecache

import (
	"context"
	"fmt"
	"path"
	"slices"
	"strings"

	cerrdefs "github.com/containerd/errdefs"
	dref "github.com/distribution/reference"
	"github.com/docker/docker/api/types/image"

	"github.com/selkies-project/packer-plugin-selkies/manifest"
)

// pruner takes images out of the daemon's store.
type pruner struct {
	engine *engine
	say    func(format string, a ...any)
	// mayRemove says whether an image's name may go. On the VM's own daemon only
	// names that an earlier layer manifest has may.
	mayRemove func(name string) bool
	// unnamed images, left behind when a tag moved on, go as well.
	unnamed bool
}

// recordedNames reports names that m has.
func recordedNames(m *manifest.Manifest) func(string) bool {
	names := map[string]bool{}
	if m != nil {
		for _, img := range m.Images {
			for _, n := range img.Names {
				names[n] = true
			}
		}
	}
	return func(n string) bool { return names[n] }
}

// prune removes every name that is not wanted; with its last name an image goes.
// An image that a container uses stays.
func (p *pruner) prune(ctx context.Context, images []*wanted) error {
	keep := map[string]bool{}
	keepID := map[string]bool{}
	for _, w := range images {
		keepID[w.id()] = true
		for _, n := range w.names() {
			keep[n] = true
		}
	}
	stored, err := p.engine.ImageList(ctx, image.ListOptions{})
	if err != nil {
		return fmt.Errorf("listing the images in the store: %w", err)
	}
	for _, s := range stored {
		names := storedNames(s)
		for _, n := range names {
			if keep[n] || !p.mayRemove(n) {
				continue
			}
			if err := p.remove(ctx, n); err != nil {
				return err
			}
		}
		if len(names) == 0 && p.unnamed && !keepID[s.ID] {
			if err := p.remove(ctx, s.ID); err != nil {
				return err
			}
		}
	}
	return nil
}

func (p *pruner) remove(ctx context.Context, name string) error {
	_, err := p.engine.ImageRemove(ctx, name, image.RemoveOptions{PruneChildren: true})
	switch {
	case cerrdefs.IsNotFound(err):
		// The last tag of a repository takes its digests along.
	case cerrdefs.IsConflict(err):
		p.say("kept %s, which is in use: %v", name, err)
	case err != nil:
		return fmt.Errorf("removing %s: %w", name, err)
	default:
		p.say("removed %s", name)
	}
	return nil
}

// storedNames are the normalised names of an image in the store, tags first.
func storedNames(s image.Summary) []string {
	var names []string
	for _, n := range slices.Concat(s.RepoTags, s.RepoDigests) {
		// Unnamed images are "<none>:<none>".
		if ref, err := dref.ParseNormalizedNamed(n); err == nil {
			names = append(names, ref.String())
		}
	}
	return names
}

// removeOrphans removes layer directories that no image in the store has. Docker
// leaves one behind when it is stopped while it unpacks a layer, and never looks at
// it again. Only for a daemon that nobody else uses.
func removeOrphans(ctx context.Context, e *engine, r *vm, say func(string, ...any)) error {
	if e.info.Containers > 0 {
		return nil // whose own directories no image has either
	}
	home := path.Join(e.info.DockerRootDir, manifest.DriverOverlay2)
	used := map[string]bool{"l": true}
	stored, err := e.ImageList(ctx, image.ListOptions{All: true})
	if err != nil {
		return fmt.Errorf("listing the images in the store: %w", err)
	}
	for _, s := range stored {
		inspect, err := e.ImageInspect(ctx, s.ID)
		if err != nil {
			return fmt.Errorf("inspecting image %s: %w", s.ID, err)
		}
		dirs, err := layerDirectories(inspect, home)
		if err != nil {
			return fmt.Errorf("inspecting image %s: %w", s.ID, err)
		}
		for _, d := range dirs {
			used[d] = true
		}
	}
	out, err := r.run(ctx, "find", home, "-mindepth", "1", "-maxdepth", "1", "-type", "d", "-printf", `%f\0`)
	if err != nil {
		return fmt.Errorf("listing the layers on the disk: %w", err)
	}
	for dir := range strings.SplitSeq(strings.TrimSuffix(string(out), "\x00"), "\x00") {
		if used[dir] || dir == "" {
			continue
		}
		say("removing the half-unpacked layer %s of an earlier build", dir)
		if _, err := r.run(ctx, "rm", "--recursive", "--one-file-system", path.Join(home, dir)); err != nil {
			return fmt.Errorf("removing a half-unpacked layer: %w", err)
		}
	}
	// The driver's short names of what has gone.
	if _, err := r.run(ctx, "find", path.Join(home, "l"), "-xtype", "l", "-delete"); err != nil {
		return fmt.Errorf("removing a half-unpacked layer: %w", err)
	}
	return nil
}
