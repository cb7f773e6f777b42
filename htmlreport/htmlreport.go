// Package htmlreport is the cache at a glance: one page that shows what a cache disk
// holds, drawn from its layer manifest. The page needs no network and no other file,
// and its content security policy allows none. The injector's report command and the
// provisioner's report option write it.
package htmlreport

import (
	"io"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/selkies-project/packer-plugin-selkies/manifest"
)

// Report is what the page shows. Only Manifest is needed; where something else is not
// known, a sentence says why in its place.
type Report struct {
	Manifest *manifest.Manifest

	// Since is the layer manifest of the generation before.
	Since   *manifest.Manifest
	NoSince string

	// Disk is the file system with the cache.
	Disk   *Disk
	NoDisk string

	// Pulls has the images that the build pulled, by the digest that their names resolve
	// to; those it does not have were there.
	Pulls   map[digest.Digest]Pull
	NoPulls string
}

// Disk is the size of a file system, in bytes.
type Disk struct{ Size, Free int64 }

// Pull is what it took to get an image.
type Pull struct {
	Took time.Duration
	// Bytes were downloaded; a layer that several images share counts for one of them.
	Bytes int64
}

// Write writes the page.
func (r Report) Write(w io.Writer) error {
	v, err := r.view()
	if err != nil {
		return err
	}
	html, err := v.html()
	if err != nil {
		return err
	}
	_, err = w.Write(html)
	return err
}
