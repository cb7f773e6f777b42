package docker

import (
	"reflect"

	"github.com/opencontainers/go-digest"

	"github.com/selkies-project/packer-plugin-selkies/injector/report"
)

// maxLayers is how many layers dockerd puts on each other; a container adds two.
const maxLayers = 125

// newLayer is a layer to register.
type newLayer struct {
	Chain, DiffID, Parent digest.Digest
	ID, Link, Lower       string
	Size                  int64
	Cache                 digest.Digest // the generation that has it
	Source                string        // the layer's files, as the host sees them
	TarSplit              string        // its tar-split.json.gz, likewise
}

// relink is a layer of ours whose files have to be reached another way: those of a
// generation whose disk is gone, or bind mounts that a restart has taken.
type relink struct {
	Chain  digest.Digest
	Layer  newLayer
	Rebind bool
}

// newImage is an image config to register.
type newImage struct {
	ID     digest.Digest
	Config []byte
}

// newName makes a name stand for the image id, instead of was: an older generation's,
// or "" if the node does not have the name.
type newName struct{ was, id digest.Digest }

// claim is that of a disk of this run on a name.
type claim struct{ id, cache digest.Digest }

// changes is everything that a node lacks of some cache disks.
type changes struct {
	layers   []newLayer // parents first
	relinks  []relink
	images   []newImage
	names    map[name]newName
	metadata metadata
	records  []*record
	known    []*record // the node's, of all generations
	disks    []report.Disk
}

// restart says if dockerd has to read its store anew.
func (c *changes) restart() bool {
	return len(c.layers)+len(c.images)+len(c.names) > 0
}

// equal says if the same has to be committed.
func (c *changes) equal(o *changes) bool {
	return reflect.DeepEqual(c.layers, o.layers) && reflect.DeepEqual(c.images, o.images) && reflect.DeepEqual(c.names, o.names)
}
