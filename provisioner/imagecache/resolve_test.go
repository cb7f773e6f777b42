package imagecache

import (
	"encoding/json"
	"io"
	"log"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/containerd/platforms"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/random"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

func TestChoose(t *testing.T) {
	index := func(entries ...string) []byte {
		var idx ocispec.Index
		for _, e := range entries {
			d := ocispec.Descriptor{Digest: digest.FromString(e)}
			if e != "none" {
				p := platforms.MustParse(strings.TrimSuffix(e, " again"))
				d.Platform = &p
			}
			idx.Manifests = append(idx.Manifests, d)
		}
		data, err := json.Marshal(idx)
		if err != nil {
			t.Fatal(err)
		}
		return data
	}
	tests := []struct {
		name, platform string
		index          []byte
		want           string
	}{
		{"exact", "linux/amd64", index("none", "linux/arm64", "linux/amd64"), "linux/amd64"},
		{"first of equal ones", "linux/amd64", index("linux/amd64", "linux/amd64 again"), "linux/amd64"},
		{"lower variant", "linux/arm/v7", index("linux/arm/v5", "linux/arm/v6"), "linux/arm/v6"},
		{"best variant", "linux/arm/v7", index("linux/arm/v6", "linux/arm/v7"), "linux/arm/v7"},
		{"missing", "linux/amd64", index("linux/arm64", "linux/riscv64"), ""},
		{"no platforms", "linux/amd64", index("none"), ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got, err := choose(tt.index, platforms.MustParse(tt.platform))
			if tt.want == "" {
				if err == nil || !strings.Contains(err.Error(), "not for platform linux/amd64; set platform") {
					t.Errorf("got %s, %v", got, err)
				}
				return
			}
			if err != nil || got != digest.FromString(tt.want) {
				t.Errorf("got %s, %v, want %s", got, err, tt.want)
			}
		})
	}
}

// TestTwoRegistries has one image in two registries, and under two tags of one.
func TestTwoRegistries(t *testing.T) {
	image, err := random.Image(100, 2)
	if err != nil {
		t.Fatal(err)
	}
	config, err := image.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	config = config.DeepCopy()
	config.OS, config.Architecture = "linux", "amd64"
	if image, err = mutate.ConfigFile(image, config); err != nil {
		t.Fatal(err)
	}
	digest, err := image.Digest()
	if err != nil {
		t.Fatal(err)
	}
	var refs []reference
	var hosts []string
	for range 2 {
		server := httptest.NewServer(registry.New(registry.Logger(log.New(io.Discard, "", 0))))
		defer server.Close()
		hosts = append(hosts, server.Listener.Addr().String())
		for _, tag := range []string{"1", "latest"} {
			s := server.Listener.Addr().String() + "/app:" + tag
			parsed, err := name.ParseReference(s)
			if err != nil {
				t.Fatal(err)
			}
			if err := remote.Write(parsed, image); err != nil {
				t.Fatal(err)
			}
			ref, err := parseReference(s, s)
			if err != nil {
				t.Fatal(err)
			}
			refs = append(refs, ref)
		}
	}
	r := &registries{keychain: authn.NewMultiKeychain()}
	images, failures, err := r.resolveAll(t.Context(), refs, platforms.MustParse("linux/amd64"), 2)
	if err != nil || len(failures) > 0 {
		t.Fatal(failures, err)
	}
	var pulls, names []string
	for _, w := range images {
		pulls = append(pulls, w.pullRef())
	}
	for _, h := range hosts {
		names = append(names, h+"/app:1", h+"/app:latest", h+"/app@"+digest.String())
	}
	if diff := cmp.Diff([]string{names[2], names[5]}, pulls); diff != "" {
		t.Errorf("pulls: %s", diff)
	}
	merged := merge(images)
	if len(merged) != 1 {
		t.Fatalf("recorded %d images", len(merged))
	}
	if diff := cmp.Diff(names, merged[0].Names); diff != "" {
		t.Errorf("names: %s", diff)
	}
}
