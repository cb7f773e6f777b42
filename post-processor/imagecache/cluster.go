package imagecache

import (
	"context"
	"fmt"
	"slices"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/discovery"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/restmapper"

	"github.com/selkies-project/packer-plugin-selkies/gcp"
)

const (
	fieldManager = "packer-plugin-selkies"
	// connectAttempts is how often a cluster is called that gives no answer.
	connectAttempts = 3
	// bindTimeout bounds the wait for a claim that has a volume of its own.
	bindTimeout = 2 * time.Minute
)

// cluster is a cluster that the cache is rolled out to.
type cluster struct {
	*gcp.Cluster
	run   *run
	zones []string // that get a disk
	done  int      // zones that the generation has come to
	errs  []error  // what fails the run in the end

	typed   *kubernetes.Clientset
	dynamic *dynamic.DynamicClient
	mapper  meta.RESTMapper

	leading context.Context // ends when the lease is lost; nil without one
	release func()          // gives the lease back

	// surveyed is whether the last survey succeeded. If not, what an earlier one has
	// found stays.
	surveyed bool
	// named are the disks, as diskPath has them, for which any survey of this run has
	// found a volume.
	named map[string]bool
	inventory
}

// inventory is what a survey finds, by name, which for objects of this cache is that of
// the disk.
type inventory struct {
	daemonSets map[string]*appsv1.DaemonSet
	volumes    map[string]*corev1.PersistentVolume
	claims     map[string]*corev1.PersistentVolumeClaim
	attached   map[string]bool // volumes that a node has attached
	nodes
}

// nodes says which nodes have which disk.
type nodes struct {
	holders  map[string]map[string]bool // the nodes that have a disk
	labelled map[string]string          // the disk that a node's label says
}

// connect makes sure that the cluster answers and finds out what it serves.
func (k *cluster) connect(ctx context.Context) error {
	config, err := k.restConfig()
	if err != nil {
		return err
	}
	if k.typed, err = kubernetes.NewForConfig(config); err != nil {
		return err
	}
	if k.dynamic, err = dynamic.NewForConfig(config); err != nil {
		return err
	}
	groups, err := apiGroups(ctx, k.typed.Discovery())
	for attempt := 1; gcp.IsUnreachable(err) && attempt < connectAttempts && ctx.Err() == nil; attempt++ {
		if err := gcp.Sleep(ctx, pollInterval); err != nil {
			return err
		}
		groups, err = apiGroups(ctx, k.typed.Discovery())
	}
	if gcp.IsUnreachable(err) {
		return fmt.Errorf("it does not answer: %w", err)
	}
	if err != nil {
		return fmt.Errorf("asking what it serves: %w", explain(err))
	}
	k.mapper = restmapper.NewDiscoveryRESTMapper(groups)
	return nil
}

func (k *cluster) restConfig() (*rest.Config, error) {
	config, err := k.Config()
	if err != nil {
		return nil, err
	}
	// There are a few dozen requests in a row, which the default would slow down.
	config.QPS, config.Burst = 50, 100
	return config, nil
}

// apiGroups is restmapper.GetAPIGroupResources with a context. What is cut off goes
// on until the request's own time-out.
func apiGroups(ctx context.Context, client discovery.DiscoveryInterface) ([]*restmapper.APIGroupResources, error) {
	type answer struct {
		groups []*restmapper.APIGroupResources
		err    error
	}
	answers := make(chan answer, 1)
	go func() {
		groups, err := restmapper.GetAPIGroupResources(client)
		answers <- answer{groups, err}
	}()
	select {
	case a := <-answers:
		return a.groups, a.err
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	}
}

// explain adds what is missing to a refusal.
func explain(err error) error {
	if !apierrors.IsForbidden(err) && !apierrors.IsUnauthorized(err) {
		return err
	}
	return fmt.Errorf("%w; docs/iam.md lists the roles", err)
}

// selector finds the objects of this cache.
func (k *cluster) selector() metav1.ListOptions {
	return metav1.ListOptions{LabelSelector: labelManagedBy + "=" + fieldManager + "," + labelInstance + "=" + k.run.config.CacheName}
}

