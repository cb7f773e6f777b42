package docker

import (
	"encoding/json"
	"fmt"
	"os"
	"slices"
	"sync"

	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	"golang.org/x/sync/errgroup"

	"github.com/selkies-project/packer-plugin-selkies/manifest"
)

// dockerd's distribution metadata ties the compressed blobs of registries to the
// layers of its store: without it a pull of a newer tag would fetch layers that
// are there, and a push would upload what the registry has.

// blobSource is one entry of v2metadata-by-diffid, in dockerd's own field names. An
// empty HMAC means that no credentials were needed.
type blobSource struct {
	Digest           digest.Digest
	SourceRepository string
	HMAC             string
}

// maxSources is how many sources dockerd keeps of one layer.
const maxSources = 50

// metadata is distribution metadata to add, by diff ID and by blob digest.
type metadata struct {
	Sources map[digest.Digest][]blobSource  `json:"sources,omitempty"`
	DiffIDs map[digest.Digest]digest.Digest `json:"diffIDs,omitempty"`
}

func newMetadata() metadata {
	return metadata{map[digest.Digest][]blobSource{}, map[digest.Digest]digest.Digest{}}
}

func (s store) sourcesFile(diffID digest.Digest) string {
	return s.image("distribution", "v2metadata-by-diffid", diffID.Algorithm().String(), diffID.Encoded())
}

func (s store) diffIDFile(blob digest.Digest) string {
	return s.image("distribution", "diffid-by-digest", blob.Algorithm().String(), blob.Encoded())
}

// addImage adds the blobs of the image, which has layers with these diff IDs, with every
// repository that has a name of it.
func (m metadata) addImage(img manifest.Image, diffIDs []digest.Digest) error {
	blobs, err := img.LayerBlobs()
	if err != nil {
		return err
	}
	var repos []string
	for _, n := range img.Names {
		ref, err := reference.ParseNormalizedNamed(n)
		if err != nil {
			return err
		}
		if repo := reference.TrimNamed(ref).Name(); !slices.Contains(repos, repo) {
			repos = append(repos, repo)
		}
	}
	for i, blob := range blobs {
		m.DiffIDs[blob.Digest] = diffIDs[i]
		for _, repo := range repos {
			m.addSource(diffIDs[i], blobSource{Digest: blob.Digest, SourceRepository: repo})
		}
	}
	return nil
}

func (m metadata) addSource(diffID digest.Digest, src blobSource) {
	if !slices.Contains(m.Sources[diffID], src) {
		m.Sources[diffID] = append(m.Sources[diffID], src)
	}
}

// missing is the part of m that the node does not have, or has without its contents
// after a power loss: these files are not durable at once, and dockerd believes them.
// What the node has found out by its own pulls is not the disk's to say.
func (s store) missing(m metadata) metadata {
	left := newMetadata()
	var diffIDs sync.WaitGroup
	diffIDs.Go(func() {
		for blob, diffID := range m.DiffIDs {
			if s.diffIDOf(blob) == "" {
				left.DiffIDs[blob] = diffID
			}
		}
	})
	for diffID, sources := range m.Sources {
		there := s.readSources(diffID)
		for _, src := range sources {
			if !slices.Contains(there, src) && len(there)+len(left.Sources[diffID]) < maxSources {
				left.addSource(diffID, src)
			}
		}
	}
	diffIDs.Wait()
	return left
}

// diffIDOf is the layer that the node knows a blob to be, "" where it knows none.
func (s store) diffIDOf(blob digest.Digest) digest.Digest {
	b, err := os.ReadFile(s.diffIDFile(blob))
	if id := digest.Digest(b); err == nil && manifest.ValidDigest(id) == nil {
		return id
	}
	return ""
}

// readSources is empty for a file that is missing or unreadable: dockerd too starts
// anew then, it is a cache.
func (s store) readSources(diffID digest.Digest) []blobSource {
	var sources []blobSource
	b, err := os.ReadFile(s.sourcesFile(diffID))
	if err != nil || json.Unmarshal(b, &sources) != nil {
		return nil
	}
	return sources
}

// addMetadata writes m to the node's.
func (s store) addMetadata(m metadata) error {
	var g errgroup.Group
	g.Go(func() error { return s.addDiffIDs(m) })
	g.Go(func() error { return s.addSources(m) })
	return g.Wait()
}

func (s store) addDiffIDs(m metadata) error {
	for blob, diffID := range m.DiffIDs {
		if err := writeFile(s.diffIDFile(blob), []byte(diffID), 0o644); err != nil {
			return fmt.Errorf("writing distribution metadata: %w", err)
		}
	}
	return nil
}

func (s store) addSources(m metadata) error {
	for diffID, sources := range m.Sources {
		all := s.readSources(diffID)
		for _, src := range sources {
			if !slices.Contains(all, src) {
				all = append(all, src)
			}
		}
		b, err := json.Marshal(all)
		if err == nil {
			err = writeFile(s.sourcesFile(diffID), b, 0o644)
		}
		if err != nil {
			return fmt.Errorf("writing distribution metadata: %w", err)
		}
	}
	return nil
}

// merge adds what other has.
func (m *metadata) merge(other metadata) {
	if m.Sources == nil || m.DiffIDs == nil {
		n := newMetadata()
		n.merge(*m)
		*m = n
	}
	for blob, diffID := range other.DiffIDs {
		m.DiffIDs[blob] = diffID
	}
	for diffID, sources := range other.Sources {
		for _, src := range sources {
			m.addSource(diffID, src)
		}
	}
}

// removeMetadata takes back what was added. dockerd reads these files anew each
// time, so this may be done while it runs.
func (s store) removeMetadata(m metadata) error {
	for blob, ours := range m.DiffIDs {
		if id := s.diffIDOf(blob); id != "" && id != ours {
			continue
		}
		if err := removeIfThere(s.diffIDFile(blob)); err != nil {
			return err
		}
	}
	for diffID, ours := range m.Sources {
		there := s.readSources(diffID)
		left := slices.DeleteFunc(slices.Clone(there), func(src blobSource) bool { return slices.Contains(ours, src) })
		name := s.sourcesFile(diffID)
		switch {
		case len(left) == 0: // or unreadable, which dockerd takes for nothing
			if err := removeIfThere(name); err != nil {
				return err
			}
		case len(left) < len(there):
			b, err := json.Marshal(left)
			if err != nil {
				return err
			}
			if err := writeFile(name, b, 0o644); err != nil {
				return err
			}
		}
	}
	// dockerd makes these on its first pull; without one they were not there.
	for _, dir := range []string{"v2metadata-by-diffid", "diffid-by-digest"} {
		os.Remove(s.image("distribution", dir, "sha256"))
		os.Remove(s.image("distribution", dir))
	}
	return nil
}
