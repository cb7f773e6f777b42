package agent

import (
	"testing"
	"time"
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
