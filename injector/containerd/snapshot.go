package containerd

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/selkies-project/packer-plugin-selkies/manifest"
)

// bottomName is an empty snapshot of ours below every base layer. With it a
// container of a one-layer image has two lower directories. With one alone,
// containerd 2.1 and newer ID-map for a user namespace a clone of that snapshot's
// own directory, where the layer's link leads nowhere, and not of the directory of
// all snapshots (getCommonDirectory in core/mount). No label keeps it: it goes with
// the last layer above it.
const bottomName = "selkies-image-cache-bottom"

// commitFunc puts a snapshot's content in place; dir is the snapshot's own
// directory, as this process reaches it.
type commitFunc func(dir string) error

// commit makes the committed snapshot name, with its directory's content put in
// place by fill first. It reports false if the snapshot is there already. Either
// way the context's lease holds it.
func (r *Runtime) commit(ctx context.Context, run, name, parent string, labels map[string]string, fill commitFunc) (bool, error) {
	for {
		added, err := r.prepareAndCommit(ctx, run, name, parent, labels, fill)
		if added || err != nil {
			return added, err
		}
		// containerd 2 adds what it finds to the lease in the same transaction, older
		// ones do not: it may be gone again.
		if err := r.hold(ctx, "snapshots/"+snapshotter, name); err != nil {
			return false, err
		}
		if _, err := r.snapshots.Stat(ctx, name); err == nil {
			return false, nil
		} else if !errdefs.IsNotFound(err) {
			return false, fmt.Errorf("looking up snapshot %s: %w", name, r.explain(err))
		}
	}
}

func (r *Runtime) prepareAndCommit(ctx context.Context, run, name, parent string, labels map[string]string, fill commitFunc) (bool, error) {
	key := run + "/" + name
	// With this label Prepare looks for name as well.
	ref := snapshots.WithLabels(map[string]string{snapshots.LabelSnapshotRef: name})
	mounts, err := r.snapshots.Prepare(ctx, key, parent, ref)
	if isForgotten(err) {
		r.opt.Log.Warn("containerd found a snapshot's directory that it has no record of, and removed it", "error", err)
		mounts, err = r.snapshots.Prepare(ctx, key, parent, ref)
	}
	if errdefs.IsAlreadyExists(err) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("preparing snapshot %s: %w", name, r.explain(err))
	}
	dir, err := r.snapshotDir(mounts)
	if err != nil {
		return false, fmt.Errorf("preparing snapshot %s: %w", name, err)
	}
	if err := fill(r.layerDir(dir)); err != nil {
		return false, fmt.Errorf("preparing snapshot %s: %w", name, r.explain(err))
	}
	// The labels not before now: one of them may be that of a root of garbage
	// collection, which would keep what a killed run has prepared.
	own := snapshots.WithLabels(map[string]string{labelDir: dir})
	err = r.snapshots.Commit(ctx, name, key, ref, snapshots.WithLabels(labels), own)
	if errdefs.IsAlreadyExists(err) {
		// A pull was faster. Its snapshot is as good as ours.
		if err := r.snapshots.Remove(ctx, key); err != nil {
			return false, fmt.Errorf("removing snapshot %s: %w", key, r.explain(err))
		}
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("committing snapshot %s: %w", name, r.explain(err))
	}
	return true, nil
}

// isForgotten is true of the error for the directory that a snapshotter left which was
// killed, or lost its power, between making the directory and the record: it gives the
// next snapshot the same number, finds the directory in its way, fails, and only then
// removes it (createSnapshot in plugins/snapshots/overlay, and in 1.6).
func isForgotten(err error) bool {
	return err != nil && strings.Contains(err.Error(), "failed to rename") && strings.Contains(err.Error(), syscall.EEXIST.Error())
}

// snapshotDir finds a new snapshot's directory in its mounts: an overlay's
// upperdir or, for one without a parent, a bind mount's source, each its fs.
func (r *Runtime) snapshotDir(mounts []mount.Mount) (string, error) {
	parent := filepath.Join(r.root, "snapshots")
	for _, m := range mounts {
		paths := []string{m.Source}
		for _, o := range m.Options {
			if upper, ok := strings.CutPrefix(o, "upperdir="); ok {
				paths = append(paths, upper)
			}
		}
		for _, p := range paths {
			if dir := filepath.Dir(p); filepath.Base(p) == "fs" && filepath.Dir(dir) == parent {
				return filepath.Base(dir), nil
			}
		}
	}
	return "", fmt.Errorf("no directory below %s in its mounts %v: is another snapshotter configured as %s?", parent, mounts, snapshotter)
}

// layerDir is the directory of the snapshot with that labelDir, as this process
// reaches it.
func (r *Runtime) layerDir(dir string) string {
	return filepath.Join(r.host(r.root), "snapshots", dir)
}

// layerLink is what the fs of l's snapshot links to. Relative, inside the
// snapshots directory: containerd ID-maps one recursive clone of that directory
// for pods with user namespaces, and what an absolute link leads to would not be
// in it.
func layerLink(anchorDir string, m *manifest.Manifest, l manifest.Layer) string {
	return filepath.Join("..", anchorDir, "fs", m.LayerPath(l))
}

// placeLink replaces the empty fs directory of a snapshot that is being prepared.
func placeLink(target string) commitFunc {
	return func(dir string) error {
		fs := filepath.Join(dir, "fs")
		if err := os.Remove(fs); err != nil {
			return err
		}
		if err := os.Symlink(target, fs); err != nil {
			return err
		}
		// A power loss must not leave a committed chain whose fs is an empty directory.
		return syncDir(dir)
	}
}

// moveLink leads a committed snapshot's link elsewhere, in one step. Containers
// that run keep what they have: overlayfs resolved the old link when it mounted.
func (r *Runtime) moveLink(ctx context.Context, info snapshots.Info, target string, cache digest.Digest) error {
	if err := replaceLink(target, filepath.Join(r.layerDir(info.Labels[labelDir]), "fs")); err != nil {
		return fmt.Errorf("linking snapshot %s: %w", info.Name, r.explain(err))
	}
	if info.Labels[labelCache] == cache.String() {
		return nil
	}
	info.Labels = map[string]string{labelCache: cache.String()}
	if _, err := r.snapshots.Update(ctx, info, "labels."+labelCache); err != nil {
		return fmt.Errorf("labelling snapshot %s: %w", info.Name, r.explain(err))
	}
	return nil
}

// link is where the snapshot's fs leads; empty if it is no link.
func (r *Runtime) link(info snapshots.Info) string {
	target, err := os.Readlink(filepath.Join(r.layerDir(info.Labels[labelDir]), "fs"))
	if err != nil {
		return ""
	}
	return target
}

// isLayer says whether the snapshot is a layer that inject registered.
func isLayer(info snapshots.Info) bool {
	return info.Kind == snapshots.KindCommitted && info.Labels[labelCache] != "" &&
		info.Labels[labelDir] != "" && info.Labels[labelAnchor] == ""
}

// replaceLink makes name a link to target in one step.
func replaceLink(target, name string) error {
	next := name + ".next"
	if err := os.Remove(next); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if err := os.Symlink(target, next); err != nil {
		return err
	}
	if err := os.Rename(next, name); err != nil {
		return err
	}
	return syncDir(filepath.Dir(name))
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}
