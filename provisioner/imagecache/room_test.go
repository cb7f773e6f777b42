package imagecache

import (
	"errors"
	"strings"
	"testing"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

func TestCheckRoom(t *testing.T) {
	tests := []struct {
		name                 string
		pull, room, unlisted int64
		keepBlobs, crowded   bool
		warning, fail        string
	}{
		{name: "nothing to pull", pull: 0, room: 0},
		{name: "fits unpacked", pull: 100e6, room: 300e6},
		{name: "may not fit", pull: 100e6, room: 299e6, warning: "it has room for 299MB, and what is to be pulled takes about 300MB"},
		{name: "just as compressed", pull: 100e6, room: 100e6, warning: "room for 100MB"},
		{name: "cannot fit", pull: 100e6, room: 99e6, fail: "the disk has room for 99MB, but what is to be pulled takes 100MB compressed, and more than that unpacked; use a larger disk, or list fewer images"},
		{name: "fits when unlisted images have gone", pull: 100e6, room: 100e6, unlisted: 200e6},
		{name: "fits only then", pull: 100e6, room: 99e6, unlisted: 201e6, crowded: true},
		{name: "may not fit even then", pull: 100e6, room: 50e6, unlisted: 50e6, crowded: true, warning: "room for 100MB (50MB of it held by images that are no longer listed), and what"},
		{name: "cannot fit even then", pull: 100e6, room: 49e6, unlisted: 50e6, fail: "the disk has room for 99MB (50MB of it held by images that are no longer listed), but what"},
		{name: "fits with blobs", pull: 100e6, room: 400e6, keepBlobs: true},
		{name: "may not fit with blobs", pull: 100e6, room: 399e6, keepBlobs: true, warning: "about 400MB"},
		{name: "cannot fit with blobs", pull: 100e6, room: 199e6, keepBlobs: true, fail: "the disk has room for 199MB, but what is to be pulled takes 100MB compressed, which keep_blobs keeps, and more than that unpacked;"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			crowded, warning, err := checkRoom(tt.pull, tt.room, tt.unlisted, tt.keepBlobs)
			if crowded != tt.crowded {
				t.Errorf("crowded is %t", crowded)
			}
			if !strings.Contains(warning, tt.warning) || tt.warning == "" && warning != "" {
				t.Errorf("warning is %q, want %q", warning, tt.warning)
			}
			if tt.fail == "" && err != nil || tt.fail != "" && (err == nil || !strings.Contains(err.Error(), tt.fail)) {
				t.Errorf("error is %v, want %q", err, tt.fail)
			}
		})
	}
}

// TestListed has an image that is listed, and references that cannot be had now.
func TestListed(t *testing.T) {
	const pinned = "@sha256:1111111111111111111111111111111111111111111111111111111111111111"
	refs := map[string]reference{}
	for _, s := range []string{"app:1", "down:1", "moved:1" + pinned, "only" + pinned} {
		ref, err := parseReference("images[0]", s)
		if err != nil {
			t.Fatal(err)
		}
		refs[s] = ref
	}
	w := &wanted{refs: []reference{refs["app:1"]}}
	w.image.Config = ocispec.Descriptor{Digest: digest.FromString("config")}
	down := errors.New("down")
	b := &build{images: []*wanted{w}, failures: []failure{{refs["down:1"], down}, {refs["moved:1"+pinned], down}, {refs["only"+pinned], down}}}
	const hub = "docker.io/library/"
	for _, tt := range []struct {
		name  string
		id    digest.Digest
		names []string
		want  bool
	}{
		{"listed", w.image.Config.Digest, []string{hub + "old:1"}, true},
		{"its tag has moved on", digest.FromString("other"), []string{hub + "app:1"}, false},
		{"cannot be had", digest.FromString("other"), []string{hub + "x:1", hub + "down:1"}, true},
		{"cannot be had by its digest", digest.FromString("other"), []string{hub + "only" + pinned}, true},
		{"cannot be had by tag and digest", digest.FromString("other"), []string{hub + "moved" + pinned}, true},
		{"unlisted", digest.FromString("other"), []string{hub + "down:2"}, false},
		{"without a name", digest.FromString("other"), nil, false},
	} {
		if got := b.listed()(tt.id.String(), tt.names); got != tt.want {
			t.Errorf("%s: %t", tt.name, got)
		}
	}
}
