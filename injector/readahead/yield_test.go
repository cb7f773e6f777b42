package readahead

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"
)

// TestYield waits for others that read so much a millisecond for a time, from before the
// first look on.
func TestYield(t *testing.T) {
	const ms = time.Millisecond
	for name, c := range map[string]struct {
		rate     int64         // bytes a millisecond
		during   time.Duration // of the others' reading
		pauseAt  time.Duration // when they read nothing for 100 ms
		foretold time.Duration // when they read what the trace has, 0 for never
		want     time.Duration
	}{
		"nobody":         {},
		"a little":       {rate: 500, during: time.Hour},
		"one request":    {rate: 128 << 10, during: ms, want: calm},
		"a start":        {rate: 4096, during: 3 * time.Second, want: 3160 * ms},
		"a short breath": {rate: 4096, during: 3 * time.Second, pauseAt: time.Second, want: 3160 * ms},
		"as foretold":    {rate: 4096, during: time.Hour, foretold: 130 * ms, want: 130*ms - turn},
	} {
		t.Run(name, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "file")
			if err := os.WriteFile(file, nil, 0o600); err != nil {
				t.Fatal(err)
			}
			next := []part{{open: func() (*os.File, error) { return os.Open(file) }, length: 4096}}
			synctest.Test(t, func(t *testing.T) {
				start := time.Now()
				began := start
				y := &yield{counts: func() (device, own int64, err error) {
					now := time.Since(start)
					if c.foretold > 0 && now >= c.foretold {
						err = os.WriteFile(file, []byte("in the page cache"), 0o600)
					}
					read := min(now, c.during)
					if c.pauseAt > 0 {
						read -= min(max(now-c.pauseAt, 0), 100*ms)
					}
					own = int64(now) // of no matter
					return own + c.rate*read.Milliseconds(), own, err
				}}
				time.Sleep(turn)
				if err := y.wait(t.Context(), next); err != nil {
					t.Fatal(err)
				}
				if waited := time.Since(began) - turn; waited != c.want {
					t.Errorf("it waited for %v, not %v", waited, c.want)
				}
				if c.foretold == 0 {
					return
				}
				began = time.Now()
				time.Sleep(turn)
				if err := y.wait(t.Context(), next); err != nil || time.Since(began) != turn {
					t.Errorf("once it was foretold, it waits for %v, %v", time.Since(began)-turn, err)
				}
			})
		})
	}
}

// TestYieldEnds has others that read for ever, and a device that goes away.
func TestYieldEnds(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithTimeout(t.Context(), patience/2)
		defer cancel()
		var device int64
		y := &yield{counts: func() (int64, int64, error) {
			device += 1 << 20
			return device, 0, nil
		}}
		if err := y.wait(ctx, nil); !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("error is %v", err)
		}
		for _, want := range []time.Duration{patience, 0} {
			began := time.Now()
			if err := y.wait(t.Context(), nil); err != nil || time.Since(began) != want {
				t.Errorf("it waits for %v, %v, not %v", time.Since(began), err, want)
			}
		}
		y.outworn = false
		y.counts = func() (int64, int64, error) { return 0, 0, os.ErrNotExist }
		if err := y.wait(t.Context(), nil); err != nil {
			t.Error(err)
		}
	})
}

// TestCounts reads those of this process, and of a directory that is on no device.
func TestCounts(t *testing.T) {
	if n, err := readByThis(); n < 0 || err != nil {
		t.Errorf("%d, %v", n, err)
	}
	if newYield("/proc") != nil {
		t.Error("/proc is on a device")
	}
	stat := filepath.Join(t.TempDir(), "stat")
	for text, want := range map[string]int64{"  247747    35891  9801956   355698   444979": 9801956 * 512, "1 2": 0, "": 0} {
		if err := os.WriteFile(stat, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if n, err := readFrom(stat); n != want || (err != nil) != (want == 0) {
			t.Errorf("%q is %d, %v", text, n, err)
		}
	}
}
