package images_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/validate"

	"github.com/selkies-project/packer-plugin-selkies/e2e/images"
	"github.com/selkies-project/packer-plugin-selkies/e2e/registry"
)

func TestCatalogue(t *testing.T) {
	busybox := filepath.Join(t.TempDir(), "busybox")
	if err := os.WriteFile(busybox, []byte("a program"), 0o755); err != nil {
		t.Fatal(err)
	}
	all, err := images.Catalogue(busybox)
	if err != nil {
		t.Fatal(err)
	}
	r := registry.New(t, registry.Config{})
	refs, err := images.Push(t.Context(), r.Addr, all)
	if err != nil {
		t.Fatal(err)
	}
	if len(refs) != len(all)+1 {
		t.Errorf("%d references of %d images, one of which has two tags", len(refs), len(all))
	}
	for _, s := range refs {
		t.Run(s, func(t *testing.T) {
			ref, err := name.ParseReference(s)
			if err != nil {
				t.Fatal(err)
			}
			image, err := remote.Image(ref, remote.WithPlatform(v1.Platform{OS: "linux", Architecture: "amd64"}))
			if err != nil {
				t.Fatal(err)
			}
			var options []validate.Option
			if strings.Contains(s, "zstd") {
				options = append(options, validate.Fast) // the full one knows gzip only
			}
			if err := validate.Image(image, options...); err != nil {
				t.Error(err)
			}
		})
	}

	again, err := images.Catalogue(busybox)
	if err != nil {
		t.Fatal(err)
	}
	for i := range all {
		want, err := all[i].Digest()
		if err != nil {
			t.Fatal(err)
		}
		if got, err := again[i].Digest(); err != nil || got != want {
			t.Errorf("%s: made twice it is %s and %s, %v", all[i].Repository, want, got, err)
		}
	}
}
