package imagecache

import (
	"context"
	"errors"
	"io"
	"net/http"
	"testing"
	"testing/synctest"
	"time"
)

// TestWatch has Docker tell of one of two pulls, and then of none.
func TestWatch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := newProgress("pulling", time.Now())
		a, stopA := p.watch(t.Context())
		b, stopB := p.watch(t.Context())
		defer stopB()
		for range 3 {
			time.Sleep(stallLimit - time.Second)
			p.event(&wanted{}, event{Status: "Downloading"})
			synctest.Wait()
			if a.Err() != nil || b.Err() != nil {
				t.Fatal("a pull was given up while another one moves")
			}
		}
		stopA()
		time.Sleep(stallLimit)
		synctest.Wait()
		if err := stalled(b, b.Err()); !errors.Is(err, errStalled) || !mayPass(err) {
			t.Errorf("given up with %v", err)
		}
		if err := stalled(a, a.Err()); !errors.Is(err, context.Canceled) {
			t.Errorf("a pull that has ended gives %v", err)
		}
	})
}

type answers func(*http.Request) (*http.Response, error)

func (a answers) RoundTrip(req *http.Request) (*http.Response, error) { return a(req) }

// TestImpatient asks registries that answer slowly, stop in the middle, and never answer.
func TestImpatient(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		body, w := io.Pipe()
		client := &http.Client{Transport: impatient{answers(func(req *http.Request) (*http.Response, error) {
			if req.URL.Path == "/silent" {
				<-req.Context().Done()
				return nil, req.Context().Err()
			}
			context.AfterFunc(req.Context(), func() { w.CloseWithError(req.Context().Err()) })
			time.Sleep(stallLimit - time.Second)
			return &http.Response{StatusCode: http.StatusOK, Body: body}, nil
		}), ofRegistry}}
		if resp, err := client.Get("http://example.com/silent"); !errors.Is(err, errStalled) {
			t.Errorf("no answer gives %v, %v", resp, err)
		}
		resp, err := client.Get("http://example.com/slow")
		if err != nil {
			t.Fatal(err)
		}
		defer resp.Body.Close()
		go func() {
			for range 3 {
				time.Sleep(stallLimit - time.Second)
				_, _ = w.Write([]byte("x")) // what is read is looked at
			}
		}()
		// What is done between two reads is not the registry's fault.
		b := make([]byte, 1)
		for range 3 {
			if _, err := resp.Body.Read(b); err != nil {
				t.Fatal(err)
			}
			time.Sleep(2 * stallLimit)
		}
		start := time.Now()
		if _, err := resp.Body.Read(b); !errors.Is(err, errStalled) || time.Since(start) != stallLimit {
			t.Errorf("after %v: %v", time.Since(start), err)
		}
	})
}

// TestSilentDocker asks a Docker that does not answer.
func TestSilentDocker(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		client := &http.Client{Transport: impatient{answers(func(req *http.Request) (*http.Response, error) {
			<-req.Context().Done()
			return nil, req.Context().Err()
		}), ofEngine}}
		for path, limit := range map[string]time.Duration{"info": stallLimit, "images/get": saveLimit, "containers/json": stallLimit} {
			start := time.Now()
			resp, err := client.Get("http://build-vm/v1.41/" + path)
			if _, ok := errors.AsType[silence](err); !ok || time.Since(start) != limit {
				t.Errorf("%s: after %v: %v, %v", path, time.Since(start), resp, err)
			}
		}
		// These wait for others: for a registry, for a container.
		for _, path := range []string{"images/create", "containers/x/wait"} {
			ctx, cancel := context.WithTimeout(t.Context(), 2*saveLimit)
			req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://build-vm/v1.41/"+path, nil)
			if err != nil {
				t.Fatal(err)
			}
			start := time.Now()
			resp, err := client.Do(req)
			if err == nil || time.Since(start) != 2*saveLimit {
				t.Errorf("%s: after %v: %v, %v", path, time.Since(start), resp, err)
			}
			cancel()
		}
	})
}
