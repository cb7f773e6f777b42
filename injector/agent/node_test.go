package agent

import (
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/google/go-cmp/cmp"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/selkies-project/packer-plugin-selkies/injector/report"
)

func TestMetaPatch(t *testing.T) {
	startup := corev1.Taint{Key: DefaultStartupTaint, Value: "true", Effect: corev1.TaintEffectNoSchedule}
	other := corev1.Taint{Key: "example.com/gpu", Effect: corev1.TaintEffectNoSchedule}
	serving := outcome{known: true, serving: true}
	for name, c := range map[string]struct {
		labels map[string]string
		taints []corev1.Taint
		want   desired
		pd     string
		patch  string // empty for none
	}{
		"before the first pass": {taints: []corev1.Taint{startup}},
		"shut":                  {taints: []corev1.Taint{startup}, want: desired{outcome: outcome{known: true}}},
		"registered": {
			taints: []corev1.Taint{startup}, want: desired{open: true, outcome: serving}, pd: "disk-1",
			patch: `{"metadata":{"labels":{"app.broker/cache-pd":"disk-1","app.broker/image-load-initialized":"true"},"resourceVersion":"7"},"spec":{"taints":[]}}`,
		},
		"other taints stay": {
			taints: []corev1.Taint{other, startup}, want: desired{open: true},
			patch: `{"metadata":{"resourceVersion":"7"},"spec":{"taints":[{"key":"example.com/gpu","effect":"NoSchedule"}]}}`,
		},
		"labels alone need no version": {
			want: desired{open: true, outcome: serving}, labels: map[string]string{LabelInitialized: "false"},
			patch: `{"metadata":{"labels":{"app.broker/image-load-initialized":"true"}}}`,
		},
		"as wanted": {
			labels: map[string]string{LabelInitialized: "true", LabelCachePD: "disk-1"}, taints: []corev1.Taint{other},
			want: desired{open: true, outcome: serving}, pd: "disk-1",
		},
		"deadline":           {want: desired{open: true, outcome: outcome{known: true}}},
		"of an earlier boot": {labels: map[string]string{LabelInitialized: "true"}, want: desired{}},
		"cannot be used any more": {
			labels: map[string]string{LabelInitialized: "true"}, want: desired{open: true, outcome: outcome{known: true}},
			patch: `{"metadata":{"labels":{"app.broker/image-load-initialized":"false"}}}`,
		},
	} {
		t.Run(name, func(t *testing.T) {
			node := &corev1.Node{ObjectMeta: metav1.ObjectMeta{ResourceVersion: "7", Labels: c.labels}, Spec: corev1.NodeSpec{Taints: c.taints}}
			got, err := metaPatch(node, &c.want, DefaultStartupTaint, c.pd)
			if err != nil || string(got) != c.patch {
				t.Errorf("got %s, %v; want %s", got, err, c.patch)
			}
		})
	}
}

