package imagecache

import (
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// TestTable has two images that share a layer, and one of a cache that has them all.
func TestTable(t *testing.T) {
	layered := func(ref string, layers ...int64) *wanted {
		r, err := parseReference("images[0]", ref)
		if err != nil {
			t.Fatal(err)
		}
		w := &wanted{refs: []reference{r}}
		for _, size := range layers {
			d := digest.FromString(time.Duration(size).String())
			w.blobs = append(w.blobs, ocispec.Descriptor{Digest: d, Size: size})
			w.chain = append(w.chain, d)
		}
		return w
	}
	images := []*wanted{layered("base:1", 100e6), layered("apps/desktop:1", 100e6, 20e6, 3e6), layered("other:1", 50e6, 5e6)}
	stored := map[digest.Digest]bool{images[0].chain[0]: true, images[2].chain[0]: true}
	want := []string{
		"IMAGE                      COMPRESSED   ON THE DISK   TO PULL",
		"base:1                     100MB        100MB         0B",
		"apps/desktop:1             123MB        100MB         23MB",
		"other:1                    55MB         50MB          5MB",
		"total, shared layers once  178MB        150MB         28MB",
	}
	for i, line := range pullProgress(images, stored, time.Time{}).table() {
		if diff := cmp.Diff(strings.Fields(want[i]), strings.Fields(line)); diff != "" {
			t.Error(diff)
		}
	}
}

func TestUnpacksZstd(t *testing.T) {
	for version, want := range map[string]bool{
		"20.10.24+dfsg1": false,
		"23.0.0":         true,
		"29.0.0-rc.1":    true,
		"library-import": true,
		"":               true,
	} {
		if got := unpacksZstd(version); got != want {
			t.Errorf("%s: %t", version, got)
		}
	}
}
