package imagecache

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"golang.org/x/sync/errgroup"

	"github.com/selkies-project/packer-plugin-selkies/gcp"
)

// parallelClusters is how many clusters are worked on at once.
const parallelClusters = 8

// touchesClusters tells whether the run speaks to the clusters themselves.
func (r *run) touchesClusters() bool { return !r.config.SkipRollout && r.config.OutputDir == "" }

// findClusters finds the clusters and connects to them.
func (r *run) findClusters(ctx context.Context) error {
	if r.config.SkipRollout && len(r.config.Zones) > 0 {
		return nil
	}
	all, err := r.listClusters(ctx)
	if err != nil {
		return err
	}
	for _, k := range all {
		r.clusters = append(r.clusters, &cluster{Cluster: k, run: r})
	}
	if err := r.settleZones(); err != nil || !r.touchesClusters() {
		return err
	}
	return r.setAside(r.each(ctx, func(ctx context.Context, k *cluster) error { return k.connect(ctx) }))
}

// look finds out what there is of this cache, and which zones get a disk. A cluster
// that does not answer gets none for its sake.
func (r *run) look(ctx context.Context) error {
	if err := r.findFamily(ctx); err != nil {
		return err
	}
	if len(r.clusters) == 0 {
		r.zones = r.config.Zones
		return nil
	}
	if r.touchesClusters() {
		if err := r.setAside(r.each(ctx, func(ctx context.Context, k *cluster) error { return k.survey(ctx) })); err != nil {
			return err
		}
		if err := r.checkNewest(); err != nil {
			return err
		}
	}
	zones := map[string]bool{}
	for _, k := range r.clusters {
		r.say("cluster %s: %s", k, cmp.Or(strings.Join(k.zones, ", "), "none of the zones"))
		for _, z := range k.zones {
			zones[z] = true
		}
	}
	r.zones = slices.Sorted(maps.Keys(zones))
	return nil
}

// checkNewest refuses to take an image for new that is not: its build was overtaken by
// another.
func (r *run) checkNewest() error {
	if r.goBack {
		return nil
	}
	for _, g := range r.family {
		if g.created.After(r.generation.created) && (g.rolledOut > 0 || r.hasDaemonSet(g)) {
			return fmt.Errorf("image %s is older than %s, which has been rolled out meanwhile; set image_name to go back to it", r.generation.name(), g.name())
		}
	}
	return nil
}

// hasDaemonSet tells whether the rollout of a generation has begun in a cluster.
func (r *run) hasDaemonSet(g *generation) bool {
	return slices.ContainsFunc(r.clusters, func(k *cluster) bool {
		for _, ds := range k.daemonSets {
			if ds.Labels[labelSource] == g.name() {
				return true
			}
		}
		return false
	})
}

func (r *run) listClusters(ctx context.Context) ([]*gcp.Cluster, error) {
	c := r.config
	if c.Kubeconfig != "" {
		k, err := gcp.Kubeconfig(c.Kubeconfig, c.KubeconfigContext)
		if err != nil {
			return nil, err
		}
		k.Zones = c.Zones
		return []*gcp.Cluster{k}, nil
	}
	all, err := c.Clusters(ctx, c.ProjectID, c.ClusterEndpoint)
	if err != nil {
		return nil, err
	}
	all = slices.DeleteFunc(all, func(k *gcp.Cluster) bool {
		r.bootImages = append(r.bootImages, k.BootImages...)
		excluded := slices.Contains(c.ExcludeRegions, k.Region())
		matches := c.clusterRE.MatchString(k.Name)
		if !matches && !excluded {
			r.others = append(r.others, &cluster{Cluster: k, run: r})
		}
		return !matches || excluded
	})
	if len(all) == 0 {
		return nil, fmt.Errorf("project %s has no running cluster with a name like %q outside of the excluded regions; check cluster_pattern and exclude_regions", c.ProjectID, c.ClusterPattern)
	}
	return all, nil
}

