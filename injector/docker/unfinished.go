package docker

import (
	"archive/tar"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"slices"

	"github.com/docker/docker/api/types/image"
	"github.com/docker/docker/client"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// What an inject that was cut off has left and no other run has completed: layers that
// it had registered before the images that have them, and what it had prepared.

// removeOrphans has dockerd remove the layers of going generations that no image has.
// dockerd removes a layer with its last user, and these never had one. So each gets an
// image, by a docker load, which takes the layers that are there from the store and not
// from its archive, and then the image is removed.
func (e *ejection) removeOrphans(ctx context.Context) error {
	tops, err := e.orphans()
	if err != nil {
		return err
	}
	for _, chain := range tops {
		if err := e.adoptAndRemove(ctx, chain); err != nil {
			return fmt.Errorf("removing layer %s, which no image has: %w", chain[0], explain(err))
		}
	}
	return nil
}

// orphans lists the chains of the topmost layers that going generations supply and no
// image has, each from its top down.
func (e *ejection) orphans() (tops [][]digest.Digest, err error) {
	own, err := e.ownLayers()
	if err != nil {
		return nil, err
	}
	if err := e.forgetUsed(own); err != nil {
		return nil, err
	}
	below := map[digest.Digest]bool{}
	for chain, dir := range own {
		if e.supplier(chain, dir) == nil {
			continue
		}
		ids, err := e.chain(chain)
		if err != nil {
			return nil, err
		}
		tops = append(tops, ids)
		for _, id := range ids[1:] {
			below[id] = true
		}
	}
	return slices.DeleteFunc(tops, func(ids []digest.Digest) bool { return below[ids[0]] }), nil
}

// forgetUsed removes from layers those that images have.
func (e *ejection) forgetUsed(layers map[digest.Digest]string) error {
	entries, err := os.ReadDir(e.store.image("imagedb", "content", "sha256"))
	if err != nil {
		return fmt.Errorf("listing docker's images: %w", err)
	}
	for _, entry := range entries {
		id := digest.NewDigestFromEncoded(digest.SHA256, entry.Name())
		if id.Validate() != nil {
			continue
		}
		top, err := e.imageChain(id)
		if err != nil {
			continue // dockerd passes it over as well
		}
		ids, err := e.chain(top)
		if err != nil {
			return err
		}
		for _, id := range ids {
			delete(layers, id)
		}
	}
	return nil
}

func (e *ejection) adoptAndRemove(ctx context.Context, chain []digest.Digest) error {
	config := ocispec.Image{Platform: ocispec.Platform{OS: "linux", Architecture: runtime.GOARCH}, RootFS: ocispec.RootFS{Type: "layers"}}
	for _, id := range slices.Backward(chain) {
		diffID, err := readTrimmed(filepath.Join(e.layerdb(id), "diff"))
		if err != nil {
			return err
		}
		config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, digest.Digest(diffID))
	}
	b, err := json.Marshal(config)
	if err != nil {
		return err
	}
	archive, err := layerless(b, len(chain))
	if err != nil {
		return err
	}
	loaded, err := e.cli.ImageLoad(ctx, archive, client.ImageLoadWithQuiet(true))
	if err != nil {
		return err
	}
	said, err := io.ReadAll(io.LimitReader(loaded.Body, 1000))
	if err := errors.Join(err, loaded.Body.Close()); err != nil {
		return err
	}
	// dockerd tells of what goes wrong in the body only.
	if _, err := e.cli.ImageRemove(ctx, digest.FromBytes(b).String(), image.RemoveOptions{}); err != nil {
		return fmt.Errorf("%w; docker load said %q", err, said)
	}
	return nil
}

// layerless is an archive for docker load of an image whose layers it names and does not
// have.
func layerless(config []byte, layers int) (io.Reader, error) {
	manifest, err := json.Marshal([]map[string]any{{"Config": "config.json", "Layers": slices.Repeat([]string{"absent"}, layers)}})
	if err != nil {
		return nil, err
	}
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for name, content := range map[string][]byte{"config.json": config, "manifest.json": manifest} {
		if err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o600, Size: int64(len(content))}); err != nil {
			return nil, err
		}
		if _, err := w.Write(content); err != nil {
			return nil, err
		}
	}
	return &b, w.Close()
}

// clearUnfinished removes what was prepared or marked for a generation and never
// registered.
func (s store) clearUnfinished(rec *record) error {
	for chain := range rec.Layers {
		state, _, err := s.layer(chain)
		if err != nil {
			return err
		}
		if state == layerOwn {
			continue
		}
		if err := s.removeOwn(newLayer{ID: ownID(chain), Link: ownLink(chain)}); err != nil {
			return fmt.Errorf("removing what was prepared of layer %s: %w", chain, err)
		}
	}
	for _, img := range rec.Images {
		if s.hasImage(img.ID) {
			continue
		}
		marker := s.imageMarker(img.ID)
		if err := removeIfThere(marker); err != nil {
			return fmt.Errorf("removing the mark of image %s: %w", img.ID, err)
		}
		os.Remove(filepath.Dir(marker)) // if it is empty
	}
	return nil
}
