package docker

import (
	"context"
	"fmt"
	"slices"

	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"

	"github.com/selkies-project/packer-plugin-selkies/injector/cachedisk"
	"github.com/selkies-project/packer-plugin-selkies/injector/report"
)

// Plan says of each reference what docker run would find, once the disks are
// injected. It changes nothing and asks no registry.
func (r *Runtime) Plan(_ context.Context, disks []*cachedisk.Disk, refs []string) ([]report.Reference, error) {
	disks = cachedisk.NewestFirst(disks)
	rd, err := r.reader()
	if err != nil {
		return nil, err
	}
	c, err := r.plan(disks, rd.check)
	if err != nil {
		return nil, err
	}
	repos, err := r.readRepositories()
	if err != nil {
		return nil, err
	}
	answers := []report.Reference{}
	for _, ref := range refs {
		fam, err := familiar(ref)
		if err != nil {
			return nil, fmt.Errorf("reference %w", err)
		}
		a, err := rd.planOne(disks, c, repos, fam)
		if err != nil {
			return nil, fmt.Errorf("reference %q: %w", ref, err)
		}
		a.Reference = ref
		answers = append(answers, a)
	}
	return answers, nil
}

// planOne answers for one name; c is what inject would change for the disks.
func (r *reader) planOne(disks []*cachedisk.Disk, c *changes, repos *repositories, n name) (report.Reference, error) {
	if id := repos.get(n); id != "" && r.hasImage(id) {
		return r.onNode(id)
	}
	named, err := reference.ParseNormalizedNamed(n.ref)
	if err != nil {
		return report.Reference{}, err
	}
	var digested digest.Digest
	if d, ok := named.(reference.Digested); ok {
		digested = d.Digest()
	}
	for i, d := range disks {
		for k, img := range d.Manifest.Images {
			chain, err := img.ChainIDs()
			if err != nil {
				return report.Reference{}, err
			}
			a := report.Reference{Layers: len(chain), Cached: len(chain)}
			switch {
			case slices.Contains(img.Names, named.String()) && c.names[n].id == img.Config.Digest:
				a.Cover, a.Reason = report.Hit, fmt.Sprintf("on cache disk %s; inject registers it", d.Dir)
				return a, nil
			case slices.Contains(img.Names, named.String()):
				return report.Reference{Cover: report.Miss, Layers: len(chain),
					Reason: fmt.Sprintf("on cache disk %s, but inject leaves it out: %s", d.Dir, c.disks[i].Images[k].Reason)}, nil
			case digested != "" && (digested == img.Manifest.Digest || digested == img.Target().Digest):
				a.Cover = report.Partial
				a.Reason = fmt.Sprintf("cache disk %s has this image as %s; a pull fetches its manifest and config only", d.Dir, img.Names[0])
				return a, nil
			}
		}
	}
	return report.Nowhere(n.ref, cachedisk.InRepository(disks, named.Name())), nil
}

// onNode looks at an image that the node has, whose layers may be on a disk that is
// not there.
func (r *reader) onNode(id digest.Digest) (report.Reference, error) {
	top, err := r.imageChain(id)
	if err != nil {
		return report.Reference{}, err
	}
	a := report.Reference{Cover: report.Hit, Reason: "on the node, as image " + report.Short(id)}
	if top == "" {
		return a, nil
	}
	chain, err := r.chain(top)
	if err != nil {
		return report.Reference{}, err
	}
	a.Layers = len(chain)
	for _, c := range chain {
		if err := r.readable(c); err != nil {
			a.Cover, a.Reason = report.Partial, fmt.Sprintf("on the node, but %v; attach its cache disk and run inject", err)
			continue
		}
		a.Cached++
	}
	if a.Cached == 0 {
		a.Cover = report.Miss
	}
	return a, nil
}