// survey finds all objects of this cache and the nodes that use its disks.
func (k *cluster) survey(ctx context.Context) error {
	k.surveyed = false
	found, err := k.look(ctx)
	if err != nil {
		return err
	}
	k.inventory, k.surveyed = *found, true
	k.noteDisks()
	return nil
}

// surveyVolumes finds the volumes only, of a cluster that is not rolled out to.
func (k *cluster) surveyVolumes(ctx context.Context) error {
	k.surveyed = false
	if k.typed == nil {
		config, err := k.restConfig()
		if err != nil {
			return err
		}
		if k.typed, err = kubernetes.NewForConfig(config); err != nil {
			return err
		}
	}
	volumes, err := k.listVolumes(ctx)
	if err != nil {
		return err
	}
	k.volumes, k.surveyed = volumes, true
	return nil
}

// listVolumes lists all volumes: one that someone else has made for a disk of ours
// counts, too.
func (k *cluster) listVolumes(ctx context.Context) (map[string]*corev1.PersistentVolume, error) {
	list, err := k.typed.CoreV1().PersistentVolumes().List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, fmt.Errorf("listing PersistentVolumes: %w", explain(err))
	}
	volumes := map[string]*corev1.PersistentVolume{}
	for i := range list.Items {
		volumes[list.Items[i].Name] = &list.Items[i]
	}
	return volumes, nil
}

func (k *cluster) look(ctx context.Context) (*inventory, error) {
	found := &inventory{
		daemonSets: map[string]*appsv1.DaemonSet{},
		claims:     map[string]*corev1.PersistentVolumeClaim{}, attached: map[string]bool{},
	}
	sets, err := k.typed.AppsV1().DaemonSets(namespace).List(ctx, k.selector())
	if err != nil {
		return nil, fmt.Errorf("listing DaemonSets: %w", explain(err))
	}
	for i := range sets.Items {
		found.daemonSets[sets.Items[i].Name] = &sets.Items[i]
	}
	if found.volumes, err = k.listVolumes(ctx); err != nil {
		return nil, err
	}
	claims, err := k.typed.CoreV1().PersistentVolumeClaims(namespace).List(ctx, k.selector())
	if err != nil {
		return nil, fmt.Errorf("listing PersistentVolumeClaims: %w", explain(err))
	}
	for i := range claims.Items {
		found.claims[claims.Items[i].Name] = &claims.Items[i]
	}
	attachments, err := k.typed.StorageV1().VolumeAttachments().List(ctx, metav1.ListOptions{})
	if err != nil {
		return nil, fmt.Errorf("listing VolumeAttachments: %w", explain(err))
	}
	for _, a := range attachments.Items {
		if v := a.Spec.Source.PersistentVolumeName; v != nil {
			found.attached[*v] = true
		}
	}
	if err := k.lookAtNodes(ctx, &found.nodes); err != nil {
		return nil, err
	}
	return found, nil
}

// lookAtNodes finds out which nodes have which disk: those with its label, and those
// that a pod of its DaemonSet runs on.
func (k *cluster) lookAtNodes(ctx context.Context, found *nodes) error {
	found.holders, found.labelled = map[string]map[string]bool{}, map[string]string{}
	hold := func(disk, node string) {
		if found.holders[disk] == nil {
			found.holders[disk] = map[string]bool{}
		}
		found.holders[disk][node] = true
	}
	nodes, err := k.typed.CoreV1().Nodes().List(ctx, metav1.ListOptions{LabelSelector: labelDisk})
	if err != nil {
		return fmt.Errorf("listing nodes: %w", explain(err))
	}
	for _, n := range nodes.Items {
		found.labelled[n.Name] = n.Labels[labelDisk]
		hold(n.Labels[labelDisk], n.Name)
	}
	pods, err := k.typed.CoreV1().Pods(namespace).List(ctx, metav1.ListOptions{LabelSelector: labelDisk})
	if err != nil {
		return fmt.Errorf("listing pods: %w", explain(err))
	}
	for _, p := range pods.Items {
		// One without a node has no disk yet. One that ends still has.
		if p.Spec.NodeName != "" {
			hold(p.Labels[labelDisk], p.Spec.NodeName)
		}
	}
	return nil
}

