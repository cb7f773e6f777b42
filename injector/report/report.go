// Package report holds what the injector is asked for and what it says of its work,
// in the same words for every runtime. The command line prints reports as a table
// or as JSON.
package report

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/opencontainers/go-digest"
)

// State says what became of an image, or with plan what would become of it.
type State string

const (
	// Registered images were made known to the runtime by this run.
	Registered State = "registered"
	// Present images were there before this run, with every name.
	Present State = "present"
	// Skipped images were left alone, for the reason given.
	Skipped State = "skipped"
	// Failed images could not be registered, for the reason given.
	Failed State = "failed"
)

// InjectOptions say how images are registered. The zero value registers all.
type InjectOptions struct {
	// DryRun says what would be done and changes nothing.
	DryRun bool
	// First, if not nil, gives references, as pods name them, of images that are
	// registered before all others, in this order. It may take a while to know them, and
	// is called when the disks are mounted.
	First func(context.Context) []string
	// Removed are names that someone has removed, or would have to have removed if they
	// are gone: they are not made again.
	Removed map[string]bool
	// Ejected, if not nil, says of a generation that eject has taken it back meanwhile:
	// nothing of it is made again. Before anything is changed it is asked while no eject is
	// at work.
	Ejected func(digest.Digest) bool
	// Finished, if not nil, is called for each image as soon as it is usable, or has
	// failed, by several goroutines at once.
	Finished func(Image)
}

// Report calls Finished, if there is one.
func (o InjectOptions) Report(img Image) {
	if o.Finished != nil {
		o.Finished(img)
	}
}

// WasRemoved says of a name that the node lacks that it is to stay so.
func (o InjectOptions) WasRemoved(cache digest.Digest, name string) bool {
	return o.Removed[name] || o.WasEjected(cache)
}

// WasEjected calls Ejected, if there is one.
func (o InjectOptions) WasEjected(cache digest.Digest) bool {
	return o.Ejected != nil && o.Ejected(cache)
}

// EjectOptions say what is ejected.
type EjectOptions struct {
	// Caches are the generations; none means all.
	Caches []digest.Digest
	// LeaveUsed leaves images that containers use, instead of refusing. containerd
	// only: Docker refuses all the same.
	LeaveUsed bool
}

// Image is one image of a cache disk and what inject did with it, or, from a
// dry run, would do.
type Image struct {
	// Names are all names of the image, the one a person knows first.
	Names []string `json:"names"`
	State State    `json:"state"`
	// Reason says in one line why an image was skipped or failed, or which of its
	// names were left to another image that the node has under that name.
	Reason string `json:"reason,omitempty"`
	// Layers is the length of the image's chain; Registered and Present count
	// the layers that this run registered and those that were already there.
	Layers     int `json:"layers"`
	Registered int `json:"layersRegistered"`
	Present    int `json:"layersPresent"`
	// Cached counts the layers that are read from a cache disk; the others are the
	// node's own, from a pull.
	Cached int `json:"layersCached"`
	// Removed are the names that were not made again, as asked.
	Removed []string `json:"removed,omitempty"`
	// Milliseconds from the start of the image's registration to its end; with Docker,
	// which takes all images at once, they are those of the run, see Inject.
	Milliseconds int64 `json:"milliseconds,omitempty"`
}

// Disk is what inject did, or would do, with one cache disk.
type Disk struct {
	Dir     string        `json:"dir"`
	CacheID digest.Digest `json:"cacheID"`
	Created time.Time     `json:"created"`
	Images  []Image       `json:"images"`
	// Layers counted once each over the whole disk.
	Registered int `json:"layersRegistered"`
	Present    int `json:"layersPresent"`
	Cached     int `json:"layersCached"`
}

// Change is one to an image record that someone else made.
type Change struct {
	Name    string
	Removed bool
}

// ErrUnknownCache is for a cache ID that eject is given and the node has nothing of.
var ErrUnknownCache = errors.New("nothing is registered from such a cache; status lists what is")

