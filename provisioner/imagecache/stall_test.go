package imagecache

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/docker/docker/client"
	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/opencontainers/go-digest"
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

// TestHungDocker has Docker hang while it pulls the first of many images: the others are not
// tried.
func TestHungDocker(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		docker := answers(func(req *http.Request) (*http.Response, error) {
			if strings.HasSuffix(req.URL.Path, "/json") { // whether it has the image
				return &http.Response{StatusCode: http.StatusNotFound, Header: http.Header{}, Body: http.NoBody}, nil
			}
			<-req.Context().Done()
			return nil, req.Context().Err()
		})
		c, err := client.NewClientWithOpts(client.WithHost("http://build-vm"), client.WithVersion("1.41"),
			client.WithHTTPClient(&http.Client{Transport: impatient{docker, ofEngine}}))
		if err != nil {
			t.Fatal(err)
		}
		var images []*wanted
		for i := range 20 {
			ref, err := parseReference("images", fmt.Sprintf("app:%d", i))
			if err != nil {
				t.Fatal(err)
			}
			w := &wanted{refs: []reference{ref}}
			w.image.Config.Digest, w.image.Manifest.Digest = digest.FromString("config"), digest.FromString("manifest")
			images = append(images, w)
		}
		p := &puller{
			engine: &engine{Client: c}, registries: &registries{keychain: authn.NewMultiKeychain()},
			patience: patience{attempts: 5, say: func(string, ...any) {}}, progress: pullProgress(images, nil, time.Now()),
		}
		start := time.Now()
		_, _, err = p.pullAll(t.Context(), images, 4)
		if took := time.Since(start); !errors.Is(err, silence(answerTime)) || took != stallLimit+answerTime {
			t.Errorf("after %v: %v", took, err)
		}
	})
}
