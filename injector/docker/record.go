package docker

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
)

// record says what a generation registered. It is written before anything else
// and removed last, so that status and eject work without the disk, and after a
// run that was killed.
type record struct {
	CacheID digest.Digest `json:"cacheID"`
	Created time.Time     `json:"created"`
	// Overlay is the store's overlay2 directory on the disk, relative.
	Overlay string                          `json:"overlay"`
	Images  []recordImage                   `json:"images"`
	Layers  map[digest.Digest]recordedLayer `json:"layers"`
	// Metadata is the distribution metadata that was added.
	Metadata metadata `json:"metadata"`
}

type recordImage struct {
	ID     digest.Digest `json:"id"`
	Names  []string      `json:"names"` // familiar
	Layers int           `json:"layers"`
	// Added are those of Names that were not the image's before.
	Added []string `json:"added,omitempty"`
}

type recordedLayer struct {
	DiffID    digest.Digest `json:"diffID"`
	Directory string        `json:"directory"`
}

func (s store) stateDir() string { return s.image(stateName) }

func (s store) recordFile(id digest.Digest) string {
	return filepath.Join(s.stateDir(), id.Encoded()+".json")
}

// records reads the records of all generations, oldest first. One that cannot be read
// does not hide another: records may come together with an error.
func (s store) records() ([]*record, error) {
	entries, err := os.ReadDir(s.stateDir())
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("reading records: %w", err)
	}
	var rs []*record
	var errs []error
	for _, e := range entries {
		if !strings.HasSuffix(e.Name(), ".json") {
			continue
		}
		name := filepath.Join(s.stateDir(), e.Name())
		b, err := os.ReadFile(name)
		r := &record{}
		if err == nil {
			err = json.Unmarshal(b, r)
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("reading record %s: %w; run inject with its cache disk to write it again", name, err))
			continue
		}
		rs = append(rs, r)
	}
	slices.SortFunc(rs, func(a, b *record) int {
		if c := a.Created.Compare(b.Created); c != 0 {
			return c
		}
		return strings.Compare(a.CacheID.String(), b.CacheID.String())
	})
	return rs, errors.Join(errs...)
}

// knownRecords are those that can be read. A broken one must not stop inject, which is
// its remedy; what its generation named is taken for the node's until then.
func (r *Runtime) knownRecords() []*record {
	rs, err := r.records()
	if err != nil {
		r.opt.Log.Warn("what was registered is not fully known", "error", err)
	}
	return rs
}

// save adds r to what is recorded of its generation, one of known, and writes that if it
// changed.
func (s store) save(r *record, known []*record) error {
	for _, old := range known {
		if old.CacheID == r.CacheID && !r.adds(old) {
			return nil
		}
	}
	return s.replace(r)
}

// adds takes over what was recorded of the generation before, and says if there is more.
func (r *record) adds(old *record) bool {
	for _, img := range old.Images {
		r.added(img.ID, img.Added)
	}
	all := newMetadata()
	all.merge(old.Metadata)
	all.merge(r.Metadata)
	r.Metadata = all
	return !reflect.DeepEqual(r.normal(), old.normal())
}

// replace writes r, whatever was recorded before.
func (s store) replace(r *record) error {
	b, err := json.MarshalIndent(r.normal(), "", "  ")
	if err != nil {
		return fmt.Errorf("writing record: %w", err)
	}
	if err := os.MkdirAll(s.stateDir(), 0o700); err != nil {
		return fmt.Errorf("writing record: %w", err)
	}
	if err := writeDurable(s.recordFile(r.CacheID), append(b, '\n'), 0o600); err != nil {
		return fmt.Errorf("writing record: %w", err)
	}
	return nil
}

// normal is r as it is after being written and read: in order, without empty maps.
func (r *record) normal() *record {
	c := *r
	c.Created = c.Created.UTC().Truncate(time.Second)
	c.Images = slices.Clone(r.Images)
	for i := range c.Images {
		img := &c.Images[i]
		img.Names, img.Added = slices.Sorted(slices.Values(img.Names)), slices.Sorted(slices.Values(img.Added))
	}
	slices.SortFunc(c.Images, func(a, b recordImage) int { return strings.Compare(a.ID.String(), b.ID.String()) })
	c.Metadata = metadata{}
	c.Metadata.merge(r.Metadata)
	for _, sources := range c.Metadata.Sources {
		slices.SortFunc(sources, func(a, b blobSource) int {
			return strings.Compare(a.Digest.String()+a.SourceRepository, b.Digest.String()+b.SourceRepository)
		})
	}
	return &c
}

// image is what is recorded of an image, nil if it is none of this generation.
func (r *record) image(id digest.Digest) *recordImage {
	for i := range r.Images {
		if r.Images[i].ID == id {
			return &r.Images[i]
		}
	}
	return nil
}

// added notes names that were given to an image.
func (r *record) added(id digest.Digest, names []string) {
	img := r.image(id)
	if img == nil {
		return
	}
	for _, n := range names {
		if !slices.Contains(img.Added, n) {
			img.Added = append(img.Added, n)
		}
	}
}
