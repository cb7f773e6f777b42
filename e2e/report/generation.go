// Package report tests the page that shows a cache at a glance in a real browser. What
// is here makes layer manifests of caches of any size, without their disks.
package report

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/selkies-project/packer-plugin-selkies/manifest"
)

// Layer is one of an image that is to be recorded.
type Layer struct {
	Content, MadeBy string
	Size            int64
}

// Generation is a layer manifest in the making.
type Generation struct {
	Manifest manifest.Manifest
	there    map[digest.Digest]bool
}

// NewGeneration has no images yet.
func NewGeneration(created time.Time) *Generation {
	return &Generation{
		Manifest: manifest.Manifest{
			SchemaVersion: manifest.SchemaVersion,
			Platform:      ocispec.Platform{OS: "linux", Architecture: "amd64"},
			Created:       created,
			Tool:          "packer-plugin-selkies/1.0.0",
			Store:         manifest.Store{Driver: manifest.DriverOverlay2, Root: "docker", EngineVersion: "20.10.24"},
		},
		there: map[digest.Digest]bool{},
	}
}

// Add records an image.
func (g *Generation) Add(name string, layers ...Layer) {
	var config ocispec.Image
	config.Platform = g.Manifest.Platform
	config.RootFS.Type = "layers"
	m := ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest}
	for _, l := range layers {
		config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, digest.FromString(l.Content))
		config.History = append(config.History, ocispec.History{CreatedBy: l.MadeBy})
		m.Layers = append(m.Layers, ocispec.Descriptor{
			MediaType: ocispec.MediaTypeImageLayerGzip, Digest: digest.FromString("gzip of " + l.Content), Size: l.Size * 2 / 5,
		})
	}
	img := manifest.Image{Config: inlined(ocispec.MediaTypeImageConfig, config)}
	m.Config = img.Config
	m.Config.Data = nil
	img.Manifest = inlined(ocispec.MediaTypeImageManifest, m)
	repository := name[:strings.LastIndex(name, ":")]
	img.Names = []string{name, repository + "@" + img.Manifest.Digest.String()}
	g.Manifest.Images = append(g.Manifest.Images, img)

	var parent digest.Digest
	for i, chain := range identity.ChainIDs(slices.Clone(config.RootFS.DiffIDs)) {
		if !g.there[chain] {
			g.there[chain] = true
			g.Manifest.Layers = append(g.Manifest.Layers, manifest.Layer{
				ChainID: chain, DiffID: config.RootFS.DiffIDs[i], Parent: parent, Directory: chain.Encoded(), Size: layers[i].Size,
			})
		}
		parent = chain
	}
}

// inlined is v with its bytes.
func inlined(mediaType string, v any) ocispec.Descriptor {
	data, err := json.Marshal(v)
	if err != nil {
		panic(err) // of the test's own types
	}
	return ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(data), Size: int64(len(data)), Data: data}
}

// stack is n layers of what is called name, as large as such layers are.
func stack(name string, n int, largest int64) []Layer {
	r := random(name)
	var layers []Layer
	for i := range n {
		size := int64(float64(largest) / float64(i+1) * (0.4 + 0.6*r.Float64()))
		by := fmt.Sprintf("RUN /bin/sh -c apt-get update && apt-get install -y --no-install-recommends %s-%d # buildkit", name, i)
		if i%3 == 2 {
			size, by = r.Int64N(40_000), fmt.Sprintf("COPY /etc/%s/%d.conf /etc/%s/ # buildkit", name, i, name)
		}
		layers = append(layers, Layer{fmt.Sprintf("%s %d", name, i), by, size})
	}
	return layers
}

// random are the same numbers for the same name.
func random(name string) *rand.Rand {
	return rand.New(rand.NewChaCha8([32]byte([]byte(digest.FromString(name).Encoded()[:32]))))
}

// Cache is the layer manifest of a cache with images, in its first or its second
// generation.
func Cache(images, number int) *manifest.Manifest {
	const MB = 1_000_000
	g := NewGeneration(time.Date(2026, 11, 22+number, 12, 30, 0, 0, time.UTC))
	debian := stack("debian", 1, 117*MB)
	ubuntu := stack("ubuntu", 1, 78*MB)
	desktop := slices.Concat(ubuntu, stack("desktop", 9, 900*MB))
	gpu := slices.Concat(desktop, stack("gpu", 4, 600*MB))

	desktop[1].MadeBy = `RUN echo "</script></code><img src=x onerror=alert(1)>"` // HTML that must stay a text
	g.Add("docker.io/library/debian:12", debian...)
	g.Add("us-docker.pkg.dev/my-project/apps/desktop:1.4", slices.Concat(desktop, stack(fmt.Sprintf("session-%d", number), 3, 220*MB))...)
	g.Add("us-docker.pkg.dev/my-project/apps/blender:4.2", slices.Concat(gpu, stack("blender", 5, 700*MB))...)
	bases := [][]Layer{debian, ubuntu, desktop, desktop, gpu, gpu}
	for i := 3; i < images; i++ {
		app := fmt.Sprintf("app-%03d", i)
		content := app
		switch {
		case i%17 == 0 && number == 1:
			continue // has come since
		case i%23 == 0:
			content += fmt.Sprintf(" of %d", number) // changes
		}
		r := random(app)
		team := []string{"office", "games", "render", "engineering-simulation"}[i%4]
		g.Add("us-docker.pkg.dev/my-project/"+team+"/"+app+":2026.11", slices.Concat(bases[r.IntN(len(bases))], stack(content, 2+r.IntN(6), (40+r.Int64N(400))*MB))...)
	}
	if number == 1 {
		g.Add("us-docker.pkg.dev/my-project/apps/retired:0.9", slices.Concat(debian, stack("retired", 3, 300*MB))...)
	}
	return &g.Manifest
}
