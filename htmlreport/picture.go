package htmlreport

import (
	"fmt"

	"github.com/opencontainers/go-digest"

	"github.com/selkies-project/packer-plugin-selkies/manifest"
)

// picture is what the page's script draws: layers as boxes within those of the layers
// below them. All text comes from here, so the script computes none.
type picture struct {
	Images []drawnImage `json:"images"`
	Layers []drawnLayer `json:"layers"`
	Runs   []run        `json:"runs"`
}

type drawnImage struct {
	Title string `json:"title"`
	Size  string `json:"size"`
}

type drawnLayer struct {
	Label string `json:"label"`
	Size  string `json:"size"`
	Bytes int64  `json:"bytes"`
	New   bool   `json:"new,omitempty"`
}

// run is a run of layers, one upon the other, that the same images have. Of the runs
// that are built on it each has fewer images.
type run struct {
	Label  string `json:"label"`
	Size   string `json:"size"` // of the run's own layers
	Whole  string `json:"whole"`
	Layers []int  `json:"layers"`
	Images []int  `json:"images"`
	Runs   []run  `json:"runs,omitempty"`

	bytes int64 // of its own layers and those of the runs built on it
}

func (v *view) draw(m *manifest.Manifest) picture {
	var p picture
	for _, img := range v.Images {
		p.Images = append(p.Images, drawnImage{img.Title, size(img.Size)})
	}
	above := map[digest.Digest][]int{}
	for i, l := range m.Layers {
		above[l.Parent] = append(above[l.Parent], i)
		p.Layers = append(p.Layers, drawnLayer{v.Layers[i].Short(), size(l.Size), l.Size, v.Layers[i].New})
	}
	for _, first := range above[""] {
		p.Runs = append(p.Runs, v.run(above, first))
	}
	return p
}

// run follows the layers from the first one up to where images part.
func (v *view) run(above map[digest.Digest][]int, layer int) run {
	r := run{Images: v.Layers[layer].Images}
	var own int64
	for {
		r.Layers = append(r.Layers, layer)
		own += v.Layers[layer].Size
		next := above[v.Layers[layer].ChainID]
		if len(next) != 1 || len(v.Layers[next[0]].Images) != len(r.Images) {
			r.bytes = own
			for _, n := range next {
				on := v.run(above, n)
				r.bytes += on.bytes
				r.Runs = append(r.Runs, on)
			}
			break
		}
		layer = next[0]
	}
	r.Size, r.Whole = size(own), size(r.bytes)
	layers := count(len(r.Layers), "layer", "layers")
	if len(r.Images) == 1 {
		r.Label = v.Images[r.Images[0]].Title
	} else {
		r.Label = fmt.Sprintf("%s shared by %d images", layers, len(r.Images))
	}
	return r
}
