package agent

import (
	"context"
	"math"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// TestDue has the deadline count from when the node joined, and an agent that comes late
// get a while.
func TestDue(t *testing.T) {
	const deadline = 2 * time.Minute
	for name, c := range map[string]struct {
		joined        time.Duration // before the start
		atLeast, want time.Duration // after the start
	}{
		"joins now":            {0, firstPass, deadline},
		"joined before":        {30 * time.Second, firstPass, 90 * time.Second},
		"late":                 {110 * time.Second, firstPass, firstPass},
		"after the deadline":   {time.Hour, firstPass, firstPass},
		"hard bound":           {30 * time.Second, 0, 90 * time.Second},
		"hard bound, late":     {time.Hour, 0, 0},
		"another clock's time": {-time.Hour, firstPass, deadline},
		"clock a century slow": {-100 * 365 * 24 * time.Hour, firstPass, deadline},
		"clock a century fast": {100 * 365 * 24 * time.Hour, firstPass, firstPass},
		"the far future":       {-math.MaxInt64, firstPass, deadline},
		"the far past":         {math.MaxInt64, firstPass, firstPass},
		"the far past, bound":  {math.MaxInt64, 0, 0},
	} {
		t.Run(name, func(t *testing.T) {
			start := time.Now()
			got := due(start, start.Add(-c.joined), deadline, c.atLeast).Sub(start)
			if max(got, 0) != c.want {
				t.Errorf("after %v, want %v", got, c.want)
			}
		})
	}
}

// TestPassed has an agent start long after the deadline, on a node that is tainted and on
// one that another agent has opened.
func TestPassed(t *testing.T) {
	for name, taints := range map[string][]corev1.Taint{"shut": {{Key: DefaultStartupTaint}}, "open": nil} {
		t.Run(name, func(t *testing.T) {
			n := &node{taint: DefaultStartupTaint, wake: make(chan struct{}, 1), joined: make(chan time.Time, 1)}
			n.saw(&corev1.Node{
				ObjectMeta: metav1.ObjectMeta{CreationTimestamp: metav1.NewTime(time.Now().Add(-time.Hour))},
				Spec:       corev1.NodeSpec{Taints: taints},
			})
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			if got := n.passed(ctx, DefaultGateDeadline, firstPass, nil); got != (taints == nil) {
				t.Errorf("the deadline has passed at once: %v", got)
			}
		})
	}
}
