package imagecache

import (
	"errors"
	"io"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"
)

type zeros struct{}

func (zeros) Read(p []byte) (int, error) {
	clear(p)
	return len(p), nil
}

// TestBounded reads answers that are as large as they may be, and larger.
func TestBounded(t *testing.T) {
	mux := http.NewServeMux()
	answer := func(n int64) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) { _, _ = io.CopyN(w, zeros{}, n) }
	}
	mux.HandleFunc("/v2/app/manifests/just", answer(maxAnswer))
	mux.HandleFunc("/v2/app/manifests/more", answer(maxAnswer+1))
	mux.HandleFunc("/v2/app/blobs/large", answer(maxAnswer+1))
	mux.HandleFunc("/elsewhere", answer(maxAnswer+1))
	mux.Handle("/v2/app/blobs/redirected", http.RedirectHandler("/elsewhere", http.StatusTemporaryRedirect))
	mux.Handle("/v2/app/manifests/redirected", http.RedirectHandler("/elsewhere", http.StatusTemporaryRedirect))
	server := httptest.NewServer(mux)
	defer server.Close()
	client := &http.Client{Transport: bounded{http.DefaultTransport}}
	for path, want := range map[string]error{
		"/v2/app/manifests/just": nil, "/v2/app/manifests/more": errTooLarge, "/v2/app/manifests/redirected": errTooLarge,
		"/v2/app/blobs/large": nil, "/v2/app/blobs/redirected": nil, "/elsewhere": errTooLarge,
	} {
		resp, err := client.Get(server.URL + path)
		if err != nil {
			t.Fatal(err)
		}
		n, err := io.Copy(io.Discard, resp.Body)
		resp.Body.Close()
		if !errors.Is(err, want) || err == nil && n < maxAnswer {
			t.Errorf("%s: %d bytes, %v, want %v", path, n, err, want)
		}
	}
	for _, size := range []int64{-1, maxAnswer + 1} {
		if err := checkConfigSize(size); err == nil || !strings.Contains(err.Error(), "config") {
			t.Errorf("a config of %d bytes gives %v", size, err)
		}
	}
	if err := checkConfigSize(maxAnswer); err != nil {
		t.Error(err)
	}
}
