package imagecache

import (
	"cmp"
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"cloud.google.com/go/compute/apiv1/computepb"
	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"

	"github.com/selkies-project/packer-plugin-selkies/gcp"
)

// makeRoom prunes what failed builds have left, before new disks need the quota. The
// generation that is about to be rolled out comes on top of those to keep. What goes
// wrong here fails nothing: prune does it all again.
func (r *run) makeRoom(ctx context.Context) error {
	if r.config.DryRun { // prune tells of it
		return nil
	}
	tell := func(err error) {
		if err != nil && ctx.Err() == nil {
			r.say("making room: %v; going on", err)
		}
	}
	tell(r.deleteBuilderDisks(ctx))
	if !r.prunes() {
		return nil
	}
	_, failed, err := r.pruneGenerations(ctx, r.config.Keep+1)
	for _, f := range failed {
		tell(fmt.Errorf("cluster %s: %w", f.cluster, f.err))
	}
	tell(err)
	return nil
}

// prune deletes what no node uses and no rollback needs: in the clusters first, then
// disks that no volume names, then images without a disk. What goes wrong fails the run
// in the end: what is left costs money.
func (r *run) prune(ctx context.Context) error {
	errs := []error{r.deleteBuilderDisks(ctx)}
	if r.prunes() {
		sources, failed, err := r.pruneGenerations(ctx, r.config.Keep)
		for _, f := range failed {
			r.say("cluster %s: pruning: %v", f.cluster, f.err)
		}
		r.count(failed)
		errs = append(errs, err)
		if sources != nil {
			errs = append(errs, r.pruneImages(ctx, kept(r.family, r.generation, r.config.Keep), sources))
		}
	}
	r.pruning = join(slices.DeleteFunc(errs, func(err error) bool { return err == nil }))
	return ctx.Err()
}

// prunes tells whether the run knows what is in use, and which generations there are.
func (r *run) prunes() bool {
	return r.touchesClusters() && r.generation.image.GetFamily() != ""
}

// pruneGenerations prunes clusters and disks, and returns the IDs of the images that
// the disks were made from that are left, nil if they are not known.
func (r *run) pruneGenerations(ctx context.Context, n int) (sources map[string]bool, failed []failure, err error) {
	keep := kept(r.family, r.generation, n)
	failed = r.each(ctx, func(ctx context.Context, k *cluster) error { return k.prune(ctx, keep) })
	if err := ctx.Err(); err != nil {
		return nil, failed, err
	}
	r.askOthers(ctx)
	sources, err = r.pruneDisks(ctx, keep)
	return sources, failed, err
}

// superseded tells whether something of a generation is to be pruned if nothing uses
// it. What is newer than the current generation is not: another build may be at it,
// or this is a rollback.
func (r *run) superseded(image string, created time.Time, keep map[string]bool) bool {
	return !keep[image] && created.Before(r.generation.created)
}

// prune deletes the volumes and claims of generations that no node uses.
func (k *cluster) prune(ctx context.Context, keep map[string]bool) error {
	if !k.run.config.DryRun { // in which what would be deleted is still there
		if err := k.survey(ctx); err != nil {
			return err
		}
	}
	claims, volumes := k.typed.CoreV1().PersistentVolumeClaims(namespace), k.typed.CoreV1().PersistentVolumes()
	for _, name := range slices.Sorted(maps.Keys(k.claims)) {
		c := k.claims[name]
		if !k.run.superseded(c.Labels[labelSource], c.CreationTimestamp.Time, keep) || k.used(name) {
			continue
		}
		if err := k.delete(ctx, "claim", name, claims.Delete); err != nil {
			return err
		}
		delete(k.claims, name)
	}
	for _, name := range slices.Sorted(maps.Keys(k.volumes)) {
		v := k.volumes[name]
		if !k.ours(v) || !k.run.superseded(v.Labels[labelSource], v.CreationTimestamp.Time, keep) || k.used(name) || k.claims[name] != nil {
			continue
		}
		if err := k.delete(ctx, "volume", name, volumes.Delete); err != nil {
			return err
		}
		delete(k.volumes, name)
	}
	return nil
}

func (k *cluster) ours(v *corev1.PersistentVolume) bool {
	return v.Labels[labelManagedBy] == fieldManager && v.Labels[labelInstance] == k.run.config.CacheName
}