// mayUse tells whether nodes of the cluster can be in a zone: now, or when its node
// pools were others.
func (k *cluster) mayUse(zone string) bool {
	return k.Location == "" || k.Region() == gcp.Region(zone) || slices.Contains(k.Cluster.Zones, zone)
}

// apply applies an object server-side. What others have set of the same fields is
// overridden: the manifests are what counts.
func (k *cluster) apply(ctx context.Context, o *unstructured.Unstructured) error {
	gvk := o.GroupVersionKind()
	what := gvk.Kind + " " + o.GetName()
	mapping, err := k.mapper.RESTMapping(gvk.GroupKind(), gvk.Version)
	if err != nil {
		return fmt.Errorf("applying %s: %w; is the cluster older than Kubernetes 1.30?", what, err)
	}
	resource := dynamic.ResourceInterface(k.dynamic.Resource(mapping.Resource))
	if mapping.Scope.Name() == meta.RESTScopeNameNamespace {
		resource = k.dynamic.Resource(mapping.Resource).Namespace(o.GetNamespace())
	}
	return k.run.do(fmt.Sprintf("apply %s to cluster %s", what, k), func() error {
		_, err := resource.Apply(ctx, o.GetName(), o, metav1.ApplyOptions{FieldManager: fieldManager, Force: true})
		if err != nil {
			return fmt.Errorf("applying %s: %w", what, explain(err))
		}
		return nil
	})
}

// labelNode notes on a node which disk it has, unless it has a note already.
func (k *cluster) labelNode(ctx context.Context, node, disk string) error {
	if k.labelled[node] != "" {
		return nil
	}
	err := k.run.do(fmt.Sprintf("label node %s of cluster %s with %s", node, k, disk), func() error {
		for {
			n, err := k.typed.CoreV1().Nodes().Get(ctx, node, metav1.GetOptions{})
			if apierrors.IsNotFound(err) || err == nil && n.Labels[labelDisk] != "" {
				return nil
			}
			if err != nil {
				return err
			}
			// The version keeps a label that the agent sets at this moment.
			patch := fmt.Sprintf(`{"metadata":{"resourceVersion":%q,"labels":{%q:%q}}}`, n.ResourceVersion, labelDisk, disk)
			_, err = k.typed.CoreV1().Nodes().Patch(ctx, node, types.MergePatchType, []byte(patch), metav1.PatchOptions{FieldManager: fieldManager})
			if apierrors.IsConflict(err) {
				continue
			}
			return err
		}
	})
	if err != nil {
		return fmt.Errorf("labelling node %s: %w", node, explain(err))
	}
	k.labelled[node] = disk
	return nil
}

// delete deletes an object. What it is used by, such as the pods of a claim, delays
// that; nothing waits for it.
func (k *cluster) delete(ctx context.Context, what, name string, remove func(context.Context, string, metav1.DeleteOptions) error) error {
	return k.run.do(fmt.Sprintf("delete %s %s of cluster %s", what, name, k), func() error {
		if err := remove(ctx, name, metav1.DeleteOptions{}); err != nil && !apierrors.IsNotFound(err) {
			return fmt.Errorf("deleting %s %s: %w", what, name, explain(err))
		}
		return nil
	})
}

// waitBound waits until a claim has its volume.
func (k *cluster) waitBound(ctx context.Context, name string) error {
	if k.run.config.DryRun {
		return nil
	}
	ctx, cancel := context.WithTimeoutCause(ctx, bindTimeout, fmt.Errorf("claim %s is not bound to its volume after %s; see kubectl -n %s describe pvc %s", name, bindTimeout, namespace, name))
	defer cancel()
	for interval := firstLook; ; interval = min(2*interval, longLook) {
		claim, err := k.typed.CoreV1().PersistentVolumeClaims(namespace).Get(ctx, name, metav1.GetOptions{})
		if err == nil && claim.Status.Phase == corev1.ClaimBound {
			return nil
		}
		if err == nil && claim.Status.Phase == corev1.ClaimLost {
			return fmt.Errorf("claim %s has lost its volume; delete the claim", name)
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		if err != nil {
			return fmt.Errorf("getting claim %s: %w", name, explain(err))
		}
		if err := gcp.Sleep(ctx, interval); err != nil {
			return err
		}
	}
}
