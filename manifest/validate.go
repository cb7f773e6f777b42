package manifest

import (
	"encoding/json"
	"errors"
	"fmt"
	"regexp"
	"runtime"
	"slices"
	"strings"

	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"
)

// maxChain is how many layers an overlay mount takes (OVL_MAX_STACK in the kernel).
const maxChain = 500

// maxManifests is how many manifests an index may list: containerd keeps a label for each.
const maxManifests = 1000

// platformWord is what an operating system, an architecture or a variant is called.
var platformWord = regexp.MustCompile(`^[A-Za-z0-9_.-]{0,64}$`)

// The media types of what is inlined: without them a manifest could pass for an index
// with a runtime, or the other way round.
var (
	indexTypes    = []string{ocispec.MediaTypeImageIndex, "application/vnd.docker.distribution.manifest.list.v2+json"}
	manifestTypes = []string{ocispec.MediaTypeImageManifest, "application/vnd.docker.distribution.manifest.v2+json"}
)

// Validate checks everything that can be checked without the disk. The error
// names the field and the value, of a long one the beginning (%.100q).
func (m *Manifest) Validate() error {
	if m.SchemaVersion != SchemaVersion {
		return fmt.Errorf("schemaVersion is %d, not %d", m.SchemaVersion, SchemaVersion)
	}
	if m.Platform.OS == "" || m.Platform.Architecture == "" {
		return fmt.Errorf("platform %.100q/%.100q lacks os or architecture", m.Platform.OS, m.Platform.Architecture)
	}
	for _, word := range []string{m.Platform.OS, m.Platform.Architecture, m.Platform.Variant} {
		if !platformWord.MatchString(word) {
			return fmt.Errorf("platform has %.100q, which is no name of one", word)
		}
	}
	if m.Created.IsZero() {
		return errors.New("created is missing")
	}
	if m.Store.Driver != DriverOverlay2 {
		return fmt.Errorf("store.driver is %.100q, not %.100q", m.Store.Driver, DriverOverlay2)
	}
	// The disk's root itself ("") would be an overlay2 directory at its top.
	if err := ValidPath(m.Store.Root); err != nil {
		return fmt.Errorf("store.root %w", err)
	}
	layers, err := m.validateLayers()
	if err != nil {
		return err
	}
	return m.validateImages(layers)
}

func (m *Manifest) validateLayers() (map[digest.Digest]Layer, error) {
	byChain := make(map[digest.Digest]Layer, len(m.Layers))
	byDir := make(map[string]digest.Digest, len(m.Layers))
	for i, l := range m.Layers {
		fail := func(format string, a ...any) (map[digest.Digest]Layer, error) {
			return nil, fmt.Errorf("layers[%d]: %w", i, fmt.Errorf(format, a...))
		}
		if err := ValidDigest(l.DiffID); err != nil {
			return fail("diffID %w", err)
		}
		if err := ValidDigest(l.ChainID); err != nil {
			return fail("chainID %w", err)
		}
		if l.Parent != "" {
			if err := ValidDigest(l.Parent); err != nil {
				return fail("parent %w", err)
			}
			// Parents come first, so that a reader can register in order.
			if _, ok := byChain[l.Parent]; !ok {
				return fail("parent %s is not among the layers before it", l.Parent)
			}
		}
		if want := chainID(l.Parent, l.DiffID); l.ChainID != want {
			return fail("chainID %s does not follow from parent and diffID, which give %s", l.ChainID, want)
		}
		if _, ok := byChain[l.ChainID]; ok {
			return fail("chainID %s is there twice", l.ChainID)
		}
		if err := ValidPath(l.Directory); err != nil {
			return fail("directory %w", err)
		}
		if strings.Contains(l.Directory, "/") || l.Directory == "." {
			return fail("directory %.100q is not one path element", l.Directory)
		}
		if other, ok := byDir[l.Directory]; ok {
			return fail("directory %.100q is that of %s too", l.Directory, other)
		}
		if l.Size < 0 {
			return fail("size is %d", l.Size)
		}
		byChain[l.ChainID], byDir[l.Directory] = l, l.ChainID
	}
	return byChain, nil
}

