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
	// get ends what does not end by itself a moment after so many bytes have come.
	get := func(endless int) (status int, got v1.Hash, n int, err error) {
		ctx, cancel := context.WithCancel(t.Context())
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
		var body bytes.Buffer
		if endless > 0 {
			if _, err := io.CopyN(&body, resp.Body, int64(endless)); err != nil {
				return resp.StatusCode, got, body.Len(), err
			}
			time.AfterFunc(50*time.Millisecond, cancel)
		}
		_, err = io.Copy(&body, resp.Body)
		got, _, hash := v1.SHA256(bytes.NewReader(body.Bytes()))
		if hash != nil {
			t.Fatal(hash)
		}
		return resp.StatusCode, got, body.Len(), err
	}
	for _, tt := range []struct {
		fault   registry.Fault
		endless int
		ok      func(status int, got v1.Hash, n int, err error) bool
	}{
		{registry.Drop, 0, func(_ int, _ v1.Hash, n int, err error) bool {
			return n == size/2 && errors.Is(err, io.ErrUnexpectedEOF)
		}},
		{registry.Corrupt, 0, func(status int, got v1.Hash, n int, err error) bool {
			return status == 200 && got != digest && n == size && err == nil
		}},
		{registry.Busy, 0, func(status int, _ v1.Hash, _ int, _ error) bool { return status == 429 }},
		{registry.Stall, size / 2, func(_ int, _ v1.Hash, n int, err error) bool {
			return n == size/2 && errors.Is(err, context.Canceled)
		}},
		{registry.Bomb, 20 * size, func(_ int, _ v1.Hash, n int, err error) bool {
			return n >= 20*size && errors.Is(err, context.Canceled)
		}},
		{"", 0, func(status int, got v1.Hash, _ int, err error) bool {
			return status == 200 && got == digest && err == nil
		}},
	} {
		r.Disturb(func(*http.Request) registry.Fault { return tt.fault })
		if status, got, n, err := get(tt.endless); !tt.ok(status, got, n, err) {
			t.Errorf("with %q: status %d, %d of %d bytes, digest %s: %v", tt.fault, status, n, size, got, err)
		}
	}
	r.Disturb(nil)
	if _, got, _, err := get(0); err != nil || got != digest {
		t.Errorf("undisturbed: digest %s: %v", got, err)
	}
}
