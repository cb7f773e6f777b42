package htmlreport

import (
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/selkies-project/packer-plugin-selkies/manifest"
)

// change is what became of an image since the generation before.
type change struct {
	Kind changeKind
	// Was is the digest that the image's tag led to.
	Was digest.Digest
	// Bytes of its layers are new.
	Bytes int64
}

type changeKind string

const (
	added   changeKind = "new"
	updated changeKind = "updated"
	kept    changeKind = "same"
)

// changes are those between two generations.
type changes struct {
	Short   string
	Created time.Time
	// Same is true of one and the same generation.
	Same bool
	// Images that have come, that have another digest under their tag, and that are as
	// they were.
	Added, Updated, Kept  int
	Removed               []removed
	NewLayers, GoneLayers amount
	KeptLayers            amount
}

type removed struct {
	Title string
	Size  int64
}

// compare marks what is new in v and says what is no more.
func (v *view) compare(m, since *manifest.Manifest) (*changes, error) {
	id, err := since.ID()
	if err != nil {
		return nil, err
	}
	c := &changes{Short: short(id), Created: since.Created.UTC(), Same: id.String() == v.ID}
	former := make(map[digest.Digest]int64, len(since.Layers))
	for _, l := range since.Layers {
		former[l.ChainID] = l.Size
	}
	now := make(map[digest.Digest]bool, len(v.Layers))
	for i := range v.Layers {
		l := &v.Layers[i]
		now[l.ChainID] = true
		if _, ok := former[l.ChainID]; ok {
			c.KeptLayers.add(l.Size)
			continue
		}
		l.New = true
		c.NewLayers.add(l.Size)
		for _, n := range l.Images {
			v.Images[n].Change.Bytes += l.Size
		}
	}
	for chain, size := range former {
		if !now[chain] {
			c.GoneLayers.add(size)
		}
	}
	c.compareImages(v, m, since)
	is := targets(m)
	for _, img := range since.Images {
		// Under one of its tags another may be there.
		if slices.ContainsFunc(img.Names, func(n string) bool { return is[n] != "" }) {
			continue
		}
		size, err := imageSize(img, former)
		if err != nil {
			return nil, err
		}
		name, _ := title(img.Names)
		c.Removed = append(c.Removed, removed{name, size})
	}
	return c, nil
}

// compareImages tells new images from those that their tag led to another of before.
func (c *changes) compareImages(v *view, m, since *manifest.Manifest) {
	was := targets(since)
	for i := range v.Images {
		row := &v.Images[i]
		row.Change.Kind = added
		for _, name := range m.Images[row.number].Names {
			d, ok := was[name]
			switch {
			case ok && d == row.Target:
				row.Change.Kind = kept
			case ok && row.Change.Kind == added:
				row.Change.Kind, row.Change.Was = updated, d
			}
		}
		switch row.Change.Kind {
		case added:
			c.Added++
		case updated:
			c.Updated++
		default:
			row.Change.Was = ""
			c.Kept++
		}
	}
}

// targets are the digests that names resolve to.
func targets(m *manifest.Manifest) map[string]digest.Digest {
	t := map[string]digest.Digest{}
	for _, img := range m.Images {
		for _, name := range img.Names {
			t[name] = img.Target().Digest
		}
	}
	return t
}

func imageSize(img manifest.Image, layers map[digest.Digest]int64) (size int64, err error) {
	chain, err := img.ChainIDs()
	if err != nil {
		return 0, err
	}
	for _, c := range chain {
		size += layers[c]
	}
	return size, nil
}

// Sentence says it all in one.
func (c *changes) Sentence() string {
	parts := []string{
		count(c.Added, "image is new", "images are new"),
		count(c.Updated, "has been updated", "have been updated"),
		count(len(c.Removed), "is gone", "are gone"),
		count(c.Kept, "is as it was", "are as they were"),
	}
	return strings.Join(parts[:3], ", ") + " and " + parts[3]
}