func (m *Manifest) validateImages(layers map[digest.Digest]Layer) error {
	contents := m.validateContents()
	owner := map[string]int{}
	used := make(map[digest.Digest]bool, len(layers))
	for i, img := range m.Images {
		at := fmt.Sprintf("images[%d]", i)
		if len(img.Names) == 0 {
			return fmt.Errorf("%s: names is empty", at)
		}
		at = fmt.Sprintf("%s (%.100q)", at, img.Names[0])
		for _, name := range img.Names {
			if err := validName(name, img.Target().Digest); err != nil {
				return fmt.Errorf("%s: names: %w", at, err)
			}
			if other, ok := owner[name]; ok {
				return fmt.Errorf("%s: names: %.100q is a name of images[%d] too", at, name, other)
			}
			owner[name] = i
		}
		if contents[i].err != nil {
			return fmt.Errorf("%s: %w", at, contents[i].err)
		}
		for _, id := range contents[i].chain {
			if _, ok := layers[id]; !ok {
				return fmt.Errorf("%s: layer %s of its config is not among layers", at, id)
			}
			used[id] = true
		}
	}
	for i, l := range m.Layers {
		if !used[l.ChainID] {
			return fmt.Errorf("layers[%d]: %s belongs to no image", i, l.ChainID)
		}
	}
	return nil
}

// content is the chain of an image whose content is valid, or what is wrong with it.
type content struct {
	chain []digest.Digest
	err   error
}

// validateContents looks at each image alone, on all processors.
func (m *Manifest) validateContents() []content {
	contents := make([]content, len(m.Images))
	var g errgroup.Group
	g.SetLimit(runtime.GOMAXPROCS(0))
	for i, img := range m.Images {
		g.Go(func() error {
			diffIDs, err := img.validateContent(m.Platform)
			contents[i] = content{identity.ChainIDs(diffIDs), err}
			return nil
		})
	}
	_ = g.Wait() // contents has the errors
	return contents
}

// validateContent checks that index, manifest and config are what their
// descriptors say, and that each names the next. It gives the config's diff IDs.
func (img Image) validateContent(platform ocispec.Platform) ([]digest.Digest, error) {
	if img.Index != nil {
		if err := validContent(*img.Index); err != nil {
			return nil, fmt.Errorf("index: %w", err)
		}
		if !slices.Contains(indexTypes, img.Index.MediaType) {
			return nil, fmt.Errorf("index: media type %.100q is not that of an index", img.Index.MediaType)
		}
		var index ocispec.Index
		if err := json.Unmarshal(img.Index.Data, &index); err != nil {
			return nil, fmt.Errorf("index: decoding: %w", err)
		}
		if n := len(index.Manifests); n > maxManifests {
			return nil, fmt.Errorf("index: it lists %d manifests, more than %d", n, maxManifests)
		}
		if !lists(index.Manifests, img.Manifest.Digest) {
			return nil, fmt.Errorf("index %s does not list manifest %.100q", img.Index.Digest, img.Manifest.Digest)
		}
	}
	if err := validContent(img.Manifest); err != nil {
		return nil, fmt.Errorf("manifest: %w", err)
	}
	if !slices.Contains(manifestTypes, img.Manifest.MediaType) {
		return nil, fmt.Errorf("manifest: media type %.100q is not that of an image manifest", img.Manifest.MediaType)
	}
	m, err := img.manifest()
	if err != nil {
		return nil, err
	}
	if m.Config.Digest != img.Config.Digest {
		return nil, fmt.Errorf("manifest %s names config %.100q, not %.100q", img.Manifest.Digest, m.Config.Digest, img.Config.Digest)
	}
	if m.Config.MediaType != img.Config.MediaType {
		return nil, fmt.Errorf("config: media type is %.100q, manifest %s says %.100q", img.Config.MediaType, img.Manifest.Digest, m.Config.MediaType)
	}
	if err := validContent(img.Config); err != nil {
		return nil, fmt.Errorf("config: %w", err)
	}
	config, err := img.config()
	if err != nil {
		return nil, err
	}
	if config.OS != platform.OS || config.Architecture != platform.Architecture {
		return nil, fmt.Errorf("config is for platform %.100q, the disk for %.100q",
			config.OS+"/"+config.Architecture, platform.OS+"/"+platform.Architecture)
	}
	if n := len(config.RootFS.DiffIDs); n > maxChain {
		return nil, fmt.Errorf("config lists %d layers, the kernel mounts %d", n, maxChain)
	}
	if len(m.Layers) != len(config.RootFS.DiffIDs) {
		return nil, fmt.Errorf("manifest lists %d layers, config %d", len(m.Layers), len(config.RootFS.DiffIDs))
	}
	for i, l := range m.Layers {
		if err := ValidDigest(l.Digest); err != nil {
			return nil, fmt.Errorf("manifest: layers[%d]: digest %w", i, err)
		}
	}
	for i, d := range config.RootFS.DiffIDs {
		if err := ValidDigest(d); err != nil {
			return nil, fmt.Errorf("config: rootfs.diff_ids[%d] %w", i, err)
		}
	}
	return config.RootFS.DiffIDs, nil
}

