// Package images makes the container images that the tests pull: small, of every
// shape that registries serve, and all runnable, since each has a busybox.
package images

import (
	"context"
	"fmt"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/types"
)

// Image is an image to be pushed to a registry.
type Image struct {
	// Repository is the name below the registry.
	Repository string
	// Tags is empty for an image that has a digest only.
	Tags []string
	// Image is the one for linux/amd64.
	Image v1.Image
	// Index, if not nil, is what the tags mean; it has Image and others.
	Index v1.ImageIndex
	// Zstd is true of layers that Docker before 23 cannot unpack.
	Zstd bool
}

// Kind is how an image's manifest and layers are typed.
type Kind struct {
	Manifest, Config, Layer types.MediaType
}

// The kinds that registries serve.
var (
	Docker = Kind{types.DockerManifestSchema2, types.DockerConfigJSON, types.DockerLayer}
	OCI    = Kind{types.OCIManifestSchema1, types.OCIConfigJSON, types.OCILayer}
	Zstd   = Kind{types.OCIManifestSchema1, types.OCIConfigJSON, types.OCILayerZStd}
)

// New makes an image for linux/amd64 of layers, tar streams from the base up.
// Without arguments its container says hello and ends.
func New(kind Kind, layers ...[]byte) (v1.Image, error) {
	image := mutate.ConfigMediaType(mutate.MediaType(empty.Image, kind.Manifest), kind.Config)
	for i, stream := range layers {
		l, err := compress(stream, kind.Layer)
		if err != nil {
			return nil, fmt.Errorf("making layer %d: %w", i, err)
		}
		image, err = mutate.Append(image, mutate.Addendum{Layer: l, MediaType: kind.Layer, History: v1.History{
			CreatedBy: fmt.Sprintf("layer %d", i), Created: v1.Time{Time: made.Truncate(time.Second)},
		}})
		if err != nil {
			return nil, fmt.Errorf("adding layer %d: %w", i, err)
		}
	}
	return configure(image, "amd64", "/bin/busybox", "echo", "hello")
}

func configure(image v1.Image, arch string, command ...string) (v1.Image, error) {
	config, err := image.ConfigFile()
	if err != nil {
		return nil, err
	}
	config = config.DeepCopy()
	config.OS, config.Architecture = "linux", arch
	config.Created = v1.Time{Time: made.Truncate(time.Second)}
	config.Config.Cmd = command
	config.Config.Env = []string{"PATH=/bin"}
	return mutate.ConfigFile(image, config)
}

// Catalogue is every shape of image, each in a repository of its own. busybox is the
// path of a statically linked one.
func Catalogue(busybox string) ([]Image, error) {
	base, err := baseLayer(busybox)
	if err != nil {
		return nil, err
	}
	odd, err := oddLayers()
	if err != nil {
		return nil, err
	}
	none, err := layer()
	if err != nil {
		return nil, err
	}
	b := builder{base: base}
	greeting := b.text("greeting", "hello\n")

	b.add(Image{Repository: "one-layer"}, OCI, base)
	b.add(Image{Repository: "docker-schema2"}, Docker, base, greeting)
	b.add(Image{Repository: "oci"}, OCI, base, greeting)
	b.add(Image{Repository: "zstd", Zstd: true}, Zstd, base, greeting, b.text("zstd", "only here"))
	b.add(Image{Repository: "same-layer-twice"}, OCI, base, greeting, b.text("between", "hello\n"), greeting)
	b.add(Image{Repository: "empty-layer"}, Docker, base, none, greeting)
	b.add(Image{Repository: "two-tags", Tags: []string{"one", "two"}}, OCI, base, b.text("two-tags", "hello\n"))
	b.add(Image{Repository: "digest-only", Tags: []string{}}, OCI, base, b.text("digest-only", "hello\n"))
	b.add(Image{Repository: "odd-files"}, OCI, append([][]byte{base}, odd...)...)
	b.add(Image{Repository: "deep"}, OCI, b.chain("deep", 120)...)
	// The newer one shares four layers with the older.
	shared := b.chain("shared", 4)
	b.add(Image{Repository: "shared", Tags: []string{"1"}}, OCI, shared...)
	b.add(Image{Repository: "shared", Tags: []string{"2"}}, OCI, append(shared, b.text("newer", "hello\n"))...)
	b.add(Image{Repository: "platforms"}, OCI, base, b.text("platforms", "linux/amd64\n"))
	b.index(types.OCIImageIndex)
	b.add(Image{Repository: "manifest-list"}, Docker, base, b.text("manifest-list", "linux/amd64\n"))
	b.index(types.DockerManifestList)
	return b.images, b.err
}

