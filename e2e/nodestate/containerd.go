// Package nodestate reads all that a container runtime has, in a form in which two moments
// can be compared: numbers that differ from run to run are left out.
package nodestate

import (
	"context"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/snapshots"

	"github.com/selkies-project/packer-plugin-selkies/e2e/machine"
)

// ContainerdDir is containerd's root, SnapshotsDir where its overlayfs snapshotter has
// a directory for each snapshot.
const (
	ContainerdDir = "/var/lib/containerd"
	SnapshotsDir  = ContainerdDir + "/io.containerd.snapshotter.v1.overlayfs/snapshots"
)

var anchorDir = regexp.MustCompile(`^\.\./[0-9]+/`)

// Containerd is all that containerd has in the namespace of c, and its directories in
// m, one line each. Times are left out too unless strict.
func Containerd(ctx context.Context, m *machine.Machine, c *client.Client, strict bool) ([]string, error) {
	r := &reader{m: m, c: c, strict: strict}
	for _, read := range []func(context.Context) error{r.images, r.content, r.leases, r.snapshots, r.blobFiles, r.mounts} {
		if err := read(ctx); err != nil {
			return nil, fmt.Errorf("reading the state of containerd: %w", err)
		}
	}
	slices.Sort(r.lines)
	return r.lines, nil
}

type reader struct {
	m      *machine.Machine
	c      *client.Client
	strict bool
	lines  []string
}

func (r *reader) add(format string, a ...any) { r.lines = append(r.lines, fmt.Sprintf(format, a...)) }

func (r *reader) when(at time.Time) string {
	if r.strict {
		return at.String()
	}
	return ""
}

func (r *reader) images(ctx context.Context) error {
	images, err := r.c.ImageService().List(ctx)
	for _, i := range images {
		r.add("image %s %s %s %s", i.Name, i.Target.Digest, labels(i.Labels), r.when(i.UpdatedAt))
	}
	return err
}

func (r *reader) content(ctx context.Context) error {
	err := r.c.ContentStore().Walk(ctx, func(i content.Info) error {
		r.add("content %s %d %s %s", i.Digest, i.Size, labels(i.Labels), r.when(i.UpdatedAt))
		return nil
	})
	if err != nil {
		return err
	}
	ingests, err := r.c.ContentStore().ListStatuses(ctx)
	for _, i := range ingests {
		r.add("ingest %s", i.Ref)
	}
	return err
}

func (r *reader) leases(ctx context.Context) error {
	list, err := r.c.LeasesService().List(ctx)
	if err != nil {
		return err
	}
	for _, l := range list {
		r.add("lease %s %s", l.ID, labels(l.Labels))
		resources, err := r.c.LeasesService().ListResources(ctx, leases.Lease{ID: l.ID})
		if err != nil {
			return err
		}
		for _, res := range resources {
			r.add("lease %s has %s %s", l.ID, res.Type, res.ID)
		}
	}
	return nil
}

func (r *reader) snapshots(ctx context.Context) error {
	known := 0
	err := r.c.SnapshotService("overlayfs").Walk(ctx, func(_ context.Context, i snapshots.Info) error {
		known++
		link := ""
		if dir := i.Labels["selkies.io/image-cache.dir"]; dir != "" {
			target, _ := os.Readlink(r.m.Path(filepath.Join(SnapshotsDir, dir, "fs")))
			link = anchorDir.ReplaceAllString(target, "../ANCHOR/")
			i.Labels = maps.Clone(i.Labels)
			i.Labels["selkies.io/image-cache.dir"] = "DIR"
		}
		r.add("snapshot %s %s parent=%s %s link=%s %s", i.Name, i.Kind, i.Parent, labels(i.Labels), link, r.when(i.Updated))
		return nil
	})
	if err != nil {
		return err
	}
	dirs, err := os.ReadDir(r.m.Path(SnapshotsDir))
	r.add("%d snapshot directories more than snapshots", len(dirs)-known)
	return err
}

func (r *reader) blobFiles(context.Context) error {
	blobs, err := filepath.Glob(r.m.Path(ContainerdDir + "/io.containerd.content.v1.content/blobs/sha256/*"))
	for _, b := range blobs {
		r.add("blob file %s", filepath.Base(b))
	}
	return err
}

func (r *reader) mounts(context.Context) error {
	mounts, err := os.ReadFile(r.m.Path("/proc/1/mountinfo"))
	count := 0
	for line := range strings.Lines(string(mounts)) {
		if f := strings.Fields(line); strings.HasPrefix(f[4], SnapshotsDir) {
			count++
		}
	}
	r.add("%d mounts below snapshots", count)
	return err
}

func labels(m map[string]string) string {
	var s []string
	for k, v := range m {
		s = append(s, k+"="+v)
	}
	slices.Sort(s)
	return strings.Join(s, ",")
}

// Collect has containerd collect its garbage, such as the directories of containers
// that were removed.
func Collect(ctx context.Context, c *client.Client) error {
	l, err := c.LeasesService().Create(ctx, leases.WithRandomID())
	if err == nil {
		err = c.LeasesService().Delete(ctx, l, leases.SynchronousDelete)
	}
	if err != nil {
		return fmt.Errorf("collecting containerd's garbage: %w", err)
	}
	return nil
}

// settleTime bounds the wait for containerd's CRI, which follows events.
const settleTime = 30 * time.Second

// SettledContainerd waits until the CRI, which follows containerd's events, has stopped
// changing records, and gives the state then, without garbage.
func SettledContainerd(ctx context.Context, m *machine.Machine, c *client.Client, strict bool) ([]string, error) {
	if err := Collect(ctx, c); err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, settleTime)
	defer cancel()
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	var last []string
	for same := 0; ; {
		now, err := Containerd(ctx, m, c, strict)
		if err != nil {
			return nil, err
		}
		if slices.Equal(now, last) {
			same++
		} else {
			same = 0
		}
		if last = now; same == 3 {
			return last, nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil, fmt.Errorf("waiting for a state of containerd that stays: %w", ctx.Err())
		}
	}
}