// Target is the descriptor that the image's names resolve to: the index, or the
// manifest if there is none.
func (img Image) Target() ocispec.Descriptor {
	if img.Index != nil {
		return *img.Index
	}
	return img.Manifest
}

// DiffIDs are the config's diff IDs, base layer first.
func (img Image) DiffIDs() ([]digest.Digest, error) {
	var config struct {
		RootFS struct {
			DiffIDs []digest.Digest `json:"diff_ids"`
		} `json:"rootfs"`
	}
	if err := json.Unmarshal(img.Config.Data, &config); err != nil {
		return nil, fmt.Errorf("config: decoding: %w", err)
	}
	return config.RootFS.DiffIDs, nil
}

// ChainIDs are the chain IDs of the image's layers, base layer first.
func (img Image) ChainIDs() ([]digest.Digest, error) {
	diffIDs, err := img.DiffIDs()
	if err != nil {
		return nil, err
	}
	// The chain of n layers is hashed one layer at a time; identity.ChainIDs
	// works in place, on a copy.
	return identity.ChainIDs(append([]digest.Digest(nil), diffIDs...)), nil
}

// LayerBlobs are the manifest's layer descriptors, base layer first.
func (img Image) LayerBlobs() ([]ocispec.Descriptor, error) {
	m, err := img.manifest()
	if err != nil {
		return nil, err
	}
	return m.Layers, nil
}

func (img Image) manifest() (*ocispec.Manifest, error) {
	var m ocispec.Manifest
	if err := json.Unmarshal(img.Manifest.Data, &m); err != nil {
		return nil, fmt.Errorf("manifest: decoding: %w", err)
	}
	return &m, nil
}

func (img Image) config() (*ocispec.Image, error) {
	var c ocispec.Image
	if err := json.Unmarshal(img.Config.Data, &c); err != nil {
		return nil, fmt.Errorf("config: decoding: %w", err)
	}
	return &c, nil
}

func lists(ds []ocispec.Descriptor, d digest.Digest) bool {
	for _, e := range ds {
		if e.Digest == d {
			return true
		}
	}
	return false
}

func chainID(parent, diffID digest.Digest) digest.Digest {
	if parent == "" {
		return diffID
	}
	return identity.ChainID([]digest.Digest{parent, diffID})
}

// ValidDigest is d.Validate, quicker, with the digest in the error, of a long one the beginning.
func ValidDigest(d digest.Digest) error {
	// Validate takes a regular expression for that, and a disk has thousands of them.
	if hex, ok := strings.CutPrefix(d.String(), "sha256:"); ok && len(hex) == 64 && strings.Trim(hex, "0123456789abcdef") == "" {
		return nil
	}
	if err := d.Validate(); err != nil {
		return fmt.Errorf("%.100q: %w", d.String(), err)
	}
	return nil
}

// validContent checks a descriptor's inlined bytes against its size and digest.
func validContent(d ocispec.Descriptor) error {
	if err := ValidDigest(d.Digest); err != nil {
		return fmt.Errorf("digest %w", err)
	}
	if int64(len(d.Data)) != d.Size {
		return fmt.Errorf("%s: size is %d, data has %d bytes", d.Digest, d.Size, len(d.Data))
	}
	if got := d.Digest.Algorithm().FromBytes(d.Data); got != d.Digest {
		return fmt.Errorf("digest is %s, data hashes to %s", d.Digest, got)
	}
	return fewValues(d.Data)
}

// validName checks that a name is a normalised tag or digest reference, and that
// a digest is the one that the name resolves to.
func validName(name string, target digest.Digest) error {
	ref, err := reference.ParseNormalizedNamed(name)
	if err != nil {
		return fmt.Errorf("%.100q: %w", name, err)
	}
	if ref.String() != name || reference.IsNameOnly(ref) {
		return fmt.Errorf("%.100q is not a normalised reference with a tag or a digest", name)
	}
	if d, ok := ref.(reference.Digested); ok {
		if _, both := ref.(reference.Tagged); both {
			return fmt.Errorf("%.100q has a tag and a digest; list them as two names", name)
		}
		if d.Digest() != target {
			return fmt.Errorf("%.100q is not the digest of the image, %s", name, target)
		}
	}
	return nil
}