// used tells whether a node has a disk or may get it.
func (k *cluster) used(disk string) bool {
	return k.daemonSets[disk] != nil || len(k.holders[disk]) > 0 || k.attached[disk]
}

// names tells whether a volume of the cluster is for a disk.
func (k *cluster) names(zone, disk string) bool {
	for _, v := range k.volumes {
		if v.Spec.CSI != nil && strings.HasSuffix(v.Spec.CSI.VolumeHandle, diskPath(zone, disk)) {
			return true
		}
	}
	return false
}

// noteDisks notes for which disks there are volumes.
func (k *cluster) noteDisks() {
	if k.named == nil {
		k.named = map[string]bool{}
	}
	for _, v := range k.volumes {
		if v.Spec.CSI == nil {
			continue
		}
		if _, path, ok := strings.Cut(v.Spec.CSI.VolumeHandle, "/zones/"); ok {
			k.named["/zones/"+path] = true
		}
	}
}

// diskPath is the end of a disk's address.
func diskPath(zone, disk string) string { return fmt.Sprintf("/zones/%s/disks/%s", zone, disk) }

// askOthers asks clusters that are not rolled out to, and may have been, for which disks
// they have volumes. One that has not answered is not asked again.
func (r *run) askOthers(ctx context.Context) {
	var group errgroup.Group
	group.SetLimit(parallelClusters)
	for _, k := range r.others {
		if len(k.errs) > 0 {
			continue
		}
		group.Go(func() error {
			if err := k.surveyVolumes(ctx); err != nil && ctx.Err() == nil {
				k.errs = append(k.errs, err)
				r.say("no disk of region %s is pruned, since cluster %s, which cluster_pattern does not match, does not say which ones it needs: %v", k.Region(), k, err)
			}
			return nil
		})
	}
	_ = group.Wait() // they all return nil
}

// pruneDisks deletes disks of the cache that nothing uses and returns the IDs of the
// images that the project's other disks were made from, nil if they are not known.
func (r *run) pruneDisks(ctx context.Context, keep map[string]bool) (sources map[string]bool, err error) {
	disks, err := r.listDisks(ctx, "", func(*computepb.Disk) bool { return true })
	if err != nil {
		return nil, fmt.Errorf("listing disks: %w", gcp.Explain(err))
	}
	sources = map[string]bool{}
	var errs []error
	for _, d := range disks {
		prunable, err := r.prunable(d, keep)
		if err != nil {
			return nil, err
		}
		if !prunable {
			sources[d.GetSourceImageId()] = true
			continue
		}
		err = r.deleteDisk(ctx, lastElement(d.GetZone()), d.GetName())
		switch {
		case gcp.IsInUse(err): // since a moment ago
			r.say("disk %s is in use and stays", d.GetName())
			sources[d.GetSourceImageId()] = true
		case err != nil:
			errs = append(errs, fmt.Errorf("deleting disk %s: %w", d.GetName(), gcp.Explain(err)))
			sources[d.GetSourceImageId()] = true
		}
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
	}
	return sources, join(errs)
}

// prunable tells whether a disk is one of the cache that nothing uses.
func (r *run) prunable(d *computepb.Disk, keep map[string]bool) (bool, error) {
	if d.GetLabels()[labelName] != r.config.CacheName || d.GetZone() == "" || len(d.GetUsers()) > 0 {
		return false, nil
	}
	created, err := time.Parse(time.RFC3339, d.GetCreationTimestamp())
	if err != nil {
		return false, fmt.Errorf("disk %s: %w", d.GetName(), err)
	}
	zone := lastElement(d.GetZone())
	return r.superseded(d.GetLabels()[labelImage], created, keep) && r.known(zone, d.GetName()) && !r.named(zone, d.GetName()), nil
}

// known tells whether all clusters that could use a zone's disk have said what they
// use. A kubeconfig tells nothing of other clusters: there it is a disk only that its
// cluster has used.
func (r *run) known(zone, disk string) bool {
	if slices.Contains(r.config.ExcludeRegions, gcp.Region(zone)) {
		return false
	}
	if r.config.Kubeconfig != "" && (!slices.Contains(r.config.Zones, zone) || !slices.ContainsFunc(r.clusters, func(k *cluster) bool { return k.named[diskPath(zone, disk)] })) {
		return false
	}
	return !slices.ContainsFunc(slices.Concat(r.absent, r.clusters, r.others), func(k *cluster) bool {
		return (!k.surveyed || k.lost()) && k.mayUse(zone)
	})
}

