package imagecache

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"path"
	"strings"

	"github.com/opencontainers/go-digest"

	"github.com/selkies-project/packer-plugin-selkies/manifest"
)

// verifyDisk checks that the disk has the manifest that was written and every
// layer directory that it names.
func verifyDisk(ctx context.Context, r *vm, root string, data []byte) error {
	name := path.Join(root, manifest.Path)
	got, err := r.run(ctx, "cat", name)
	if err != nil {
		return fmt.Errorf("reading the layer manifest back: %w", err)
	}
	if !bytes.Equal(got, data) {
		return fmt.Errorf("reading the layer manifest back: %s is not what was written; is the disk sound?", name)
	}
	m, err := manifest.Decode(got)
	if err != nil {
		return fmt.Errorf("reading the layer manifest back: %w", err)
	}
	store := path.Join(root, m.Store.Root, manifest.DriverOverlay2)
	out, err := r.run(ctx, "find", store, "-mindepth", "2", "-maxdepth", "2", "-name", "diff", "-type", "d", "-printf", `%P\0`)
	if err != nil {
		return fmt.Errorf("listing the layers on the disk: %w", err)
	}
	have := map[string]bool{}
	for p := range strings.SplitSeq(string(out), "\x00") {
		have[path.Dir(p)] = true
	}
	for _, l := range m.Layers {
		if !have[l.Directory] {
			return fmt.Errorf("layer %s has no directory %s/%s/diff", l.ChainID, store, l.Directory)
		}
	}
	return nil
}

// verifyContent reads the images back through the Engine API and checks that every
// layer hashes to its diff ID. Docker names the layers in such an archive
// differently from version to version, so that all files are hashed and the diff
// IDs looked for among them.
func verifyContent(ctx context.Context, e *engine, images []*wanted) error {
	missing := map[digest.Digest]*wanted{}
	var ids []string
	for _, w := range images {
		diffIDs, err := w.image.DiffIDs()
		if err != nil {
			return err
		}
		for _, d := range diffIDs {
			missing[d] = w
		}
		ids = append(ids, w.id())
	}
	stream, err := e.ImageSave(ctx, ids)
	if err != nil {
		return fmt.Errorf("reading the images back: %w", err)
	}
	defer stream.Close()
	archive := tar.NewReader(stream)
	for {
		h, err := archive.Next()
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return fmt.Errorf("reading the images back: %w", err)
		}
		if h.Typeflag != tar.TypeReg {
			continue
		}
		hash := sha256.New()
		if _, err := io.Copy(hash, archive); err != nil {
			return fmt.Errorf("reading the images back: %w", err)
		}
		delete(missing, digest.NewDigest(digest.SHA256, hash))
	}
	for d, w := range missing {
		return fmt.Errorf("layer %s of %s does not hash to its diff ID; is the disk sound?", d, w)
	}
	return nil
}
