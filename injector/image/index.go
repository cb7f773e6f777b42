package main

import (
	"archive/tar"
	"bytes"
	"io"
	"path"
	"strings"
	"time"

	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// program is the only file of the image.
const program = "/usr/local/bin/selkies-image-injector"

// binary is the injector for one platform.
type binary struct {
	platform v1.Platform
	contents []byte
}

// source is what an image was built from.
type source struct {
	version string
	// revision is the commit, empty if unknown.
	revision string
	created  time.Time
}

// annotations are the same on the index, the manifests and, as labels, the configs.
func (s source) annotations() map[string]string {
	a := map[string]string{
		ocispec.AnnotationTitle:       "selkies-image-injector",
		ocispec.AnnotationDescription: "Makes the container images of a cache disk known to a node's container runtime",
		ocispec.AnnotationSource:      "https://github.com/selkies-project/packer-plugin-selkies",
		ocispec.AnnotationLicenses:    "Apache-2.0",
		ocispec.AnnotationVersion:     s.version,
		ocispec.AnnotationCreated:     s.created.Format(time.RFC3339),
	}
	if s.revision != "" {
		a[ocispec.AnnotationRevision] = s.revision
	}
	return a
}

func newIndex(binaries []binary, from source) (v1.ImageIndex, error) {
	index := mutate.IndexMediaType(empty.Index, types.OCIImageIndex)
	for _, b := range binaries {
		img, err := newImage(b, from)
		if err != nil {
			return nil, err
		}
		index = mutate.AppendManifests(index, mutate.IndexAddendum{
			Add:        img,
			Descriptor: v1.Descriptor{Platform: &b.platform},
		})
	}
	return mutate.Annotations(index, from.annotations()).(v1.ImageIndex), nil
}

func newImage(b binary, from source) (v1.Image, error) {
	layer, err := newLayer(b.contents, from.created)
	if err != nil {
		return nil, err
	}
	img := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	created := v1.Time{Time: from.created}
	img, err = mutate.Append(img, mutate.Addendum{
		Layer:   layer,
		History: v1.History{Created: created, CreatedBy: "COPY selkies-image-injector " + program},
	})
	if err != nil {
		return nil, err
	}
	config, err := img.ConfigFile()
	if err != nil {
		return nil, err
	}
	config = config.DeepCopy()
	config.Created = created
	config.OS, config.Architecture, config.Variant = b.platform.OS, b.platform.Architecture, b.platform.Variant
	config.Config = v1.Config{
		// The cache disk and the runtime's store are root's.
		User:       "0:0",
		Env:        []string{"PATH=" + path.Dir(program)},
		Entrypoint: []string{program},
		Cmd:        []string{"run"},
		WorkingDir: "/",
		Labels:     from.annotations(),
	}
	img, err = mutate.ConfigFile(img, config)
	if err != nil {
		return nil, err
	}
	return mutate.Annotations(img, from.annotations()).(v1.Image), nil
}

// newLayer holds the program and the directories above it.
func newLayer(contents []byte, modified time.Time) (v1.Layer, error) {
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	var dir string
	for _, element := range strings.Split(strings.Trim(path.Dir(program), "/"), "/") {
		dir += element + "/"
		if err := w.WriteHeader(&tar.Header{Typeflag: tar.TypeDir, Name: dir, Mode: 0o755, ModTime: modified}); err != nil {
			return nil, err
		}
	}
	err := w.WriteHeader(&tar.Header{
		Typeflag: tar.TypeReg, Name: strings.TrimPrefix(program, "/"), Mode: 0o755, Size: int64(len(contents)), ModTime: modified,
	})
	if err != nil {
		return nil, err
	}
	if _, err := w.Write(contents); err != nil {
		return nil, err
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return tarball.LayerFromOpener(func() (io.ReadCloser, error) {
		return io.NopCloser(bytes.NewReader(buf.Bytes())), nil
	}, tarball.WithMediaType(types.OCILayer))
}