// named tells whether a cluster has a volume for a disk.
func (r *run) named(zone, disk string) bool {
	return slices.ContainsFunc(slices.Concat(r.clusters, r.others), func(k *cluster) bool { return k.names(zone, disk) })
}

// builderDiskRest is for how long nothing may have used a disk of the builder for it to
// be what a killed build left. A build that goes on has its VM use its disks. Without a
// VM they are only before it is there and after it has gone: moments in which the disk
// is being made, or an image of it, which takes no longer than the builder's
// state_timeout.
const builderDiskRest = time.Hour

// deleteBuilderDisks deletes the disks that killed builds have left. Disks of a cache
// are never among them, whatever their names are.
func (r *run) deleteBuilderDisks(ctx context.Context) error {
	prefix := r.config.BuilderDiskPrefix
	if prefix == "" {
		return nil
	}
	disks, err := r.listDisks(ctx, fmt.Sprintf(`name eq "%s.*"`, prefix), func(d *computepb.Disk) bool {
		return strings.HasPrefix(d.GetName(), prefix) && d.GetZone() != "" && d.GetLabels()[labelName] == "" && d.GetStatus() == "READY"
	})
	if err != nil {
		return fmt.Errorf("listing the builder's disks: %w", gcp.Explain(err))
	}
	for _, d := range disks {
		r.tellOfBuilder(d)
	}
	disks = slices.DeleteFunc(disks, func(d *computepb.Disk) bool { return len(d.GetUsers()) > 0 })
	if len(disks) == 0 {
		return nil
	}
	sources, err := r.listSources(ctx)
	if err != nil {
		return fmt.Errorf("listing images in the making: %w", gcp.Explain(err))
	}
	var errs []error
	for _, d := range disks {
		used, err := lastUse(d)
		if err != nil {
			return fmt.Errorf("disk %s: %w", d.GetName(), err)
		}
		// Both times are Compute Engine's.
		if r.generation.created.Sub(used) < builderDiskRest || sources[fmt.Sprint(d.GetId())] {
			continue
		}
		// One that an instance has taken since is refused.
		if err := r.deleteDisk(ctx, lastElement(d.GetZone()), d.GetName()); err != nil {
			errs = append(errs, fmt.Errorf("deleting disk %s: %w", d.GetName(), gcp.Explain(err)))
		}
	}
	return join(errs)
}

// tellOfBuilder tells, once, of each VM that has a disk of the builder. The build of this
// run has none any more, and whether another one goes on nobody but its Packer knows.
func (r *run) tellOfBuilder(d *computepb.Disk) {
	for _, user := range d.GetUsers() {
		vm := lastElement(user)
		if slices.Contains(r.builders, vm) {
			continue
		}
		r.builders = append(r.builders, vm)
		r.say("VM %s has had disk %s of the builder since %s: another build goes on, or was killed. If none goes on, delete it: gcloud compute instances delete %s --project=%s --zone=%s --delete-disks=all",
			vm, d.GetName(), cmp.Or(d.GetLastAttachTimestamp(), d.GetCreationTimestamp()), vm, r.config.ProjectID, lastElement(d.GetZone()))
	}
}

// lastUse is when a disk was last made, attached or detached.
func lastUse(d *computepb.Disk) (last time.Time, err error) {
	for _, stamp := range []string{d.GetCreationTimestamp(), d.GetLastAttachTimestamp(), d.GetLastDetachTimestamp()} {
		if stamp == "" {
			continue
		}
		t, err := time.Parse(time.RFC3339, stamp)
		if err != nil {
			return last, err
		}
		if t.After(last) {
			last = t
		}
	}
	return last, nil
}

// listDisks lists the disks in all zones and regions that pass a filter, which Compute
// Engine may take for a pattern, and match.
func (r *run) listDisks(ctx context.Context, filter string, match func(*computepb.Disk) bool) (disks []*computepb.Disk, err error) {
	request := &computepb.AggregatedListDisksRequest{Project: r.config.ProjectID, Filter: &filter}
	err = gcp.Retry(ctx, func() error {
		disks = nil
		for pair, err := range r.disks.AggregatedList(ctx, request).All() {
			if err != nil {
				return err
			}
			for _, d := range pair.Value.GetDisks() {
				if match(d) {
					disks = append(disks, d)
				}
			}
		}
		return nil
	})
	return disks, err
}
