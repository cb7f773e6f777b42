package docker

import (
	"crypto/sha256"
	"encoding/base32"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"

	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/selkies-project/packer-plugin-selkies/injector/cachedisk"
	"github.com/selkies-project/packer-plugin-selkies/manifest"
)

// stateName names our directory in Docker's image directory and our file among an
// image's metadata. dockerd reads both places by key and ignores it.
const stateName = "selkies-image-cache"

// store is the overlay2 graph driver's store below a Docker data root.
type store struct {
	hostRoot string // where the host's root is mounted
	root     string // the data root as the host sees it
}

// host is the path of a host's file as this process sees it.
func (s store) host(elem ...string) string {
	return cachedisk.HostPath(s.hostRoot, filepath.Join(elem...))
}

func (s store) overlay(elem ...string) string {
	return s.host(append([]string{s.root, "overlay2"}, elem...)...)
}

func (s store) image(elem ...string) string {
	return s.host(append([]string{s.root, "image", "overlay2"}, elem...)...)
}

func (s store) layerdb(chain digest.Digest) string {
	return s.image("layerdb", chain.Algorithm().String(), chain.Encoded())
}

func (s store) imageContent(id digest.Digest) string {
	return s.image("imagedb", "content", id.Algorithm().String(), id.Encoded())
}

func (s store) imageMarker(id digest.Digest) string {
	return s.image("imagedb", "metadata", id.Algorithm().String(), id.Encoded(), stateName)
}

// mountpoint is where the generation's disk is mounted, as the host sees it.
func mountpoint(id digest.Digest) string {
	return filepath.Join(StateDir, id.Encoded())
}

// checker says why a generation's disk cannot be read at its mount point, or nil if it
// can.
type checker func(cache digest.Digest) error

// checker looks at each disk once: one that hangs takes its time to be found out.
func (s store) checker() checker {
	known := map[digest.Digest]error{}
	return func(cache digest.Digest) error {
		err, ok := known[cache]
		if !ok {
			err = cachedisk.CheckOnHost(s.hostRoot, mountpoint(cache), cache)
			known[cache] = err
		}
		return err
	}
}

var errNoStore = errors.New("no overlay2 store")

// check refuses a data root that holds no overlay2 store, or one for remapped users.
func (s store) check() error {
	if remapped.MatchString(filepath.Base(s.root)) {
		return fmt.Errorf("docker data root %s is one of userns-remap, whose layers have shifted owners; remove userns-remap from daemon.json to use a cache disk", s.root)
	}
	for _, dir := range []string{s.overlay("l"), s.image("layerdb"), s.image("imagedb", "content", "sha256")} {
		switch _, err := os.Stat(dir); {
		case errors.Is(err, fs.ErrNotExist):
			return fmt.Errorf("docker data root %s holds %w; start docker once with the overlay2 storage driver, or name its data root with --docker-root", s.root, errNoStore)
		case err != nil:
			return fmt.Errorf("looking at docker data root %s: %w", s.root, cachedisk.Explain(err))
		}
	}
	return nil
}

// ownID is the store directory of a layer that we registered. It follows from the
// chain ID alone, so that a run after a killed one writes the same, and so that a
// layer is known as ours by its cache-id. dockerd's own are 64 random hex digits.
func ownID(chain digest.Digest) string {
	sum := sha256.Sum256([]byte(stateName + " " + chain.String()))
	return hex.EncodeToString(sum[:])
}

// ownLink is the short name of such a directory in overlay2/l: 26 base32 digits,
// as dockerd's are, since a mount's options must fit into a page.
func ownLink(chain digest.Digest) string {
	sum := sha256.Sum256([]byte(stateName + " link " + chain.String()))
	return base32.StdEncoding.EncodeToString(sum[:])[:26]
}

// layerState is how the node has a chain ID.
type layerState int

const (
	layerMissing layerState = iota
	layerNode               // dockerd's own
	layerOwn                // registered by us
	layerDamaged            // there, but dockerd cannot load it
)

// layer says how the node has chain and, if it does, in which store directory.
func (s store) layer(chain digest.Digest) (layerState, string, error) {
	id, err := readTrimmed(filepath.Join(s.layerdb(chain), "cache-id"))
	if errors.Is(err, fs.ErrNotExist) {
		if _, err := os.Lstat(s.layerdb(chain)); err == nil {
			return layerDamaged, "", nil
		}
		return layerMissing, "", nil
	}
	if err != nil {
		return 0, "", fmt.Errorf("reading layer %s: %w", chain, err)
	}
	if id == "" || id != filepath.Base(id) {
		return layerDamaged, "", nil
	}
	_, err = os.Lstat(s.overlay(id, "link"))
	own := id == ownID(chain)
	switch {
	case errors.Is(err, fs.ErrNotExist) && own:
		return layerMissing, "", nil
	case errors.Is(err, fs.ErrNotExist):
		return layerDamaged, "", nil
	case err != nil:
		return 0, "", fmt.Errorf("reading layer %s: %w", chain, err)
	case own:
		return layerOwn, id, nil
	}
	return layerNode, id, nil
}

