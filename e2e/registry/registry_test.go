package registry_test

import (
	"fmt"
	"io"
	"net/http"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/validate"

	"github.com/selkies-project/packer-plugin-selkies/e2e/registry"
)

func push(t *testing.T, reference string, options ...remote.Option) (name.Reference, v1.Image) {
	t.Helper()
	image, err := random.Image(10000, 3)
	if err != nil {
		t.Fatal(err)
	}
	ref, err := name.ParseReference(reference)
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Write(ref, image, options...); err != nil {
		t.Fatal(err)
	}
	return ref, image
}

func TestCount(t *testing.T) {
	r := registry.New(t, registry.Config{})
	ref, image := push(t, r.Addr+"/some/image:tag")
	r.Reset()

	got, err := remote.Image(ref)
	if err != nil {
		t.Fatal(err)
	}
	if err := validate.Image(got); err != nil {
		t.Fatal(err)
	}
	if _, err := remote.Head(ref); err != nil {
		t.Fatal(err)
	}
	var want registry.Count
	layers, err := image.Layers()
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range layers {
		size, err := l.Size()
		if err != nil {
			t.Fatal(err)
		}
		want.BlobBytes += size
	}
	config, err := image.RawConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	manifest, err := image.RawManifest()
	if err != nil {
		t.Fatal(err)
	}
	count := r.Count()
	// A validation reads every layer more than once.
	if count.ManifestGets != 1 || count.ManifestHeads != 1 || count.ManifestBytes != int64(len(manifest)) {
		t.Errorf("manifests: %+v", count)
	}
	if n := int64(count.BlobGets-1) / 3; (count.BlobGets-1)%3 != 0 || count.BlobBytes != n*want.BlobBytes+int64(len(config)) {
		t.Errorf("blobs: %+v, want %d bytes and a config of %d", count, want.BlobBytes, len(config))
	}
	slices.Sort(count.Blobs)
	if n := len(slices.Compact(count.Blobs)); n != 4 {
		t.Errorf("%d different blobs, want 4", n)
	}
	r.Reset()
	if diff := cmp.Diff(registry.Count{}, r.Count()); diff != "" {
		t.Errorf("after Reset: %s", diff)
	}
}

// firstBlob is an image's base layer.
func firstBlob(t *testing.T, image v1.Image) (v1.Hash, []byte) {
	t.Helper()
	layers, err := image.Layers()
	if err != nil {
		t.Fatal(err)
	}
	digest, err := layers[0].Digest()
	if err != nil {
		t.Fatal(err)
	}
	rc, err := layers[0].Compressed()
	if err != nil {
		t.Fatal(err)
	}
	blob, err := io.ReadAll(rc)
	if err != nil {
		t.Fatal(err)
	}
	return digest, blob
}

func TestRanges(t *testing.T) {
	r := registry.New(t, registry.Config{})
	_, image := push(t, r.Addr+"/image:tag")
	digest, blob := firstBlob(t, image)
	size := len(blob)
	tests := []struct {
		header     string
		status     int
		start, end int
	}{
		{"", http.StatusOK, 0, size},
		{"bytes=0-", http.StatusPartialContent, 0, size},
		{"bytes=100-", http.StatusPartialContent, 100, size},
		{"bytes=100-199", http.StatusPartialContent, 100, 200},
	}
	for _, tt := range tests {
		t.Run(tt.header, func(t *testing.T) {
			r.Reset()
			req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, fmt.Sprintf("http://%s/v2/image/blobs/%s", r.Addr, digest), nil)
			if err != nil {
				t.Fatal(err)
			}
			if tt.header != "" {
				req.Header.Set("Range", tt.header)
			}
			resp, err := http.DefaultClient.Do(req)
			if err != nil {
				t.Fatal(err)
			}
			defer resp.Body.Close()
			body, err := io.ReadAll(resp.Body)
			if err != nil {
				t.Fatal(err)
			}
			if resp.StatusCode != tt.status || string(body) != string(blob[tt.start:tt.end]) {
				t.Errorf("status %s, %d bytes, want %d, %d bytes", resp.Status, len(body), tt.status, tt.end-tt.start)
			}
			if n := r.Count().BlobBytes; n != int64(tt.end-tt.start) {
				t.Errorf("counted %d bytes", n)
			}
			if n := r.Count().BlobGets; n != 1 {
				t.Errorf("counted %d requests", n)
			}
		})
	}
}

func TestStopAndStart(t *testing.T) {
	r := registry.New(t, registry.Config{})
	ref, _ := push(t, r.Addr+"/image:tag")
	if err := r.Stop(); err != nil {
		t.Fatal(err)
	}
	if _, err := remote.Head(ref, remote.WithRetryPredicate(func(error) bool { return false })); err == nil {
		t.Error("a stopped registry answers")
	}
	if err := r.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := remote.Head(ref); err != nil {
		t.Error(err)
	}
}

func TestCredentials(t *testing.T) {
	r := registry.New(t, registry.Config{Username: "user", Password: "secret"})
	auth := remote.WithAuth(&authn.Basic{Username: "user", Password: "secret"})
	ref, _ := push(t, r.Addr+"/image:tag", auth)
	if _, err := remote.Get(ref); err == nil {
		t.Error("served without credentials")
	}
	if _, err := remote.Get(ref, remote.WithAuth(&authn.Basic{Username: "user", Password: "wrong"})); err == nil {
		t.Error("served with a wrong password")
	}
	if r.Count().Unauthorized < 2 {
		t.Errorf("counted %+v", r.Count())
	}
	if _, err := remote.Get(ref, auth); err != nil {
		t.Error(err)
	}
}

// TestTokens has clients get a token for a password and for an identity token.
func TestTokens(t *testing.T) {
	r := registry.New(t, registry.Config{Username: "robot", Password: "secret", Tokens: true})
	good := remote.WithAuth(&authn.Basic{Username: "robot", Password: "secret"})
	ref, _ := push(t, r.Addr+"/some/image:tag", good)
	for name, c := range map[string]struct {
		auth remote.Option
		want bool
	}{
		"password":             {good, true},
		"identity token":       {remote.WithAuth(authn.FromConfig(authn.AuthConfig{IdentityToken: "secret-2"})), true},
		"wrong password":       {remote.WithAuth(&authn.Basic{Username: "robot", Password: "secret-2"}), false},
		"wrong identity token": {remote.WithAuth(authn.FromConfig(authn.AuthConfig{IdentityToken: "other"})), false},
		"nothing":              {remote.WithAuth(authn.Anonymous), false},
	} {
		before := len(r.Tokens())
		if _, err := remote.Get(ref, c.auth); (err == nil) != c.want || (len(r.Tokens()) > before) != c.want {
			t.Errorf("%s: %v, tokens %q", name, err, r.Tokens()[before:])
		}
	}
}