func TestConditionPatch(t *testing.T) {
	then := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	good := outcome{reason: Registered, message: "7 images"}
	old := corev1.NodeCondition{
		Type: Condition, Status: corev1.ConditionTrue, Reason: Registered, Message: "7 images",
		LastHeartbeatTime: metav1.NewTime(then), LastTransitionTime: metav1.NewTime(then),
	}
	for name, c := range map[string]struct {
		old  *corev1.NodeCondition
		now  outcome
		late time.Duration
		want *corev1.NodeCondition // what differs from old; nil for no patch
	}{
		"no pass yet":   {},
		"first":         {now: good, late: time.Second, want: &corev1.NodeCondition{Status: corev1.ConditionTrue, LastTransitionTime: metav1.NewTime(then.Add(time.Second))}},
		"the same":      {old: &old, now: good, late: time.Minute},
		"heartbeat":     {old: &old, now: good, late: heartbeat, want: &corev1.NodeCondition{Status: corev1.ConditionTrue, LastTransitionTime: old.LastTransitionTime}},
		"put back":      {old: &old, now: good, late: -heartbeat, want: &corev1.NodeCondition{Status: corev1.ConditionTrue, LastTransitionTime: old.LastTransitionTime}},
		"other message": {old: &old, now: outcome{reason: Registered, message: "6 images"}, late: time.Second, want: &corev1.NodeCondition{Status: corev1.ConditionTrue, LastTransitionTime: old.LastTransitionTime}},
		"worse":         {old: &old, now: outcome{reason: Partial, message: "6 images"}, late: time.Second, want: &corev1.NodeCondition{Status: corev1.ConditionFalse, LastTransitionTime: metav1.NewTime(then.Add(time.Second))}},
	} {
		t.Run(name, func(t *testing.T) {
			node := &corev1.Node{}
			node.Status.Conditions = append(node.Status.Conditions, corev1.NodeCondition{Type: corev1.NodeReady})
			if c.old != nil {
				node.Status.Conditions = append(node.Status.Conditions, *c.old)
			}
			data, err := conditionPatch(node, c.now, then.Add(c.late))
			if err != nil {
				t.Fatal(err)
			}
			if c.want == nil {
				if data != nil {
					t.Errorf("patch %s, want none", data)
				}
				return
			}
			var got struct {
				Status struct{ Conditions []corev1.NodeCondition }
			}
			if err := json.Unmarshal(data, &got); err != nil || len(got.Status.Conditions) != 1 {
				t.Fatalf("patch %s: %v", data, err)
			}
			want := *c.want
			want.Type, want.Reason, want.Message = Condition, c.now.reason, c.now.message
			want.LastHeartbeatTime = metav1.NewTime(then.Add(c.late))
			if diff := cmp.Diff(want, got.Status.Conditions[0], cmp.Comparer(func(a, b metav1.Time) bool { return a.Equal(&b) })); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestImagesOf(t *testing.T) {
	pod := func(age int, phase corev1.PodPhase, images ...string) corev1.Pod {
		p := corev1.Pod{Status: corev1.PodStatus{Phase: phase}}
		p.CreationTimestamp = metav1.Unix(int64(-age), 0)
		for _, i := range images {
			p.Spec.Containers = append(p.Spec.Containers, corev1.Container{Image: i})
		}
		return p
	}
	waits := pod(1, corev1.PodPending, "late")
	waits.Spec.InitContainers = []corev1.Container{{Image: "init"}}
	got := imagesOf([]corev1.Pod{
		pod(9, corev1.PodRunning, "running", "early"),
		pod(8, corev1.PodSucceeded, "ended"),
		waits,
		pod(2, corev1.PodPending, "early"),
	})
	if diff := cmp.Diff([]string{"early", "init", "late", "running"}, got); diff != "" {
		t.Error(diff)
	}
}

func TestValidate(t *testing.T) {
	good := Config{
		GateDeadline: DefaultGateDeadline, GoneAfter: DefaultGoneAfter, CheckInterval: DefaultCheckInterval,
		MetricsAddress: DefaultMetricsAddress, StartupTaint: DefaultStartupTaint,
	}
	for name, c := range map[string]struct {
		change func(*Config)
		want   string
	}{
		"good":      {func(*Config) {}, ""},
		"node":      {func(c *Config) { c.Kubernetes, c.NodeName = true, "n" }, ""},
		"no node":   {func(c *Config) { c.Kubernetes = true }, "--node-name"},
		"deadline":  {func(c *Config) { c.GateDeadline = 0 }, "--gate-deadline is 0s"},
		"interval":  {func(c *Config) { c.CheckInterval = -time.Second }, "--check-interval"},
		"address":   {func(c *Config) { c.MetricsAddress = "9797" }, `--metrics-address is "9797"`},
		"no probes": {func(c *Config) { c.MetricsAddress = "" }, ""},
		"taint":     {func(c *Config) { c.Kubernetes, c.NodeName, c.StartupTaint = true, "n", "a b" }, "--startup-taint"},
		"label":     {func(c *Config) { c.Kubernetes, c.NodeName, c.CachePD = true, "n", "a/b" }, "--cache-pd"},
	} {
		t.Run(name, func(t *testing.T) {
			config := good
			c.change(&config)
			err := config.Validate()
			if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
				t.Errorf("error is %v, want %q", err, c.want)
			}
		})
	}
}

func TestChanges(t *testing.T) {
	c := newChanges()
	c.add(report.Change{Name: "a", Removed: true})
	if removed, altered, ended := c.take(); len(removed) > 0 || altered || ended != nil {
		t.Errorf("a change to an image of no disk: %v %v %v", removed, altered, ended)
	}
	c.follow(map[string]bool{"a": true, "b": true})
	for range 3 {
		c.add(report.Change{Name: "a", Removed: true})
		c.add(report.Change{Name: "b"})
	}
	select {
	case <-c.signal:
	default:
		t.Error("no signal")
	}
	c.end(errors.New("away"))
	removed, altered, ended := c.take()
	if diff := cmp.Diff([]string{"a"}, removed); diff != "" || !altered || ended == nil {
		t.Errorf("%s%v %v", diff, altered, ended)
	}
	if removed, altered, ended := c.take(); len(removed) > 0 || altered || ended != nil {
		t.Errorf("taken twice: %v %v %v", removed, altered, ended)
	}
}

func TestInterval(t *testing.T) {
	a := &Agent{Config: Config{CheckInterval: time.Minute}, gate: newGate(time.Hour)}
	waits := func(n int) (all []string) {
		for range n {
			all = append(all, a.interval().String())
		}
		return all
	}
	if got := fmt.Sprint(waits(4)); got != "[1s 2s 4s 4s]" {
		t.Errorf("while the gate is shut: %s", got)
	}
	a.gate.open()
	if got := fmt.Sprint(waits(6)); got != "[8s 16s 32s 1m0s 1m0s 1m0s]" {
		t.Errorf("after it has opened: %s", got)
	}
	a.last.settled = true
	if got := fmt.Sprint(waits(2)); got != "[1m0s 1m0s]" {
		t.Errorf("idle: %s", got)
	}
	a.last.settled = false
	if got := fmt.Sprint(waits(2)); got != "[1s 2s]" {
		t.Errorf("after a new failure: %s", got)
	}
}

// TestSaw has the watch tell of versions of the node that an answer has overtaken.
func TestSaw(t *testing.T) {
	n := &node{wake: make(chan struct{}, 1), joined: make(chan time.Time, 1)}
	see := func(uid types.UID, version, want string) {
		t.Helper()
		n.saw(&corev1.Node{ObjectMeta: metav1.ObjectMeta{UID: uid, ResourceVersion: version}})
		if n.now.ResourceVersion != want {
			t.Errorf("after version %s of %s version %s counts, want %s", version, uid, n.now.ResourceVersion, want)
		}
	}
	see("a", "99", "99")
	see("a", "101", "101")
	see("a", "100", "101")
	see("a", "102", "102")
	see("b", "90", "90") // another node of that name
}

// TestWantedImages has two that ask, before and after the API server tells.
func TestWantedImages(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		n := &node{told: make(chan struct{})}
		if got := n.wantedImages(t.Context()); got != nil {
			t.Errorf("before: %q", got)
		}
		n.wanted = []string{"a"}
		close(n.told)
		for range 2 {
			if got := n.wantedImages(t.Context()); !slices.Equal(got, n.wanted) {
				t.Errorf("after: %q", got)
			}
		}
	})
}
