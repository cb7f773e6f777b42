package imagecache

import (
	"testing"
	"time"

	"github.com/docker/docker/api/types/image"
	"github.com/docker/docker/api/types/storage"
	"github.com/google/go-cmp/cmp"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/selkies-project/packer-plugin-selkies/manifest"
)

// What Docker 20.10.24 answers for an image of three layers, shortened.
func inspected() image.InspectResponse {
	const home = "/mnt/cache/docker/overlay2/"
	return image.InspectResponse{
		GraphDriver: storage.DriverData{Name: "overlay2", Data: map[string]string{
			"LowerDir":  home + "b3f2/diff:" + home + "a17c/diff",
			"MergedDir": home + "c90d/merged",
			"UpperDir":  home + "c90d/diff",
			"WorkDir":   home + "c90d/work",
		}},
		RootFS: image.RootFS{Type: "layers", Layers: []string{"sha256:1", "sha256:2", "sha256:3"}},
	}
}

func TestLayerDirectories(t *testing.T) {
	dirs, err := layerDirectories(inspected(), "/mnt/cache/docker/overlay2")
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"a17c", "b3f2", "c90d"}, dirs); diff != "" {
		t.Error(diff)
	}
	if _, err := layerDirectories(inspected(), "/var/lib/docker/overlay2"); err == nil {
		t.Error("took directories of another store")
	}
	if dirs, err := layerDirectories(image.InspectResponse{}, "/"); err != nil || len(dirs) != 0 {
		t.Errorf("image without layers: %v, %v", dirs, err)
	}
}

func TestLayerSizes(t *testing.T) {
	history := func(sizes ...int64) (h []image.HistoryResponseItem) {
		for _, s := range sizes {
			h = append(h, image.HistoryResponseItem{Size: s})
		}
		return h
	}
	config := func(empty ...bool) (h []ocispec.History) {
		for _, e := range empty {
			h = append(h, ocispec.History{EmptyLayer: e})
		}
		return h
	}
	tests := []struct {
		name    string
		config  []ocispec.History
		history []image.HistoryResponseItem
		n       int
		want    []int64
	}{
		{"entries without a layer", config(false, false, true, false, true), history(0, 30, 0, 20, 10), 3, []int64{10, 20, 30}},
		{"an empty layer", config(false, false, true, false), history(30, 0, 0, 10), 3, []int64{10, 0, 30}},
		{"no history", nil, nil, 2, []int64{0, 40}},
		{"history of another length", config(false), history(30, 10), 2, []int64{0, 40}},
		{"no layer", nil, nil, 0, []int64{}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if diff := cmp.Diff(tt.want, layerSizes(tt.config, tt.history, tt.n, 40)); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// TestCreated has a generation come after the one before by any clock.
func TestCreated(t *testing.T) {
	before := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	later := before.Add(time.Second)
	for now, want := range map[time.Time]time.Time{
		before.AddDate(0, 0, -1): later,
		before:                   later,
		before.AddDate(0, 0, 1):  before.AddDate(0, 0, 1),
	} {
		b := &build{earlier: &manifest.Manifest{Created: before}}
		if got := b.created(now); got != want {
			t.Errorf("at %v it is %v, want %v", now, got, want)
		}
	}
	if got := new(build).created(before); got != before {
		t.Errorf("the first is of %v, want %v", got, before)
	}
}