// settleZones gives each cluster the zones that it is to have disks in. One without
// any stays among the clusters: what it uses of former generations is not pruned.
func (r *run) settleZones() error {
	covered := map[string]bool{}
	for _, k := range r.clusters {
		for _, z := range k.Cluster.Zones {
			if len(r.config.Zones) == 0 || slices.Contains(r.config.Zones, z) {
				k.zones = append(k.zones, z)
				covered[z] = true
			}
		}
	}
	var without []string
	for _, z := range r.config.Zones {
		if !covered[z] {
			without = append(without, z)
		}
	}
	if len(without) > 0 {
		return fmt.Errorf("no cluster with a name like %q has nodes in %s; drop it from zones, or check cluster_pattern and exclude_regions", r.config.ClusterPattern, strings.Join(without, ", "))
	}
	for z := range covered {
		if name := r.diskName(z); len(name) > maxName {
			return fmt.Errorf("the disk's name %s has more than %d characters; choose a shorter cache_name", name, maxName)
		}
	}
	if len(covered) == 0 {
		return errors.New("the clusters have no node pool, and so no zone that a disk could be for")
	}
	return nil
}

// setAside goes on without clusters that have failed. It is an error if no other is
// left.
func (r *run) setAside(failed []failure) error {
	r.count(failed)
	for _, f := range failed {
		r.say("cluster %s is left out: %v", f.cluster, f.err)
		r.absent = append(r.absent, f.cluster)
	}
	r.clusters = slices.DeleteFunc(r.clusters, func(k *cluster) bool { return slices.Contains(r.absent, k) })
	if len(r.clusters) == 0 {
		return r.failed()
	}
	return nil
}

// failure is a cluster with which something went wrong.
type failure struct {
	cluster *cluster
	err     error
}

// each does something for all clusters at once, and returns those that failed.
func (r *run) each(ctx context.Context, f func(context.Context, *cluster) error) []failure {
	all := make([]failure, len(r.clusters))
	var group errgroup.Group
	group.SetLimit(parallelClusters)
	for i, k := range r.clusters {
		group.Go(func() error {
			ctx, done := k.whileLeading(ctx)
			defer done()
			err := f(ctx, k)
			if cause := context.Cause(ctx); errors.Is(cause, errLeaseLost) {
				err = cause
			}
			all[i] = failure{k, err}
			return nil
		})
	}
	_ = group.Wait() // they all return nil
	return slices.DeleteFunc(all, func(f failure) bool { return f.err == nil })
}

// count has failures fail the run in the end.
func (r *run) count(failures []failure) {
	for _, f := range failures {
		f.cluster.errs = append(f.cluster.errs, f.err)
	}
}

// failed is one error that names all that went wrong on the way.
func (r *run) failed() error {
	all := slices.Concat(r.absent, r.clusters)
	var errs []error
	for _, k := range all {
		if len(k.errs) > 0 {
			errs = append(errs, fmt.Errorf("cluster %s: %w", k, join(k.errs)))
		}
	}
	var failed []error
	if len(errs) > 0 {
		failed = append(failed, fmt.Errorf("%d of %d clusters failed: %w", len(errs), len(all), join(errs)))
	}
	if r.pruning != nil {
		failed = append(failed, fmt.Errorf("pruning failed, after image %s was rolled out: %w", r.generation.name(), r.pruning))
	}
	return join(failed)
}

// rollOut brings the generation to all clusters.
func (r *run) rollOut(ctx context.Context) error {
	switch {
	case r.config.SkipRollout:
		return nil
	case r.config.OutputDir != "":
		return r.writeManifests()
	}
	failed := r.each(ctx, func(ctx context.Context, k *cluster) error { return k.rollOut(ctx) })
	r.count(failed)
	if err := ctx.Err(); err != nil {
		return err
	}
	done, all := 0, 0
	for _, k := range r.clusters {
		all += len(k.zones)
		if !k.lost() { // else it is another run's by now
			done += k.done
		}
	}
	for _, f := range failed {
		r.say("cluster %s failed: %v; going on", f.cluster, f.err)
	}
	if done < all {
		r.say("image %s has come to %d of %d zones of the clusters", r.generation.name(), done, all)
	}
	if done == 0 {
		return r.failed()
	}
	return r.mark(ctx)
}
