package agent

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"slices"
	"sync"
	"time"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/fields"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/resourceversion"
	"k8s.io/client-go/tools/cache"
	"k8s.io/client-go/tools/record"
	"k8s.io/client-go/util/flowcontrol"
	"k8s.io/klog/v2"
)

// What the agent writes into its node.
const (
	// LabelInitialized is true while cached images can be used, as the Selkies broker
	// expects. When they cannot any more it becomes false, as its node pools have it
	// from the start. The deadline of the gate does not set it: the taint is what
	// keeps pods waiting, the label says what they find.
	LabelInitialized = "app.broker/image-load-initialized"
	// LabelCachePD names the cache disk, while LabelInitialized is true.
	LabelCachePD = "app.broker/cache-pd"
	// Condition has an outcome's reason and message.
	Condition corev1.NodeConditionType = "SelkiesImageCacheReady"

	// component is the source of events.
	component = "selkies-image-injector"
)

const (
	// heartbeat is how old the condition's heartbeat may become.
	heartbeat = 10 * time.Minute
	// wantedTime bounds how long registration waits to hear what pods wait for.
	wantedTime = 3 * time.Second
	// firstDelay and lastDelay bound the wait before a request that failed is repeated.
	firstDelay = time.Second
	lastDelay  = time.Minute
)

// node keeps the agent's node as the last pass wants it: labels, taint and condition.
// It follows the node by a watch, so that what someone resets is put right at once.
// All of it happens beside the passes: an API server that is away holds nothing up.
type node struct {
	name     string
	taint    string
	cachePD  string
	log      *slog.Logger
	client   client
	recorder record.EventRecorder
	sink     func(context.Context)

	wake chan struct{}
	mu   sync.Mutex
	want *desired     // nil before the first pass
	now  *corev1.Node // the last that is known, nil before
	// joined has, once, when the node joined the cluster.
	joined chan time.Time
	// written holds back what is written again and again, by what it is: two agents on a
	// node, as one takes over from the other, may not want the same.
	written *flowcontrol.Backoff

	// told is closed when wanted is known, which are the images that pods wait for.
	told   chan struct{}
	wanted []string
}

// desired is what the node is to say.
type desired struct {
	open bool
	outcome
}

func newNode(c Config) (*node, error) {
	// Of an idle watch, client-go asks every 30 seconds whether the server still
	// lives, and offers no other way to change that.
	const idle = "HTTP2_READ_IDLE_TIMEOUT_SECONDS"
	if os.Getenv(idle) == "" {
		if err := os.Setenv(idle, "90"); err != nil {
			return nil, err
		}
	}
	klog.SetSlogLogger(c.Log)
	client, err := newClient(c.Kubeconfig)
	if err != nil {
		return nil, err
	}
	n := &node{
		name: c.NodeName, taint: c.StartupTaint, cachePD: c.CachePD, log: c.Log, client: client,
		wake:    make(chan struct{}, 1),
		told:    make(chan struct{}),
		joined:  make(chan time.Time, 1),
		written: flowcontrol.NewBackOff(firstDelay, lastDelay),
	}
	events := record.NewBroadcaster()
	n.recorder = events.NewRecorder(scheme, corev1.EventSource{Component: component, Host: n.name})
	n.sink = func(ctx context.Context) {
		events.StartRecordingToSink(eventSink{client})
		<-ctx.Done()
		events.Shutdown()
	}
	return n, nil
}

// run keeps the node as it is to be until the context ends.
func (n *node) run(ctx context.Context) {
	go n.sink(ctx)
	go n.follow(ctx)
	var retry <-chan time.Time
	delay, said := firstDelay, ""
	for {
		select {
		case <-ctx.Done():
			return
		case <-n.wake:
		case <-retry:
		}
		err := n.reconcile(ctx)
		retry = nil
		switch {
		case err == nil:
			delay, said = firstDelay, ""
			continue
		case apierrors.IsConflict(err):
			delay = firstDelay // someone else changed the node; the watch is about to tell
		case err.Error() != said:
			said = err.Error()
			n.log.Warn("cannot update the node; trying again", "node", n.name, "error", err)
		}
		retry = time.After(delay)
		delay = min(2*delay, lastDelay)
	}
}

