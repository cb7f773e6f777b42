package htmlreport

import (
	"cmp"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/selkies-project/packer-plugin-selkies/manifest"
)

// view is the page in its own words.
type view struct {
	ID, Short, Tool, Engine, Platform, Store string

	Created    time.Time
	Size       int64 // of the layers, each once
	Saved      int64 // what the images would take more, each by itself
	Compressed int64 // of the layers in the registry, each once
	Images     []imageRow
	Layers     []layerRow
	Again      amount // layers with the files of another one

	Changes *changes
	NoSince string
	Room    *room
	NoDisk  string
	Pulled  bool
	NoPulls string

	Picture picture
}

type amount struct {
	Count int
	Size  int64
}

func (a *amount) add(size int64) { a.Count, a.Size = a.Count+1, a.Size+size }

type imageRow struct {
	Title  string
	Names  []string // all others
	Target digest.Digest
	Layers int
	// Size is that of all layers, Own of those that no other image has.
	Size, Own, Compressed int64

	Change change
	Pull   Pull
	Share  int // of the longest pull, in percent

	number int // in the manifest
	own    int // layers
}

// SharedLayers are those that other images have as well.
func (i imageRow) SharedLayers() int { return i.Layers - i.own }

type layerRow struct {
	ChainID, DiffID digest.Digest
	Size            int64
	MadeBy          string
	Images          []int // by their row
	Title           string
	New, Again      bool
}

// Short is the diff ID as a person compares it.
func (l layerRow) Short() string { return short(l.DiffID) }

// maxMadeBy is how much is shown of the command that made a layer, in characters.
const maxMadeBy = 300

func (r Report) view() (*view, error) {
	m := r.Manifest
	id, err := m.ID()
	if err != nil {
		return nil, err
	}
	v := &view{
		ID: id.String(), Short: short(id), Tool: m.Tool, Engine: m.Store.EngineVersion, Store: m.Store.Root,
		Platform: strings.Trim(strings.Join([]string{m.Platform.OS, m.Platform.Architecture, m.Platform.Variant}, "/"), "/"),
		Created:  m.Created.UTC(),
		NoSince:  r.NoSince, NoDisk: r.NoDisk, Pulled: r.Pulls != nil, NoPulls: r.NoPulls,
	}
	if err := v.addImages(m); err != nil {
		return nil, err
	}
	if r.Since != nil {
		if v.Changes, err = v.compare(m, r.Since); err != nil {
			return nil, err
		}
	}
	v.addPulls(r.Pulls)
	if r.Disk != nil {
		v.Room = v.room(*r.Disk, m.Store.Blobs)
	}
	v.Picture = v.draw(m)
	return v, nil
}

// addImages has the layers in the manifest's order and the largest image first.
func (v *view) addImages(m *manifest.Manifest) error {
	number := make(map[digest.Digest]int, len(m.Layers))
	diffs := map[digest.Digest]bool{}
	for i, l := range m.Layers {
		number[l.ChainID] = i
		again := diffs[l.DiffID]
		diffs[l.DiffID] = true
		if again {
			v.Again.add(l.Size)
		}
		v.Layers = append(v.Layers, layerRow{ChainID: l.ChainID, DiffID: l.DiffID, Size: l.Size, Again: again})
		v.Size += l.Size
	}
	chains := make([][]int, len(m.Images))
	blobs := map[digest.Digest]bool{}
	for i, img := range m.Images {
		row := imageRow{Target: img.Target().Digest, number: i}
		row.Title, row.Names = title(img.Names)
		ids, err := img.ChainIDs()
		if err != nil {
			return err
		}
		commands, err := madeBy(img)
		if err != nil {
			return err
		}
		for j, id := range ids {
			n, ok := number[id]
			if !ok {
				return fmt.Errorf("%s: layer %s of its config is not among layers", row.Title, id)
			}
			chains[i] = append(chains[i], n)
			row.Size += m.Layers[n].Size
			if j < len(commands) && v.Layers[n].MadeBy == "" {
				v.Layers[n].MadeBy = commands[j]
			}
		}
		row.Layers = len(ids)
		ds, err := img.LayerBlobs()
		if err != nil {
			return err
		}
		for _, d := range ds {
			row.Compressed += d.Size
			if !blobs[d.Digest] {
				blobs[d.Digest] = true
				v.Compressed += d.Size
			}
		}
		v.Saved += row.Size
		v.Images = append(v.Images, row)
	}
	v.Saved -= v.Size
	slices.SortStableFunc(v.Images, func(a, b imageRow) int {
		return cmp.Or(cmp.Compare(b.Size, a.Size), cmp.Compare(a.Title, b.Title))
	})
	for i, row := range v.Images {
		for _, n := range chains[row.number] {
			v.Layers[n].Images = append(v.Layers[n].Images, i)
		}
	}
	for i, l := range v.Layers {
		if len(l.Images) == 1 {
			img := &v.Images[l.Images[0]]
			img.Own += l.Size
			img.own++
			v.Layers[i].Title = img.Title
		}
	}
	return nil
}

func (v *view) addPulls(pulls map[digest.Digest]Pull) {
	var longest time.Duration
	for _, p := range pulls {
		longest = max(longest, p.Took)
	}
	for i := range v.Images {
		p := pulls[v.Images[i].Target]
		v.Images[i].Pull = p
		if longest > 0 {
			v.Images[i].Share = int(100 * p.Took / longest)
		}
	}
}

// madeBy are the commands that made an image's layers, as far as its config has them.
func madeBy(img manifest.Image) ([]string, error) {
	var c ocispec.Image
	if err := json.Unmarshal(img.Config.Data, &c); err != nil {
		return nil, fmt.Errorf("config: decoding: %w", err)
	}
	var commands []string
	for _, h := range c.History {
		if h.EmptyLayer {
			continue
		}
		text := strings.Join(strings.Fields(strings.TrimPrefix(h.CreatedBy, "/bin/sh -c ")), " ")
		text = strings.TrimPrefix(text, "#(nop) ")
		if runes := []rune(text); len(runes) > maxMadeBy {
			text = string(runes[:maxMadeBy]) + " …"
		}
		commands = append(commands, text)
	}
	if len(commands) != len(c.RootFS.DiffIDs) {
		return nil, nil
	}
	return commands, nil
}

// title is the name that says most to a person, a tag rather than a digest, and the rest.
func title(names []string) (string, []string) {
	if len(names) == 0 {
		return "", nil
	}
	i := max(0, slices.IndexFunc(names, func(n string) bool { return !strings.Contains(n, "@") }))
	return names[i], slices.Delete(slices.Clone(names), i, i+1)
}

// short is the beginning of a digest. What is no digest stays as it is.
func short(d digest.Digest) string {
	if d.Validate() != nil {
		return d.String()
	}
	return d.Encoded()[:12]
}

// size is n bytes with three digits.
func size(n int64) string {
	v, unit := float64(n), "B"
	for _, next := range []string{"kB", "MB", "GB", "TB"} {
		if v < 999.5 {
			break
		}
		v, unit = v/1000, next
	}
	switch {
	case unit == "B" || v >= 99.95:
		return fmt.Sprintf("%.0f %s", v, unit)
	case v >= 9.995:
		return fmt.Sprintf("%.1f %s", v, unit)
	}
	return fmt.Sprintf("%.2f %s", v, unit)
}

func count(n int, one, many string) string {
	if n == 1 {
		return "1 " + one
	}
	return fmt.Sprintf("%d %s", n, many)
}
