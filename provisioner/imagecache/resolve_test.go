package imagecache

import (
	"encoding/json"
	"strings"
	"testing"

	"github.com/containerd/platforms"
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