// Chains is n images of depth layers each, which share their base layer only.
func Chains(busybox string, n, depth int) ([]Image, error) {
	base, err := baseLayer(busybox)
	if err != nil {
		return nil, err
	}
	b := builder{base: base}
	for i := range n {
		name := fmt.Sprintf("chain-%d", i)
		b.add(Image{Repository: name}, OCI, b.chain(name, depth)...)
	}
	return b.images, b.err
}

// NewerChain is the first of Chains in a version of its own: the top layer is another.
func NewerChain(busybox string, depth int) (Image, error) {
	base, err := baseLayer(busybox)
	if err != nil {
		return Image{}, err
	}
	b := builder{base: base}
	layers := b.chain("chain-0", depth-1)
	b.add(Image{Repository: "chain-0", Tags: []string{"newer"}}, OCI, append(layers, b.text("newer", "hello\n"))...)
	if b.err != nil {
		return Image{}, b.err
	}
	return b.images[0], nil
}

// Pause is an image for the sandboxes of pods: it waits until it is told to end.
func Pause(busybox string) (Image, error) {
	base, err := baseLayer(busybox)
	if err != nil {
		return Image{}, err
	}
	image, err := New(OCI, base)
	if err != nil {
		return Image{}, err
	}
	image, err = configure(image, "amd64", "/bin/sh", "-c", "trap exit TERM; while :; do sleep 3600 & wait; done")
	return Image{Repository: "pause", Tags: []string{"latest"}, Image: image}, err
}

// builder collects images until the first error.
type builder struct {
	base   []byte
	images []Image
	err    error
}

// text is a layer with one small file.
func (b *builder) text(name, body string) []byte {
	stream, err := layer(text(name, body))
	if err != nil && b.err == nil {
		b.err = err
	}
	return stream
}

// chain is the base layer with further ones on it, depth in all.
func (b *builder) chain(name string, depth int) [][]byte {
	layers := [][]byte{b.base}
	for i := 1; i < depth; i++ {
		layers = append(layers, b.text(fmt.Sprintf("%s-%03d", name, i), "hello\n"))
	}
	return layers
}

func (b *builder) add(i Image, kind Kind, layers ...[]byte) {
	if b.err != nil {
		return
	}
	if i.Tags == nil {
		i.Tags = []string{"latest"}
	}
	i.Image, b.err = New(kind, layers...)
	b.images = append(b.images, i)
}

// index puts the last image into an index with one for another architecture and an
// attestation, which has no platform that anyone could run.
func (b *builder) index(mediaType types.MediaType) {
	if b.err != nil {
		return
	}
	i := &b.images[len(b.images)-1]
	i.Index, b.err = index(i.Image, mediaType)
}

func index(image v1.Image, mediaType types.MediaType) (v1.ImageIndex, error) {
	arm, err := configure(image, "arm64", "/bin/busybox", "echo", "wrong platform")
	if err != nil {
		return nil, err
	}
	unknown, err := configure(image, "unknown", "/bin/busybox", "echo", "no platform")
	if err != nil {
		return nil, err
	}
	add := func(image v1.Image, os, arch string) mutate.IndexAddendum {
		return mutate.IndexAddendum{Add: image, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: os, Architecture: arch}}}
	}
	return mutate.AppendManifests(mutate.IndexMediaType(empty.Index, mediaType),
		add(arm, "linux", "arm64"), add(image, "linux", "amd64"), add(unknown, "unknown", "unknown")), nil
}

// Push pushes images to a registry and returns their references, one for each tag
// and one by digest for an image without.
func Push(ctx context.Context, registry string, images []Image, options ...remote.Option) ([]string, error) {
	var refs []string
	options = append([]remote.Option{remote.WithContext(ctx)}, options...)
	for _, i := range images {
		pushed, err := i.push(registry, options)
		if err != nil {
			return nil, fmt.Errorf("pushing %s: %w", i.Repository, err)
		}
		refs = append(refs, pushed...)
	}
	return refs, nil
}

func (i Image) push(registry string, options []remote.Option) ([]string, error) {
	repo, err := name.NewRepository(registry + "/" + i.Repository)
	if err != nil {
		return nil, err
	}
	var targets []name.Reference
	for _, t := range i.Tags {
		targets = append(targets, repo.Tag(t))
	}
	if len(targets) == 0 {
		digest, err := i.Digest()
		if err != nil {
			return nil, err
		}
		targets = append(targets, repo.Digest(digest.String()))
	}
	var refs []string
	for _, target := range targets {
		if i.Index != nil {
			err = remote.WriteIndex(target, i.Index, options...)
		} else {
			err = remote.Write(target, i.Image, options...)
		}
		if err != nil {
			return nil, err
		}
		refs = append(refs, target.Name())
	}
	return refs, nil
}

// Digest is the digest that the image's tags stand for.
func (i Image) Digest() (v1.Hash, error) {
	if i.Index != nil {
		return i.Index.Digest()
	}
	return i.Image.Digest()
}