// lower is the content of the lower file of a layer whose parent has the given
// link and lower: the parents, topmost first.
func lower(parentLink, parentLower string) string {
	l := "l/" + parentLink
	if parentLower != "" {
		l += ":" + parentLower
	}
	return l
}

// The contents of a link file and of a lower file, as dockerd writes them and puts them
// into the options of a mount.
var (
	linkFile  = regexp.MustCompile(`^[A-Za-z0-9]+$`)
	lowerFile = regexp.MustCompile(`^(l/[A-Za-z0-9]+(:l/[A-Za-z0-9]+)*)?$`)
)

// links reads the link and lower of a store directory.
func (s store) links(id string) (link, lower string, err error) {
	if link, err = readTrimmed(s.overlay(id, "link")); err != nil {
		return "", "", err
	}
	if !linkFile.MatchString(link) {
		return "", "", fmt.Errorf("%s: %q is no name of a link", s.overlay(id, "link"), link)
	}
	lower, err = readTrimmed(s.overlay(id, "lower"))
	if errors.Is(err, fs.ErrNotExist) {
		err = nil
	}
	if err == nil && !lowerFile.MatchString(lower) {
		err = fmt.Errorf("%s: %q is no list of links", s.overlay(id, "lower"), lower)
	}
	return link, lower, err
}

// generation is the cache ID that an own layer's diff points into, and "" if it is
// no symbolic link of ours.
func (s store) generation(id string) digest.Digest {
	target, err := os.Readlink(s.overlay(id, "diff"))
	if err != nil {
		return ""
	}
	rest, ok := strings.CutPrefix(target, StateDir+"/")
	if !ok {
		return ""
	}
	encoded, _, _ := strings.Cut(rest, "/")
	d := digest.NewDigestFromEncoded(digest.SHA256, encoded)
	if manifest.ValidDigest(d) != nil {
		return ""
	}
	return d
}

// ownLayers lists the registered layers that are ours, with their directories.
func (s store) ownLayers() (map[digest.Digest]string, error) {
	entries, err := os.ReadDir(s.image("layerdb", "sha256"))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("listing docker's layers: %w", err)
	}
	own := map[digest.Digest]string{}
	for _, e := range entries {
		chain := digest.NewDigestFromEncoded(digest.SHA256, e.Name())
		if chain.Validate() != nil {
			continue
		}
		id, err := readTrimmed(filepath.Join(s.layerdb(chain), "cache-id"))
		if err == nil && id == ownID(chain) {
			own[chain] = id
		}
	}
	return own, nil
}

// chain lists the chain IDs from top down to its base layer.
func (s store) chain(top digest.Digest) ([]digest.Digest, error) {
	var ids []digest.Digest
	for id := top; id != ""; {
		ids = append(ids, id)
		parent, err := readTrimmed(filepath.Join(s.layerdb(id), "parent"))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return nil, fmt.Errorf("reading layer %s: %w", id, err)
		}
		id = digest.Digest(parent)
		if id != "" && id.Validate() != nil || len(ids) > 1000 {
			return nil, fmt.Errorf("reading layer %s: its parent %q is no chain ID", top, parent)
		}
	}
	return ids, nil
}

// imageChain is the chain ID of the image's top layer, "" if it has no layers.
func (s store) imageChain(id digest.Digest) (digest.Digest, error) {
	b, err := os.ReadFile(s.imageContent(id))
	if err != nil {
		return "", fmt.Errorf("reading image %s: %w", id, err)
	}
	var config ocispec.Image
	if err := json.Unmarshal(b, &config); err != nil {
		return "", fmt.Errorf("reading image %s: %w", id, err)
	}
	if len(config.RootFS.DiffIDs) == 0 {
		return "", nil
	}
	for _, d := range config.RootFS.DiffIDs {
		if err := d.Validate(); err != nil {
			return "", fmt.Errorf("reading image %s: layer %q: %w", id, d, err)
		}
	}
	return identity.ChainID(config.RootFS.DiffIDs), nil
}

func (s store) hasImage(id digest.Digest) bool {
	_, err := os.Lstat(s.imageContent(id))
	return err == nil
}

// ownsImage says if the image's config was put there by us.
func (s store) ownsImage(id digest.Digest) bool {
	_, err := os.Lstat(s.imageMarker(id))
	return err == nil && s.hasImage(id)
}

func readTrimmed(name string) (string, error) {
	b, err := os.ReadFile(name)
	return strings.TrimSpace(string(b)), err
}
