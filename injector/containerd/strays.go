package containerd

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"

	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/opencontainers/go-digest"

	"github.com/selkies-project/packer-plugin-selkies/injector/cachedisk"
)

// anchorMount is a mount on a snapshot's fs, below the snapshotter's root. Only
// anchors have one: the snapshotter itself mounts nothing there.
var anchorMount = regexp.MustCompile(`^snapshots/([0-9]+)/fs$`)

// strays are the mounts of anchors that containerd does not know any more, because its
// state was removed under the mount. Known are the anchors of our namespace.
func (r *Runtime) strays(ctx context.Context, known map[digest.Digest]*anchor) ([]string, error) {
	mounts, err := cachedisk.MountsOnHost(r.opt.HostRoot, r.root)
	if err != nil {
		return nil, err
	}
	strays := map[string]string{}
	for _, m := range mounts {
		rel, err := filepath.Rel(r.root, m)
		if err != nil {
			return nil, err
		}
		if dir := anchorMount.FindStringSubmatch(rel); dir != nil {
			strays[dir[1]] = m
		}
	}
	for _, a := range known {
		delete(strays, a.dir)
	}
	if len(strays) == 0 {
		return nil, nil
	}
	// All namespaces share the snapshotter's directory.
	list, err := r.client.NamespaceService().List(ctx)
	if err != nil {
		return nil, fmt.Errorf("listing namespaces: %w", r.explain(err))
	}
	for _, ns := range list {
		err := r.snapshots.Walk(namespaces.WithNamespace(ctx, ns), func(_ context.Context, info snapshots.Info) error {
			if a := r.anchorOf(info); a != nil {
				delete(strays, a.dir)
			}
			return nil
		})
		if err != nil {
			return nil, fmt.Errorf("listing snapshots of namespace %s: %w", ns, r.explain(err))
		}
	}
	return slices.Sorted(maps.Values(strays)), nil
}

// clearStrays unmounts the strays. containerd numbers its snapshots from 1 again, and
// the first one that is to have the number of such a directory fails, in every pull.
func (r *Runtime) clearStrays(strays []string) error {
	for _, m := range strays {
		r.opt.Log.Warn("unmounting a cache disk that containerd has forgotten", "dir", m)
		if err := cachedisk.UnmountOnHost(r.opt.HostRoot, m); err != nil {
			return err
		}
		// Until containerd cleans up, the directory itself stands in the way. Only
		// what is empty goes.
		for _, dir := range []string{m, filepath.Join(filepath.Dir(m), "work"), filepath.Dir(m)} {
			if err := os.Remove(r.host(dir)); err != nil && !errors.Is(err, os.ErrNotExist) {
				return fmt.Errorf("removing a snapshot's directory that containerd has forgotten: %w", err)
			}
		}
	}
	return nil
}