// Generation is one that was registered on the node, whether its disk is there or not.
type Generation struct {
	CacheID digest.Digest `json:"cacheID"`
	// Dir is the host's directory that the disk is, or is to be, mounted on.
	Dir string `json:"dir"`
}

// Inject is the result of inject.
type Inject struct {
	Runtime string `json:"runtime"`
	Disks   []Disk `json:"disks"`
	// Restart says whether a daemon that ran was stopped and started.
	Restart bool `json:"restart"`
	// Refusal is why inject would change nothing. Only a dry run has it.
	Refusal      string `json:"refusal,omitempty"`
	Milliseconds int64  `json:"milliseconds"`
}

// Cover says how much of a reference the cache and the node have.
type Cover string

// What Cover can be.
const (
	Hit     Cover = "hit"     // the image is complete without a pull
	Partial Cover = "partial" // a pull would find some layers
	Miss    Cover = "miss"    // no layer is known to be there
)

// Reference answers plan's question about one reference.
type Reference struct {
	Reference string `json:"reference"`
	Cover     Cover  `json:"cover"`
	Reason    string `json:"reason"`
	Layers    int    `json:"layers,omitempty"`
	Cached    int    `json:"layersCached,omitempty"`
}

// Nowhere answers for a name that neither the node nor a cache disk has. related are
// the cached images of its repository: only the registry knows which layers it shares
// with them.
func Nowhere(name string, related []string) Reference {
	r := Reference{Cover: Miss, Reason: "neither the node nor a cache disk has " + name}
	switch len(related) {
	case 0:
	case 1:
		r.Reason += "; a pull may find layers of " + related[0]
	default:
		r.Reason += fmt.Sprintf("; a pull may find layers of %s and of %d more cached images of its repository", related[0], len(related)-1)
	}
	return r
}

// Registration is one image that was registered from a cache disk, as status
// finds it on the node.
type Registration struct {
	Names   []string      `json:"names"`
	CacheID digest.Digest `json:"cacheID"`
	Layers  int           `json:"layers"`
	// Disk is where the generation's disk is mounted on the node; Readable says
	// if its layers can be read there now, and Problem why not.
	Disk     string `json:"disk,omitempty"`
	Readable bool   `json:"readable"`
	Problem  string `json:"problem,omitempty"`
}

// Eject is the result of eject.
type Eject struct {
	Runtime string   `json:"runtime"`
	Images  []string `json:"images"`
	Layers  int      `json:"layersRemoved"`
	// Kept are images or layers that stay, each with the reason.
	Kept []string `json:"kept,omitempty"`
}

// Verify is the result of verify for one cache disk.
type Verify struct {
	Dir     string        `json:"dir"`
	CacheID digest.Digest `json:"cacheID"`
	Layers  int           `json:"layers"`
	// Resumed are those of them that an earlier, interrupted run had proved.
	Resumed int `json:"layersResumed,omitempty"`
	// Bytes of the layers' files, and of compressed blobs, that were read and hashed.
	Bytes        int64          `json:"bytes"`
	Damaged      []DamagedLayer `json:"damaged,omitempty"`
	Milliseconds int64          `json:"milliseconds"`
}

// DamagedLayer is a layer whose files are not those of the image.
type DamagedLayer struct {
	ChainID digest.Digest `json:"chainID"`
	DiffID  digest.Digest `json:"diffID"`
	// Directory is the layer's files, relative to the disk's root.
	Directory string `json:"directory"`
	// Problems name the files and what is wrong with each; of many, the first.
	Problems []string `json:"problems"`
}

// Title is the name that says most to a person: a tag rather than the digest that
// stands beside it.
func Title(names []string) string {
	if len(names) == 0 {
		return "<none>"
	}
	if i := slices.IndexFunc(names, func(n string) bool { return !strings.Contains(n, "@") }); i >= 0 {
		return names[i]
	}
	return names[0]
}

// Short is a digest as a person compares it: its first 12 digits, which eject takes as
// well. What is no digest stays as it is.
func Short(d digest.Digest) string {
	if d.Validate() != nil {
		return d.String()
	}
	return d.Encoded()[:12]
}
