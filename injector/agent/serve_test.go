package agent

import (
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
	"testing/synctest"
	"time"
)

// TestLive has the loop get stuck and go on, by a clock that cannot jump.
func TestLive(t *testing.T) {
	const interval = 5 * time.Minute
	var h health
	status := func() int {
		w := httptest.NewRecorder()
		h.live(w, httptest.NewRequest(http.MethodGet, "/healthz", nil))
		return w.Code
	}
	synctest.Test(t, func(t *testing.T) {
		for _, interval := range []time.Duration{time.Second, interval} {
			h.beat(interval)
			limit := max(leastStuck, 3*interval)
			for _, step := range []struct {
				after time.Duration
				want  int
			}{{0, http.StatusOK}, {limit - time.Second, http.StatusOK}, {time.Second, http.StatusServiceUnavailable}, {time.Hour, http.StatusServiceUnavailable}} {
				time.Sleep(step.after)
				if got := status(); got != step.want {
					t.Errorf("interval %v, %v later: %d, want %d", interval, step.after, got, step.want)
				}
			}
		}
	})
	h.beat(interval)
	if due := h.due.Load().String(); !strings.Contains(due, " m=") {
		t.Errorf("%s has no monotonic reading", due)
	}
}
