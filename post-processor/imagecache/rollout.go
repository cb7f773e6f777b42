package imagecache

import (
	"context"
	"fmt"
	"maps"
	"slices"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/equality"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	appsv1ac "k8s.io/client-go/applyconfigurations/apps/v1"
)

// rollOut brings the generation to a cluster: what all zones share, then zone by
// zone. A zone that goes wrong keeps the generation that it has. The gate comes first:
// every node has one, so that it shows whether the injector's image runs there.
func (k *cluster) rollOut(ctx context.Context) error {
	if len(k.zones) == 0 {
		return nil
	}
	access, err := kustomization(accessDir)
	if err != nil {
		return err
	}
	for _, o := range access {
		if err := k.apply(ctx, o); err != nil {
			return err
		}
	}
	gate, err := k.run.config.gate()
	if err != nil {
		return err
	}
	if err := k.start(ctx, gate); err != nil {
		return err
	}
	var errs []error
	for _, zone := range k.zones {
		if err := k.rollOutZone(ctx, k.run.zoneDisk(zone)); err != nil {
			errs = append(errs, fmt.Errorf("zone %s: %w", zone, err))
		} else {
			k.done++
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
	}
	if err := k.leaveZones(ctx); err != nil {
		errs = append(errs, err)
	}
	return join(errs)
}

// leaveZones deletes DaemonSets of zones in which the cluster has no node and gets none:
// its node pools have left them.
func (k *cluster) leaveZones(ctx context.Context) error {
	if k.Location == "" { // a kubeconfig does not say where node pools are
		return nil
	}
	if err := k.labelNodes(ctx, nil); err != nil {
		return err
	}
	for _, name := range slices.Sorted(maps.Keys(k.daemonSets)) {
		ds := k.daemonSets[name]
		if zone := ds.Labels[labelZone]; zone == "" || k.MayHave(zone) || len(k.holders[name]) > 0 {
			continue
		}
		if err := k.retire(ctx, ds); err != nil {
			return err
		}
	}
	return nil
}

// applyNamespace makes the namespace that all objects of a cluster are in.
func (k *cluster) applyNamespace(ctx context.Context) error {
	access, err := kustomization(accessDir)
	if err != nil {
		return err
	}
	for _, o := range access {
		if o.GetKind() == "Namespace" {
			return k.apply(ctx, o)
		}
	}
	return fmt.Errorf("%s has no namespace", accessDir)
}

// rollOutZone brings the generation to a zone. The new DaemonSet is there, and its pods
// start, before the former one is locked, so that at every moment some generation takes
// new nodes; the agents keep to themselves until then, see zoneDisk.alone.
func (k *cluster) rollOutZone(ctx context.Context, d *zoneDisk) error {
	if err := k.freeVolume(ctx, d.name); err != nil {
		return err
	}
	objects, err := d.volume()
	if err != nil {
		return err
	}
	for _, o := range objects {
		if err := k.apply(ctx, o); err != nil {
			return err
		}
	}
	if err := k.waitBound(ctx, d.name); err != nil {
		return err
	}
	ds, err := d.daemonSet()
	if err != nil {
		return err
	}
	var formers []*appsv1.DaemonSet
	for _, name := range slices.Sorted(maps.Keys(k.daemonSets)) {
		if former := k.daemonSets[name]; former.Labels[labelZone] == d.zone && name != d.name {
			formers = append(formers, former)
		}
	}
	// Before the new DaemonSet is there, so that it gets no pods for nodes that have a
	// disk. One that no node took stays when its node gets the label later (Kubernetes
	// 1.37: the controller looks at pods that are on the node only).
	if err := k.labelNodes(ctx, formers); err != nil {
		return err
	}
	if err := k.start(ctx, ds); err != nil {
		return err
	}
	if err := k.labelNodes(ctx, formers); err != nil {
		return err
	}
	for _, former := range formers {
		if err := k.retire(ctx, former); err != nil {
			return err
		}
	}
	return nil
}

// labelNodes notes on the nodes of former generations which disks they have.
func (k *cluster) labelNodes(ctx context.Context, formers []*appsv1.DaemonSet) error {
	if !k.run.config.DryRun { // in which nothing has changed
		var now nodes
		if err := k.lookAtNodes(ctx, &now); err != nil {
			return err
		}
		k.nodes = now
	}
	for _, former := range formers {
		for _, node := range slices.Sorted(maps.Keys(k.holders[former.Name])) {
			if err := k.labelNode(ctx, node, former.Name); err != nil {
				return err
			}
		}
	}
	return nil
}

// freeVolume has a volume take a claim anew whose earlier claim was deleted, as an
// interrupted pruning leaves it.
func (k *cluster) freeVolume(ctx context.Context, name string) error {
	v, c := k.volumes[name], k.claims[name]
	if v != nil && v.DeletionTimestamp != nil || c != nil && c.DeletionTimestamp != nil {
		return fmt.Errorf("volume %s is being deleted; try again in a moment", name)
	}
	if v == nil || v.Status.Phase != corev1.VolumeReleased {
		return nil
	}
	return k.run.do(fmt.Sprintf("free volume %s of cluster %s for a new claim", name, k), func() error {
		patch := []byte(`{"spec":{"claimRef":{"uid":null,"resourceVersion":null}}}`)
		_, err := k.typed.CoreV1().PersistentVolumes().Patch(ctx, name, types.MergePatchType, patch, metav1.PatchOptions{FieldManager: fieldManager})
		if err != nil {
			return fmt.Errorf("freeing volume %s: %w", name, explain(err))
		}
		return nil
	})
}

// retire locks a former generation's DaemonSet to the nodes that have its disk and say
// so, or deletes it if there are none.
func (k *cluster) retire(ctx context.Context, ds *appsv1.DaemonSet) error {
	if len(k.holders[ds.Name]) == 0 {
		if err := k.delete(ctx, "DaemonSet", ds.Name, k.typed.AppsV1().DaemonSets(namespace).Delete); err != nil {
			return err
		}
		delete(k.daemonSets, ds.Name)
		return nil
	}
	return k.lock(ctx, ds)
}

// lock has a DaemonSet run on nodes with its disk's label only. Its pods are left as
// they are: a change of the template would otherwise replace each of them.
func (k *cluster) lock(ctx context.Context, ds *appsv1.DaemonSet) error {
	d := &zoneDisk{config: k.run.config, name: ds.Name, zone: ds.Labels[labelZone]}
	if d.locked(ds) {
		return nil
	}
	o, err := applied(ds)
	if err != nil {
		return err
	}
	affinity, err := runtime.DefaultUnstructuredConverter.ToUnstructured(d.nodes(has))
	if err != nil {
		return err
	}
	if err := unstructured.SetNestedMap(o.Object, affinity, "spec", "template", "spec", "affinity", "nodeAffinity"); err != nil {
		return err
	}
	if err := unstructured.SetNestedMap(o.Object, map[string]any{"type": string(appsv1.OnDeleteDaemonSetStrategyType)}, "spec", "updateStrategy"); err != nil {
		return err
	}
	what := fmt.Sprintf("lock DaemonSet %s of cluster %s to the %d nodes that have its disk", ds.Name, k, len(k.holders[ds.Name]))
	return k.run.do(what, func() error { return k.apply(ctx, o) })
}

// locked tells whether the disk's DaemonSet takes no new nodes.
func (d *zoneDisk) locked(ds *appsv1.DaemonSet) bool {
	a := ds.Spec.Template.Spec.Affinity
	return a != nil && equality.Semantic.DeepEqual(a.NodeAffinity, d.nodes(has))
}

// applied is what was last applied of a DaemonSet, to apply it once more: what is left
// out of a server-side apply is removed.
func applied(ds *appsv1.DaemonSet) (*unstructured.Unstructured, error) {
	fields, err := appsv1ac.ExtractDaemonSet(ds, fieldManager)
	if err != nil {
		return nil, fmt.Errorf("reading DaemonSet %s: %w", ds.Name, err)
	}
	content, err := runtime.DefaultUnstructuredConverter.ToUnstructured(fields)
	return &unstructured.Unstructured{Object: content}, err
}