// set says how the node is to be. Without a cluster there is none.
func (n *node) set(d desired) {
	if n == nil {
		return
	}
	n.mu.Lock()
	// The deadline may have opened the gate since the caller looked.
	d.open = d.open || n.want != nil && n.want.open
	n.want = &d
	n.mu.Unlock()
	n.notify()
}

// open lets pods onto the node, whatever else it is to say.
func (n *node) open() {
	if n == nil {
		return
	}
	n.mu.Lock()
	var d desired
	if n.want != nil {
		d = *n.want
	}
	d.open = true
	n.want = &d
	n.mu.Unlock()
	n.notify()
}

func (n *node) notify() {
	select {
	case n.wake <- struct{}{}:
	default:
	}
}

// follow watches the node.
func (n *node) follow(ctx context.Context) {
	seen := func(obj any) {
		if node, ok := obj.(*corev1.Node); ok {
			n.saw(node)
		}
	}
	_, informer := cache.NewInformerWithOptions(cache.InformerOptions{
		ListerWatcher: cache.NewListWatchFromClient(n.client, "nodes", "", fields.OneTermEqualSelector("metadata.name", n.name)),
		ObjectType:    &corev1.Node{},
		Transform:     slim,
		Handler: cache.ResourceEventHandlerFuncs{
			AddFunc:    seen,
			UpdateFunc: func(_, obj any) { seen(obj) },
		},
	})
	informer.RunWithContext(ctx)
}

// slim drops what takes most of a node's memory and is of no use here.
func slim(obj any) (any, error) {
	if node, ok := obj.(*corev1.Node); ok {
		node.ManagedFields, node.Status.Images = nil, nil
	}
	return obj, nil
}

// saw takes over what the watch, or the answer to a patch, tells of the node, unless the
// other has told of a later change before.
func (n *node) saw(node *corev1.Node) {
	n.mu.Lock()
	defer n.mu.Unlock()
	switch {
	case n.now == nil:
		n.joined <- node.CreationTimestamp.Time
	case older(node, n.now):
		return
	}
	n.now = node
	n.notify()
}

// older says whether a is an earlier version of the same node.
func older(a, b *corev1.Node) bool {
	order, err := resourceversion.CompareResourceVersion(a.ResourceVersion, b.ResourceVersion)
	return err == nil && order < 0 && a.UID == b.UID
}

// reconcile writes what of the node is not as it is to be.
func (n *node) reconcile(ctx context.Context) error {
	n.mu.Lock()
	want, now := n.want, n.now
	n.mu.Unlock()
	if want == nil || now == nil {
		return nil
	}
	// Two requests, for the condition is of a subresource. Neither waits for the other.
	return errors.Join(n.writeMeta(ctx, now, want), n.writeCondition(ctx, now, want, time.Now()))
}

func (n *node) writeMeta(ctx context.Context, now *corev1.Node, want *desired) error {
	patch, err := metaPatch(now, want, n.taint, n.cachePD)
	if err != nil || patch == nil {
		return err
	}
	// The patch of a taint names a version: the gate's is never held back.
	if err := n.patch(ctx, string(patch), types.MergePatchType, patch); err != nil {
		return fmt.Errorf("patching labels and taints: %w", err)
	}
	n.log.Info("updated the node", "node", n.name, "patch", string(patch))
	return nil
}

func (n *node) writeCondition(ctx context.Context, now *corev1.Node, want *desired, at time.Time) error {
	patch, err := conditionPatch(now, want.outcome, at)
	if err != nil || patch == nil {
		return err
	}
	if err := n.patch(ctx, want.reason+": "+want.message, types.StrategicMergePatchType, patch, "status"); err != nil {
		return fmt.Errorf("patching the condition: %w", err)
	}
	return nil
}

