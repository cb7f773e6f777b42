package imagecache

import (
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"github.com/selkies-project/packer-plugin-selkies/e2e/gcp"
)

// newRegistry starts a registry and returns the name of a repository in it.
func newRegistry(t *testing.T) string {
	t.Helper()
	s := httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
	t.Cleanup(s.Close)
	return strings.TrimPrefix(s.URL, "http://") + "/injector"
}

// image is an image without layers for a platform.
func image(t *testing.T, platform string) v1.Image {
	t.Helper()
	p, err := v1.ParsePlatform(platform)
	if err != nil {
		t.Fatal(err)
	}
	i, err := mutate.ConfigFile(empty.Image, &v1.ConfigFile{OS: p.OS, Architecture: p.Architecture})
	if err != nil {
		t.Fatal(err)
	}
	return i
}

// index is an image for several platforms.
func index(t *testing.T, platforms ...string) v1.ImageIndex {
	t.Helper()
	var children []mutate.IndexAddendum
	for _, p := range platforms {
		platform, err := v1.ParsePlatform(p)
		if err != nil {
			t.Fatal(err)
		}
		children = append(children, mutate.IndexAddendum{Add: image(t, p), Descriptor: v1.Descriptor{Platform: platform}})
	}
	return mutate.AppendManifests(empty.Index, children...)
}

// push pushes an image or an index and returns its digest.
func push(t *testing.T, ref string, what remote.Taggable) string {
	t.Helper()
	r, err := name.ParseReference(ref)
	if err != nil {
		t.Fatal(err)
	}
	if err := remote.Push(r, what); err != nil {
		t.Fatal(err)
	}
	desc, err := remote.Get(r)
	if err != nil {
		t.Fatal(err)
	}
	return desc.Digest.String()
}

func TestPinInjector(t *testing.T) {
	repository := newRegistry(t)
	both := push(t, repository+":both", index(t, "linux/amd64", "linux/arm64"))
	single := push(t, repository+":single", image(t, "linux/amd64"))
	inner := push(t, repository+":inner", mutate.AppendManifests(empty.Index, mutate.IndexAddendum{Add: index(t, "linux/amd64")}))
	push(t, repository+":arm", index(t, "linux/arm64"))
	push(t, repository+":single-arm", image(t, "linux/arm64"))
	refuses := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusForbidden) }))
	t.Cleanup(refuses.Close)
	private := strings.TrimPrefix(refuses.URL, "http://") + "/injector:1"

	tests := []struct {
		name, image, platform string
		want                  string // what the image becomes
		err                   string
	}{
		{"tag of an index", repository + ":both", "", repository + "@" + both, ""},
		{"other platform", repository + ":both", "linux/arm64", repository + "@" + both, ""},
		{"tag of an index in an index", repository + ":inner", "", repository + "@" + inner, ""},
		{"tag of an image", repository + ":single", "", repository + "@" + single, ""},
		{"digest", repository + "@" + single, "", repository + "@" + single, ""},
		{"no such tag", repository + ":none", "", "", "injector_image " + repository + ":none: the registry has no such image; make injector-image PUSH=... pushes it"},
		{"index without the platform", repository + ":arm", "", "", "injector_image " + repository + ":arm is for linux/arm64, not for platform linux/amd64; push it for that too, or set platform to what the nodes are"},
		{"image without the platform", repository + ":single-arm", "", "", "is for linux/arm64, not for platform linux/amd64"},
		{"refused", private, "", "", "the registry refuses it to Packer: "},
		{"no registry", "127.0.0.1:1/injector:1", "", "", "connection refused; Packer has to reach it, too"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := google(t, gcp.Config{})
			var p PostProcessor
			if err := p.Configure(options(s, "cluster_pattern", "^broker-", "injector_image", tt.image, "platform", tt.platform)); err != nil {
				t.Fatal(err)
			}
			r := &run{config: &p.config}
			err := r.pinInjector(t.Context())
			if tt.err != "" {
				if err == nil || !strings.Contains(err.Error(), tt.err) {
					t.Errorf("error is %v, want one with %q", err, tt.err)
				}
				return
			}
			if err != nil || p.config.InjectorImage != tt.want {
				t.Errorf("the image is %s, want %s: %v", p.config.InjectorImage, tt.want, err)
			}
		})
	}
}
