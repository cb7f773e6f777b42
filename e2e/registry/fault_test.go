package registry_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"net/http"
	"testing"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/selkies-project/packer-plugin-selkies/e2e/registry"
)

// TestDisturb fetches a blob that comes in every wrong way.
func TestDisturb(t *testing.T) {
	r := registry.New(t, registry.Config{})
	_, image := push(t, r.Addr+"/some/image:tag")
	digest, blob := firstBlob(t, image)
	size := len(blob)
	get := func() (status int, got v1.Hash, n int, err error) {
		ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
		defer cancel()
		req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+r.Addr+"/v2/some/image/blobs/"+digest.String(), nil)
		if err != nil {
			t.Fatal(err)
		}
		resp, err := http.DefaultClient.Do(req)
		if err != nil {
			return 0, v1.Hash{}, 0, err
		}
		defer resp.Body.Close()
		body, err := io.ReadAll(resp.Body)
		got, _, hash := v1.SHA256(bytes.NewReader(body))
		if hash != nil {
			t.Fatal(hash)
		}
		return resp.StatusCode, got, len(body), err
	}
	for fault, ok := range map[registry.Fault]func(status int, got v1.Hash, n int, err error) bool{
		"": func(status int, got v1.Hash, _ int, err error) bool {
			return status == 200 && got == digest && err == nil
		},
		registry.Drop: func(_ int, _ v1.Hash, n int, err error) bool {
			return n == size/2 && errors.Is(err, io.ErrUnexpectedEOF)
		},
		registry.Corrupt: func(status int, got v1.Hash, n int, err error) bool {
			return status == 200 && got != digest && n == size && err == nil
		},
		registry.Busy: func(status int, _ v1.Hash, _ int, _ error) bool { return status == 429 },
		registry.Stall: func(_ int, _ v1.Hash, n int, err error) bool {
			return n == size/2 && errors.Is(err, context.DeadlineExceeded)
		},
	} {
		r.Disturb(func(*http.Request) registry.Fault { return fault })
		if status, got, n, err := get(); !ok(status, got, n, err) {
			t.Errorf("with %q: status %d, %d of %d bytes, digest %s: %v", fault, status, n, size, got, err)
		}
	}
	r.Disturb(func(*http.Request) registry.Fault { return registry.Bomb })
	if _, _, n, err := get(); n < 20*size || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("a bomb has %d bytes in the place of %d: %v", n, size, err)
	}
	r.Disturb(nil)
	if _, got, _, err := get(); err != nil || got != digest {
		t.Errorf("undisturbed: digest %s: %v", got, err)
	}
}