// errOverwritten is that of a change that the agent has made a moment ago.
var errOverwritten = errors.New("someone else changes it back; waiting a while")

// patch writes what, or refuses to if it has written the same a moment ago.
func (n *node) patch(ctx context.Context, what string, typ types.PatchType, patch []byte, subresources ...string) error {
	if n.written.IsInBackOffSinceUpdate(what, time.Now()) {
		return errOverwritten
	}
	node, err := n.client.patchNode(ctx, n.name, typ, patch, subresources...)
	if err != nil {
		return err
	}
	n.written.Next(what, time.Now())
	n.written.GC()
	// The watch tells the same a little later; meanwhile nothing is written twice.
	n.saw(node)
	return nil
}

// metaPatch is the JSON merge patch that makes labels and taints as wanted, nil if
// they are. Taints are one list: the patch names the version that it is made for,
// so that it fails rather than lose another's taint.
func metaPatch(now *corev1.Node, want *desired, taint, cachePD string) ([]byte, error) {
	labels := map[string]string{}
	label := func(key, value string) {
		if now.Labels[key] != value {
			labels[key] = value
		}
	}
	switch {
	case !want.known:
	case want.serving:
		label(LabelInitialized, "true")
		if cachePD != "" {
			label(LabelCachePD, cachePD)
		}
	case now.Labels[LabelInitialized] == "true":
		label(LabelInitialized, "false")
	}
	meta, patch := map[string]any{}, map[string]any{}
	if len(labels) > 0 {
		meta["labels"] = labels
	}
	if isTaint := func(t corev1.Taint) bool { return t.Key == taint }; want.open && slices.ContainsFunc(now.Spec.Taints, isTaint) {
		meta["resourceVersion"] = now.ResourceVersion
		patch["spec"] = map[string]any{"taints": slices.DeleteFunc(slices.Clone(now.Spec.Taints), isTaint)}
	}
	if len(meta) == 0 {
		return nil, nil
	}
	patch["metadata"] = meta
	return json.Marshal(patch)
}

// conditionPatch is the strategic merge patch that makes the condition say the
// outcome, nil if it does and has been confirmed lately. A heartbeat of the future is of
// a clock that has been put back.
func conditionPatch(now *corev1.Node, o outcome, at time.Time) ([]byte, error) {
	if o.reason == "" {
		return nil, nil // no pass has ended yet
	}
	c := corev1.NodeCondition{
		Type:               Condition,
		Status:             corev1.ConditionFalse,
		LastHeartbeatTime:  metav1.NewTime(at),
		LastTransitionTime: metav1.NewTime(at),
		Reason:             o.reason,
		Message:            o.message,
	}
	if o.ready() {
		c.Status = corev1.ConditionTrue
	}
	for _, old := range now.Status.Conditions {
		if old.Type != Condition {
			continue
		}
		if old.Status == c.Status {
			c.LastTransitionTime = old.LastTransitionTime
		}
		if old.Status == c.Status && old.Reason == c.Reason && old.Message == c.Message && at.Sub(old.LastHeartbeatTime.Time).Abs() < heartbeat {
			return nil, nil
		}
	}
	return json.Marshal(map[string]any{"status": map[string]any{"conditions": []corev1.NodeCondition{c}}})
}

// event records an event about the node. Without a cluster there is none.
func (n *node) event(warning bool, reason, message string) {
	if n == nil {
		return
	}
	typ := corev1.EventTypeNormal
	if warning {
		typ = corev1.EventTypeWarning
	}
	// As kubelet names the node of its events, so that they stand beside each other.
	ref := &corev1.ObjectReference{APIVersion: "v1", Kind: "Node", Name: n.name, UID: types.UID(n.name)}
	n.recorder.Event(ref, typ, reason, message)
}
