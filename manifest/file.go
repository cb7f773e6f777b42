package manifest

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"unicode"

	"github.com/opencontainers/go-digest"
)

// MaxSize bounds what Read accepts, in bytes. The manifest of a disk with 2,000
// layers in 200 images takes about 3 MiB.
const MaxSize = 64 << 20

// maxValues bounds the JSON values of a layer manifest, and of each document that
// it inlines: an empty object of three bytes becomes two hundred in memory. The
// manifest of that disk has 15,000.
const maxValues = 250_000

// Read reads and validates the layer manifest of the cache disk at dir. Errors
// name the file, the field and the value; a missing file is fs.ErrNotExist.
func Read(dir string) (*Manifest, error) {
	m, _, err := ReadWithID(dir)
	return m, err
}

// ReadWithID is Read, with the cache ID.
func ReadWithID(dir string) (*Manifest, digest.Digest, error) {
	data, err := readFile(dir)
	if err != nil {
		return nil, "", err
	}
	id := digest.FromBytes(data)
	m, err := Decode(data) // the last that needs data
	if err != nil {
		return nil, "", fmt.Errorf("reading layer manifest %s: %w", filepath.Join(dir, Path), err)
	}
	return m, id, nil
}

// ReadID reads the cache ID of the layer manifest at dir alone: what the file says is
// not looked at.
func ReadID(dir string) (digest.Digest, error) {
	f, err := openFile(dir)
	if err != nil {
		return "", err
	}
	defer f.Close()
	id, err := digest.FromReader(f)
	if err != nil {
		return "", fmt.Errorf("reading layer manifest: %w", err)
	}
	return id, nil
}

func readFile(dir string) ([]byte, error) {
	f, err := openFile(dir)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	fi, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("reading layer manifest: %w", err)
	}
	data := make([]byte, fi.Size())
	if _, err := io.ReadFull(f, data); err != nil {
		return nil, fmt.Errorf("reading layer manifest %s: %w", f.Name(), err)
	}
	return data, nil
}

func openFile(dir string) (*os.File, error) {
	// A root that symbolic links cannot leave: the disk is data from elsewhere.
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, fmt.Errorf("reading layer manifest: %w", err)
	}
	defer root.Close()
	name := filepath.Join(dir, Path)
	// Before it is opened: that waits for ever at a named pipe, and may do anything
	// at a device. Nobody changes a cache disk meanwhile.
	fi, err := root.Lstat(Path)
	switch {
	case err != nil:
	case !fi.Mode().IsRegular():
		err = errors.New("not a regular file; build the disk again")
	case fi.Size() > MaxSize:
		err = fmt.Errorf("larger than %d bytes; build the disk again", MaxSize)
	}
	if err != nil {
		return nil, fmt.Errorf("reading layer manifest %s: %w", name, err)
	}
	f, err := root.Open(Path)
	if err != nil {
		return nil, fmt.Errorf("reading layer manifest %s: %w", name, err)
	}
	return f, nil
}

// Decode decodes and validates a layer manifest. Fields that this version does
// not know are ignored.
func Decode(data []byte) (*Manifest, error) {
	if err := fewValues(data); err != nil {
		return nil, fmt.Errorf("%w; build the disk again", err)
	}
	var m Manifest
	if err := json.Unmarshal(data, &m); err != nil || m.SchemaVersion != SchemaVersion {
		return nil, undecodable(data, err)
	}
	if err := m.Validate(); err != nil {
		return nil, fmt.Errorf("%w; build the disk again", err)
	}
	return &m, nil
}

// undecodable says why data cannot be decoded, if at all with the error given. Another
// version's may not look like this one's, so the version is looked at alone.
func undecodable(data []byte, decoding error) error {
	var v struct {
		SchemaVersion int `json:"schemaVersion"`
	}
	if err := json.Unmarshal(data, &v); err != nil {
		return fmt.Errorf("not a layer manifest, or truncated: %w; build the disk again", err)
	}
	if v.SchemaVersion != SchemaVersion {
		return fmt.Errorf("schemaVersion is %d, this version reads %d; use an injector as new as the provisioner that built the disk", v.SchemaVersion, SchemaVersion)
	}
	return fmt.Errorf("decoding: %w; build the disk again", decoding)
}

