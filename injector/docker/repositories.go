package docker

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"

	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
)

// repositories is dockerd's repositories.json: by familiar repository name
// ("debian"), the familiar references ("debian:12", "debian@sha256:...") and the
// image each stands for.
type repositories struct {
	Repositories map[string]map[string]digest.Digest
}

func (s store) readRepositories() (*repositories, error) {
	r := &repositories{Repositories: map[string]map[string]digest.Digest{}}
	name := s.image("repositories.json")
	b, err := os.ReadFile(name)
	if errors.Is(err, fs.ErrNotExist) {
		return r, nil
	}
	if err == nil {
		err = json.Unmarshal(b, r)
	}
	if err != nil {
		return nil, fmt.Errorf("reading docker's image names %s: %w", name, err)
	}
	if r.Repositories == nil {
		r.Repositories = map[string]map[string]digest.Digest{}
	}
	return r, nil
}

// writeRepositories writes the file as dockerd does; only while it is stopped, since
// it writes back what it has in memory on the next change.
func (s store) writeRepositories(r *repositories) error {
	b, err := json.Marshal(r)
	if err != nil {
		return fmt.Errorf("writing docker's image names: %w", err)
	}
	if err := writeDurable(s.image("repositories.json"), b, 0o600); err != nil {
		return fmt.Errorf("writing docker's image names: %w", err)
	}
	return nil
}

// get returns the image that a familiar reference stands for, or "".
func (r *repositories) get(n name) digest.Digest {
	return r.Repositories[n.repository][n.ref]
}

// set makes a name stand for an image, unless it has come to stand for another than
// was said: what the node has wins.
func (r *repositories) set(n name, to newName) bool {
	repo := r.Repositories[n.repository]
	if repo == nil {
		repo = map[string]digest.Digest{}
		r.Repositories[n.repository] = repo
	}
	if repo[n.ref] != to.was {
		return false
	}
	repo[n.ref] = to.id
	return true
}

// names are the familiar references of an image.
func (r *repositories) names(id digest.Digest) []name {
	var names []name
	for repository, refs := range r.Repositories {
		for ref, image := range refs {
			if image == id {
				names = append(names, name{repository, ref})
			}
		}
	}
	return names
}

// name is a reference in Docker's familiar form.
type name struct{ repository, ref string }

// familiar turns a normalised reference ("docker.io/library/debian:12") into the
// form in which dockerd stores it. dockerd keeps the digest of a name with both.
func familiar(normalised string) (name, error) {
	ref, err := reference.ParseNormalizedNamed(normalised)
	if err != nil {
		return name{}, fmt.Errorf("%q: %w", normalised, err)
	}
	if d, ok := ref.(reference.Canonical); ok {
		if ref, err = reference.WithDigest(reference.TrimNamed(ref), d.Digest()); err != nil {
			return name{}, fmt.Errorf("%q: %w", normalised, err)
		}
	}
	ref = reference.TagNameOnly(ref)
	return name{reference.FamiliarName(ref), reference.FamiliarString(ref)}, nil
}

// tagged says if the name is a tag and not a digest.
func (n name) tagged() bool {
	ref, err := reference.ParseNormalizedNamed(n.ref)
	if err != nil {
		return false
	}
	_, ok := ref.(reference.Tagged)
	return ok
}
