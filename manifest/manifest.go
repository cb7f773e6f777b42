// Package manifest is the layer manifest: the JSON file at the root of a cache
// disk that says which images and layers the disk holds and where. The
// provisioner writes it, the injector reads it, and nothing else passes between
// the two. docs/layer-manifest.md describes the format,
// docs/layer-manifest.schema.json is its JSON Schema.
package manifest

import (
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

const (
	// SchemaVersion is the only schema version that this package reads and writes.
	SchemaVersion = 1

	// Dir is the directory of the cache's own files, relative to the disk's root.
	Dir = "selkies-image-cache"

	// Path is the layer manifest's path relative to the disk's root.
	Path = Dir + "/manifest.json"

	// BlobsDir is where a cache that keeps layer blobs has them, relative to the
	// disk's root: BlobsDir/<algorithm>/<encoded>, as in an OCI image layout.
	BlobsDir = Dir + "/blobs"

	// DriverOverlay2 is the only storage driver whose layers can be registered.
	DriverOverlay2 = "overlay2"
)

// Manifest describes one generation of a cache disk.
type Manifest struct {
	SchemaVersion int              `json:"schemaVersion"`
	Platform      ocispec.Platform `json:"platform"`
	// Created is when this generation was recorded, in UTC, to the second.
	Created time.Time `json:"created"`
	// Tool names the program that wrote the manifest, with its version.
	Tool   string  `json:"tool"`
	Store  Store   `json:"store"`
	Images []Image `json:"images"`
	Layers []Layer `json:"layers"`
}

// Store says where the Docker store is and what wrote it.
type Store struct {
	Driver string `json:"driver"`
	// Root is Docker's data root as a slash-separated path relative to the disk's
	// root: "docker" on a disk of its own, "var/lib/docker" on a boot disk.
	Root          string `json:"root"`
	EngineVersion string `json:"engineVersion"`
	// Blobs is true if the compressed layer blobs lie in BlobsDir.
	Blobs bool `json:"blobs,omitempty"`
}

// Image is one image manifest of the registry and every name it goes by.
//
// The descriptors are the registry's own, with the bytes inlined in Data.
type Image struct {
	// Names are normalised references, "docker.io/library/debian:12" and
	// "docker.io/library/debian@sha256:...", sorted, each in one image only.
	Names []string `json:"names"`
	// Index is the index that the names resolve to; nil if they resolve to the
	// image manifest itself.
	Index    *ocispec.Descriptor `json:"index,omitempty"`
	Manifest ocispec.Descriptor  `json:"manifest"`
	Config   ocispec.Descriptor  `json:"config"`
}

// Layer is one layer of the Docker store.
type Layer struct {
	ChainID digest.Digest `json:"chainID"`
	DiffID  digest.Digest `json:"diffID"`
	// Parent is the chain ID of the layer below, empty for a base layer.
	Parent digest.Digest `json:"parent,omitempty"`
	// Directory is the layer's directory in <store root>/overlay2, one path element.
	Directory string `json:"directory"`
	// Size is the number of bytes of the layer's files, as the engine counts them.
	Size int64 `json:"size"`
}