// Encode returns the canonical encoding: images sorted by their first name,
// layers in the order of the images' chains, base layers first, each layer once,
// indented JSON with a final newline. Equal content gives equal bytes.
func (m *Manifest) Encode() ([]byte, error) {
	c, err := m.canonical()
	if err != nil {
		return nil, err
	}
	var b bytes.Buffer
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	e.SetIndent("", "  ")
	if err := e.Encode(c); err != nil {
		return nil, fmt.Errorf("encoding layer manifest: %w", err)
	}
	if err := fewValues(b.Bytes()); err != nil {
		return nil, fmt.Errorf("encoding layer manifest: %w; list fewer images", err)
	}
	if b.Len() > MaxSize {
		return nil, fmt.Errorf("encoding layer manifest: %d bytes, nobody reads more than %d; list fewer images", b.Len(), MaxSize)
	}
	return b.Bytes(), nil
}

// ID is the cache ID: the digest of the canonical encoding, which is what a build writes.
func (m *Manifest) ID() (digest.Digest, error) {
	b, err := m.Encode()
	if err != nil {
		return "", err
	}
	return digest.FromBytes(b), nil
}

// LayerPath is the path of l's files relative to the disk's root.
func (m *Manifest) LayerPath(l Layer) string {
	return path.Join(m.Store.Root, DriverOverlay2, l.Directory, "diff")
}

// TarSplitPath is the path, relative to the disk's root, of what Docker keeps of l's tar
// stream besides the files.
func (m *Manifest) TarSplitPath(l Layer) string {
	return path.Join(m.Store.Root, "image", DriverOverlay2, "layerdb", l.ChainID.Algorithm().String(), l.ChainID.Encoded(), "tar-split.json.gz")
}

// canonical returns a validated copy in canonical order.
func (m *Manifest) canonical() (*Manifest, error) {
	c := *m
	c.Created = c.Created.UTC().Truncate(1e9)
	c.Images = slices.Clone(m.Images)
	for i := range c.Images {
		c.Images[i].Names = slices.Sorted(slices.Values(c.Images[i].Names))
	}
	slices.SortFunc(c.Images, func(a, b Image) int { return slices.Compare(a.Names, b.Names) })
	if err := c.Validate(); err != nil {
		return nil, err
	}
	byChain := make(map[digest.Digest]Layer, len(m.Layers))
	for _, l := range m.Layers {
		byChain[l.ChainID] = l
	}
	c.Layers = make([]Layer, 0, len(m.Layers))
	for _, img := range c.Images {
		chain, err := img.ChainIDs()
		if err != nil {
			return nil, err
		}
		for _, id := range chain {
			if l, ok := byChain[id]; ok {
				c.Layers = append(c.Layers, l)
				delete(byChain, id)
			}
		}
	}
	if len(c.Images) == 0 {
		c.Images = []Image{}
	}
	return &c, nil
}

// fewValues refuses JSON that takes far more memory than bytes. Each value but the
// first of an array or an object follows a comma.
func fewValues(data []byte) error {
	if bytes.Count(data, []byte{','}) > maxValues {
		return fmt.Errorf("it has more than %d values", maxValues)
	}
	return nil
}

// ValidPath reports what is wrong with a path that must stay below the disk.
func ValidPath(p string) error {
	switch {
	case p == "":
		return fmt.Errorf("is empty")
	case path.IsAbs(p):
		return fmt.Errorf("%.100q is absolute", p)
	case path.Clean(p) != p || p == ".." || strings.HasPrefix(p, "../"):
		return fmt.Errorf("%.100q is not a clean relative path", p)
	case strings.ContainsFunc(p, func(r rune) bool { return !unicode.IsPrint(r) || r == unicode.ReplacementChar }):
		return fmt.Errorf("%.100q has control characters", p)
	}
	return nil
}
