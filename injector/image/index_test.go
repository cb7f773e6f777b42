package main

import (
	"archive/tar"
	"errors"
	"io"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/validate"
)

var (
	binaries = []binary{
		{v1.Platform{OS: "linux", Architecture: "amd64"}, []byte("amd64")},
		{v1.Platform{OS: "linux", Architecture: "arm64"}, []byte("arm64")},
	}
	from = source{version: "1.2.3", revision: "abc", created: time.Unix(1700000000, 0).UTC()}
)

func TestIndex(t *testing.T) {
	built, err := newIndex(binaries, from)
	if err != nil {
		t.Fatal(err)
	}
	index := written(t, built)
	if err := validate.Index(index); err != nil {
		t.Error(err)
	}
	m, err := index.IndexManifest()
	if err != nil {
		t.Fatal(err)
	}
	if m.Annotations["org.opencontainers.image.revision"] != "abc" {
		t.Errorf("annotations are %v", m.Annotations)
	}
	if len(m.Manifests) != len(binaries) {
		t.Fatalf("%d manifests, want %d", len(m.Manifests), len(binaries))
	}
	for i, b := range binaries {
		desc := m.Manifests[i]
		if !desc.Platform.Equals(b.platform) {
			t.Errorf("platform is %v, want %v", desc.Platform, b.platform)
		}
		img, err := index.Image(desc.Digest)
		if err != nil {
			t.Fatal(err)
		}
		config, err := img.ConfigFile()
		if err != nil {
			t.Fatal(err)
		}
		if config.Architecture != b.platform.Architecture || config.OS != "linux" {
			t.Errorf("the config is for %s/%s, want %v", config.OS, config.Architecture, b.platform)
		}
		c := config.Config
		if diff := cmp.Diff([]string{program, "run"}, append(c.Entrypoint, c.Cmd...)); diff != "" {
			t.Errorf("command (-want +got):\n%s", diff)
		}
		if c.User != "0:0" || c.Labels["org.opencontainers.image.version"] != "1.2.3" {
			t.Errorf("user %q, labels %v", c.User, c.Labels)
		}
		if diff := cmp.Diff(map[string]string{program: string(b.contents)}, files(t, img)); diff != "" {
			t.Errorf("files (-want +got):\n%s", diff)
		}
	}
}

// written is an index as it is read from an OCI layout that has it alone.
func written(t *testing.T, index v1.ImageIndex) v1.ImageIndex {
	t.Helper()
	dir := filepath.Join(t.TempDir(), "layout")
	for range 2 { // the second replaces the first
		if err := writeLayout(dir, index); err != nil {
			t.Fatal(err)
		}
	}
	all, err := layout.ImageIndexFromPath(dir)
	if err != nil {
		t.Fatal(err)
	}
	m, err := all.IndexManifest()
	if err != nil {
		t.Fatal(err)
	}
	if len(m.Manifests) != 1 {
		t.Fatalf("the layout has %d entries, want 1", len(m.Manifests))
	}
	index, err = all.ImageIndex(m.Manifests[0].Digest)
	if err != nil {
		t.Fatal(err)
	}
	return index
}

func TestWriteLayoutKeepsOthers(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "precious")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := writeLayout(dir, empty.Index); err == nil {
		t.Error("a directory with something else in it was replaced")
	}
	if _, err := os.Stat(file); err != nil {
		t.Error(err)
	}
}

// files are the regular files of an image by their absolute paths.
func files(t *testing.T, img v1.Image) map[string]string {
	t.Helper()
	rc := mutate.Extract(img)
	defer rc.Close()
	out := map[string]string{}
	r := tar.NewReader(rc)
	for {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return out
		}
		if err != nil {
			t.Fatal(err)
		}
		if !h.ModTime.Equal(from.created) || h.Mode != 0o755 || h.Uid != 0 || h.Gid != 0 {
			t.Errorf("%s: %+v", h.Name, h)
		}
		if h.Typeflag == tar.TypeDir {
			continue
		}
		data, err := io.ReadAll(r)
		if err != nil {
			t.Fatal(err)
		}
		out["/"+h.Name] = string(data)
	}
}

func TestSameDigest(t *testing.T) {
	digest := func(from source) v1.Hash {
		index, err := newIndex(binaries, from)
		if err != nil {
			t.Fatal(err)
		}
		d, err := index.Digest()
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	if a, b := digest(from), digest(from); a != b {
		t.Errorf("the same source gave %s and %s", a, b)
	}
	other := from
	other.revision = "def"
	if digest(from) == digest(other) {
		t.Error("another commit gave the same digest")
	}
}
