package imagecache

import (
	"context"
	"fmt"
	"slices"

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
	stored, err := p.list(ctx)
	if err != nil {
		return err
	}
	for _, s := range stored {
		for _, n := range p.removable(s) {
			if keep[n] || n == s.ID && keepID[s.ID] {
				continue
			}
			if err := p.remove(ctx, n); err != nil {
				return err
			}
		}
	}
	return nil
}

func (p *pruner) list(ctx context.Context) ([]image.Summary, error) {
	stored, err := p.engine.ImageList(ctx, image.ListOptions{})
	if err != nil {
		return nil, fmt.Errorf("listing the images in Docker on the build VM: %w", err)
	}
	return stored, nil
}

// removable are the names of an image that may go, or its ID if it has none.
func (p *pruner) removable(s image.Summary) []string {
	names := storedNames(s)
	if len(names) == 0 && p.unnamed {
		return []string{s.ID}
	}
	return slices.DeleteFunc(names, func(n string) bool { return !p.mayRemove(n) })
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
