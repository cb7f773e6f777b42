// Package trace is the access trace of an image: which parts of its files a start reads,
// in the order of first use. The provisioner records one on the build VM and stores it
// beside the layer manifest; on a node the injector reads the parts ahead. A trace is only
// advice: without it, or with a wrong one, a start takes longer. docs/read-ahead.md
// describes the format.
package trace

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"math"

	"github.com/opencontainers/go-digest"

	"github.com/selkies-project/packer-plugin-selkies/manifest"
)

const (
	// SchemaVersion is the only schema version that this package reads and writes.
	SchemaVersion = 1

	// Dir is where a cache disk has its traces, relative to the disk's root.
	Dir = manifest.Dir + "/traces"

	// MaxSize bounds a trace's encoding, in bytes. That of a browser's start has 40 kB.
	MaxSize = 4 << 20

	maxFiles  = 20_000
	maxRanges = 100_000
)

// Trace is what the start of one image reads.
type Trace struct {
	SchemaVersion int `json:"schemaVersion"`
	// Image is the digest of the image's config, which fixes its layers.
	Image digest.Digest `json:"image"`
	// Command is what the container ran, empty for the image's own, and Seconds for how
	// long it was watched.
	Command []string `json:"command,omitempty"`
	Seconds int      `json:"seconds"`
	Files   []File   `json:"files"`
	// Ranges are in the order of first use.
	Ranges []Range `json:"ranges"`
}

// File is a regular file of a layer.
type File struct {
	// Layer is the layer's place in the image's chain, 0 for the base layer.
	Layer int `json:"layer"`
	// Path is slash-separated and relative to the layer's root.
	Path string `json:"path"`
}

// Range is a part of a file. In JSON it is an array of the three.
type Range struct {
	File           int // index in Files
	Offset, Length int64
}

// MarshalJSON writes the array.
func (r Range) MarshalJSON() ([]byte, error) {
	return json.Marshal([3]int64{int64(r.File), r.Offset, r.Length})
}

// UnmarshalJSON reads the array.
func (r *Range) UnmarshalJSON(data []byte) error {
	var a [3]int64
	if err := json.Unmarshal(data, &a); err != nil {
		return err
	}
	if a[0] < 0 || a[0] > maxFiles {
		return fmt.Errorf("range of file %d", a[0])
	}
	*r = Range{File: int(a[0]), Offset: a[1], Length: a[2]}
	return nil
}

// Path is where a cache disk has the trace of the image whose config has the digest,
// relative to the disk's root.
func Path(image digest.Digest) string { return Dir + "/" + image.Encoded() + ".json" }

// Bytes is the length of all ranges together.
func (t *Trace) Bytes() (n int64) {
	for _, r := range t.Ranges {
		n += r.Length
	}
	return n
}

// Decode decodes and validates a trace. It is data from elsewhere.
func Decode(data []byte) (*Trace, error) {
	if len(data) > MaxSize {
		return nil, fmt.Errorf("access trace of %d bytes, more than %d", len(data), MaxSize)
	}
	// Another version's may not look like this one's.
	var v struct {
		SchemaVersion int `json:"schemaVersion"`
	}
	if err := json.Unmarshal(data, &v); err != nil {
		return nil, fmt.Errorf("not an access trace, or truncated: %w", err)
	}
	if v.SchemaVersion != SchemaVersion {
		return nil, fmt.Errorf("access trace: schemaVersion is %d, this version reads %d", v.SchemaVersion, SchemaVersion)
	}
	var t Trace
	if err := json.Unmarshal(data, &t); err != nil {
		return nil, fmt.Errorf("access trace: %w", err)
	}
	if err := t.Validate(); err != nil {
		return nil, fmt.Errorf("access trace: %w", err)
	}
	return &t, nil
}

// Encode gives equal bytes for equal traces.
func (t *Trace) Encode() ([]byte, error) {
	if err := t.Validate(); err != nil {
		return nil, fmt.Errorf("encoding access trace: %w", err)
	}
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	if err := e.Encode(t); err != nil {
		return nil, fmt.Errorf("encoding access trace: %w", err)
	}
	if b.Len() > MaxSize {
		return nil, fmt.Errorf("encoding access trace: %d bytes, nobody reads more than %d; watch for fewer seconds", b.Len(), MaxSize)
	}
	return b.Bytes(), nil
}

// Validate checks what can be checked without the disk.
func (t *Trace) Validate() error {
	if t.SchemaVersion != SchemaVersion {
		return fmt.Errorf("schemaVersion is %d, not %d", t.SchemaVersion, SchemaVersion)
	}
	if err := t.Image.Validate(); err != nil {
		return fmt.Errorf("image is %.100q: %w", t.Image.String(), err)
	}
	if t.Seconds < 0 {
		return fmt.Errorf("seconds is %d", t.Seconds)
	}
	if len(t.Files) > maxFiles || len(t.Ranges) > maxRanges {
		return fmt.Errorf("it has %d files and %d ranges, more than %d and %d; watch for fewer seconds",
			len(t.Files), len(t.Ranges), maxFiles, maxRanges)
	}
	known := make(map[File]bool, len(t.Files))
	for i, f := range t.Files {
		if f.Layer < 0 {
			return fmt.Errorf("files[%d]: layer is %d", i, f.Layer)
		}
		if err := manifest.ValidPath(f.Path); err != nil {
			return fmt.Errorf("files[%d]: path %w", i, err)
		}
		if known[f] {
			return fmt.Errorf("files[%d]: %.100q of layer %d is there twice", i, f.Path, f.Layer)
		}
		known[f] = true
	}
	var total int64
	for i, r := range t.Ranges {
		switch {
		case r.File < 0 || r.File >= len(t.Files):
			return fmt.Errorf("ranges[%d]: there is no file %d", i, r.File)
		case r.Offset < 0 || r.Length <= 0 || r.Offset > math.MaxInt64-r.Length:
			return fmt.Errorf("ranges[%d]: %d bytes at %d are no part of a file", i, r.Length, r.Offset)
		case r.Length > math.MaxInt64-total:
			return errors.New("its ranges are longer than any disk")
		}
		total += r.Length
	}
	return nil
}
