package docker

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"

	"github.com/selkies-project/packer-plugin-selkies/injector/cachedisk"
	"github.com/selkies-project/packer-plugin-selkies/injector/report"
	"github.com/selkies-project/packer-plugin-selkies/manifest"
)

// planner collects changes over all disks.
type planner struct {
	store
	link    string
	repos   *repositories
	mounted map[string]bool // bind mounts, by target
	check   checker
	here    map[digest.Digest]bool // the generations of this run's disks
	claimed map[name]claim
	planned map[digest.Digest]newLayer
	seen    map[digest.Digest]nodeLayer
	c       *changes
}

// nodeLayer is how the node has a layer, in which directory, and of which generation, if
// it is a link of ours.
type nodeLayer struct {
	state layerState
	id    string
	from  digest.Digest
}

// look finds out how the node has each layer of the disks.
func (s store) look(disks []*cachedisk.Disk) (map[digest.Digest]nodeLayer, error) {
	var chains []digest.Digest
	for _, d := range disks {
		for _, l := range d.Manifest.Layers {
			chains = append(chains, l.ChainID)
		}
	}
	found := make([]nodeLayer, len(chains))
	var g errgroup.Group
	g.SetLimit(cachedisk.Lookups)
	for i, chain := range chains {
		g.Go(func() (err error) {
			l := &found[i]
			if l.state, l.id, err = s.layer(chain); l.state == layerOwn {
				l.from = s.generation(l.id)
			}
			return err
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	seen := make(map[digest.Digest]nodeLayer, len(chains))
	for i, chain := range chains {
		seen[chain] = found[i]
	}
	return seen, nil
}

// plan finds out what is missing of the disks, newest generation first. It changes
// nothing.
func (r *Runtime) plan(disks []*cachedisk.Disk, check checker) (*changes, error) {
	p := &planner{
		store: r.store, link: r.opt.Link, check: check,
		here:    map[digest.Digest]bool{},
		claimed: map[name]claim{},
		planned: map[digest.Digest]newLayer{},
		c:       &changes{names: map[name]newName{}, metadata: newMetadata()},
	}
	var g errgroup.Group
	g.Go(func() (err error) { p.repos, err = r.readRepositories(); return err })
	g.Go(func() (err error) { p.mounted, err = r.bindMounts(); return err })
	g.Go(func() (err error) { p.seen, err = r.look(disks); return err })
	p.c.known = r.knownRecords()
	if err := g.Wait(); err != nil {
		return nil, err
	}
	for _, d := range disks {
		p.here[d.ID] = true
	}
	for _, d := range disks {
		if err := p.disk(d); err != nil {
			return nil, fmt.Errorf("cache disk %s: %w", d.Dir, err)
		}
	}
	return p.c, nil
}

func (p *planner) disk(d *cachedisk.Disk) error {
	m := d.Manifest
	layers := make(map[digest.Digest]manifest.Layer, len(m.Layers))
	rec := &record{
		CacheID: d.ID, Created: m.Created,
		Overlay: filepath.Join(m.Store.Root, manifest.DriverOverlay2),
		Layers:  map[digest.Digest]recordedLayer{},
	}
	rep := report.Disk{Dir: d.Dir, CacheID: d.ID, Created: m.Created, Images: []report.Image{}}
	wanted := newMetadata()
	before := len(p.planned)
	counted := map[digest.Digest]bool{}
	for _, l := range m.Layers {
		layers[l.ChainID] = l
	}
	for _, img := range m.Images {
		chain, err := img.ChainIDs()
		if err != nil {
			return err
		}
		ri := report.Image{Names: img.Names, Layers: len(chain)}
		if ri.Reason, err = p.refuse(d, img, chain); err != nil {
			return err
		}
		if ri.Reason != "" {
			ri.State = report.Skipped
			rep.Images = append(rep.Images, ri)
			continue
		}
		for _, id := range chain {
			if _, ok := p.planned[id]; ok {
				ri.Registered++
				ri.Cached++
				continue
			}
			there := p.seen[id]
			switch there.state {
			case layerMissing:
				if err := p.register(p.newLayer(d, layers[id])); err != nil {
					return err
				}
				ri.Registered++
				ri.Cached++
				continue
			case layerOwn:
				p.heal(there, d, layers[id])
				ri.Cached++
			}
			ri.Present++
			if !counted[id] {
				counted[id] = true
				rep.Present++
				if there.state == layerOwn {
					rep.Cached++
				}
			}
		}
		recorded, err := p.image(d, img, &ri)
		if err != nil {
			return err
		}
		recorded.Layers = len(chain)
		if old := rec.image(recorded.ID); old != nil {
			old.Names = append(old.Names, recorded.Names...)
			old.Added = append(old.Added, recorded.Added...)
		} else {
			rec.Images = append(rec.Images, recorded)
		}
		var diffIDs []digest.Digest
		for _, id := range chain {
			rec.Layers[id] = recordedLayer{layers[id].DiffID, layers[id].Directory}
			diffIDs = append(diffIDs, layers[id].DiffID)
		}
		if err := wanted.addImage(img, diffIDs); err != nil {
			return err
		}
		rep.Images = append(rep.Images, ri)
	}
	rep.Registered = len(p.planned) - before
	rep.Cached += rep.Registered
	rec.Metadata = p.missing(wanted)
	p.c.metadata.merge(rec.Metadata)
	p.c.records = append(p.c.records, rec)
	p.c.disks = append(p.c.disks, rep)
	return nil
}

// refuse says why an image cannot be registered, "" if it can.
func (p *planner) refuse(d *cachedisk.Disk, img manifest.Image, chain []digest.Digest) (string, error) {
	if len(chain) > maxLayers {
		return fmt.Sprintf("it has %d layers, docker takes %d", len(chain), maxLayers), nil
	}
	for _, id := range append([]digest.Digest{img.Config.Digest}, chain...) {
		if id.Algorithm() != digest.SHA256 {
			return fmt.Sprintf("docker's store takes sha256 digests only, not %s", id), nil
		}
	}
	for _, id := range chain {
		if p.seen[id].state == layerDamaged {
			return fmt.Sprintf("layer %s is damaged in docker's store; remove %s while docker is stopped", id, p.layerdb(id)), nil
		}
	}
	if p.hasImage(img.Config.Digest) {
		return "", nil
	}
	var left []string
	for _, n := range img.Names {
		fam, err := familiar(n)
		if err != nil {
			return "", err
		}
		if why := p.leave(d, fam, img.Config.Digest); why != "" {
			left = append(left, why)
		}
	}
	if len(left) == len(img.Names) {
		return strings.Join(left, "; "), nil
	}
	return "", nil
}

// leave says why a name is not for the image id of disk d, "" if it is. What the node
// has wins, unless we gave it the name, of a generation that is older or whose disk is
// gone.
func (p *planner) leave(d *cachedisk.Disk, n name, id digest.Digest) string {
	newer := func(cache digest.Digest) string {
		return fmt.Sprintf("%s comes from the newer cache %s", n.ref, report.Short(cache))
	}
	if c, ok := p.claimed[n]; ok {
		if c.id == id {
			return ""
		}
		return newer(c.cache)
	}
	holder := p.repos.get(n)
	if holder == "" || holder == id {
		return ""
	}
	ours := false
	var keeper *record
	for _, rec := range p.c.known {
		img := rec.image(holder)
		if img == nil {
			continue
		}
		ours = ours || slices.Contains(img.Added, n.ref)
		if slices.Contains(img.Names, n.ref) && !rec.Created.Before(d.Manifest.Created) && p.alive(rec.CacheID) {
			keeper = rec
		}
	}
	switch {
	case !ours:
		return "the node has another image as " + n.ref
	case keeper != nil:
		return newer(keeper.CacheID)
	}
	return ""
}

// alive says if the generation's disk can be read. Those of this run can, mounted yet
// or not.
func (p *planner) alive(cache digest.Digest) bool {
	return p.here[cache] || p.check(cache) == nil
}

func (p *planner) newLayer(d *cachedisk.Disk, l manifest.Layer) newLayer {
	return newLayer{
		Chain: l.ChainID, DiffID: l.DiffID, Parent: l.Parent,
		ID: ownID(l.ChainID), Link: ownLink(l.ChainID), Size: l.Size, Cache: d.ID,
		Source:   filepath.Join(mountpoint(d.ID), d.Manifest.LayerPath(l)),
		TarSplit: filepath.Join(mountpoint(d.ID), d.Manifest.TarSplitPath(l)),
	}
}

// register plans a layer. Its parent is on the node or has been planned: the node's
// own parents keep their own directories.
func (p *planner) register(l newLayer) error {
	if l.Parent != "" {
		if parent, ok := p.planned[l.Parent]; ok {
			l.Lower = lower(parent.Link, parent.Lower)
		} else {
			link, below, err := p.links(p.seen[l.Parent].id)
			if err != nil {
				return fmt.Errorf("reading layer %s: %w", l.Parent, err)
			}
			l.Lower = lower(link, below)
		}
	}
	p.planned[l.Chain] = l
	p.c.layers = append(p.c.layers, l)
	return nil
}

// heal plans to reach the files of one of our layers on this disk, if the disk that
// it was registered from is gone or its bind mount is.
func (p *planner) heal(there nodeLayer, d *cachedisk.Disk, l manifest.Layer) {
	if there.from != "" && p.alive(there.from) {
		return
	}
	if slices.ContainsFunc(p.c.relinks, func(r relink) bool { return r.Chain == l.ChainID }) {
		return
	}
	fi, err := os.Lstat(p.overlay(there.id, "diff"))
	bound := err == nil && fi.IsDir()
	if bound && p.mounted[filepath.Join(p.root, "overlay2", there.id, "diff")] {
		return
	}
	p.c.relinks = append(p.c.relinks, relink{l.ChainID, p.newLayer(d, l), bound})
}

// image plans the image's config and names.
func (p *planner) image(d *cachedisk.Disk, img manifest.Image, ri *report.Image) (recordImage, error) {
	id := img.Config.Digest
	rec := recordImage{ID: id}
	ri.State = report.Present
	if ri.Registered > 0 {
		ri.State = report.Registered
	}
	if !p.hasImage(id) {
		ri.State = report.Registered
		if !slices.ContainsFunc(p.c.images, func(n newImage) bool { return n.ID == id }) {
			p.c.images = append(p.c.images, newImage{id, img.Config.Data})
		}
	}
	var left []string
	for _, n := range img.Names {
		fam, err := familiar(n)
		if err != nil {
			return rec, err
		}
		if why := p.leave(d, fam, id); why != "" {
			left = append(left, why)
			continue
		}
		rec.Names = append(rec.Names, fam.ref)
		if _, claimed := p.claimed[fam]; claimed {
			continue
		}
		p.claimed[fam] = claim{id, d.ID}
		if was := p.repos.get(fam); was != id {
			p.c.names[fam] = newName{was, id}
			rec.Added = append(rec.Added, fam.ref)
			ri.State = report.Registered
		}
	}
	ri.Reason = strings.Join(left, "; ")
	return rec, nil
}

// bindMounts are the mount points of layers in the host's mount namespace.
func (s store) bindMounts() (map[string]bool, error) {
	points, err := cachedisk.MountsOnHost(s.hostRoot, filepath.Join(s.root, "overlay2"))
	if err != nil {
		return nil, err
	}
	targets := map[string]bool{}
	for _, p := range points {
		targets[p] = true
	}
	return targets, nil
}
