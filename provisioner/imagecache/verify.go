package imagecache

import (
	"archive/tar"
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io"
	"math"
	"path"
	"slices"
	"strings"
	"time"

	cerrdefs "github.com/containerd/errdefs"
	"github.com/docker/go-units"
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

// verifier reads layers back through the Engine API.
type verifier struct {
	engine *engine
	say    func(format string, a ...any)
	// remedy is what to do about a damaged layer.
	remedy string
}

// verify checks that every layer hashes to its diff ID. It goes image by image, since
// Docker writes what it is about to send to its disk first.
func (v *verifier) verify(ctx context.Context, images []*wanted) error {
	p := newProgress("verifying", time.Now())
	for _, w := range images {
		inspect, err := v.engine.ImageInspect(ctx, w.id())
		if err != nil {
			return fmt.Errorf("inspecting image %s: %w", w, err)
		}
		p.addBlob(p.add(w), w.image.Config.Digest, inspect.Size, true)
	}
	var err error
	p.during(ctx, v.say, func() { err = v.verifyAll(ctx, images, p) })
	if err != nil {
		return err
	}
	_, total, _ := p.counts()
	v.say("verified %d images, %s", len(images), units.HumanSize(float64(total)))
	return nil
}

func (v *verifier) verifyAll(ctx context.Context, images []*wanted, p *progress) error {
	proven := map[digest.Digest]bool{}
	for _, w := range images {
		diffIDs, err := w.image.DiffIDs()
		if err != nil {
			return err
		}
		unproven := func(d digest.Digest) bool { return !proven[d] }
		if slices.ContainsFunc(diffIDs, unproven) {
			if err := v.read(ctx, w, proven, p); err != nil {
				return fmt.Errorf("reading the layers of %s back: %w", w, err)
			}
		}
		if i := slices.IndexFunc(diffIDs, unproven); i >= 0 {
			return fmt.Errorf("layer %s of %s does not hash to its diff ID; %s", diffIDs[i], w, v.remedy)
		}
		p.moved(w.image.Config.Digest, math.MaxInt64)
	}
	return nil
}

// read adds the digest of every file in Docker's archive of an image to seen. Docker
// names layers in there differently from version to version.
func (v *verifier) read(ctx context.Context, w *wanted, seen map[digest.Digest]bool, p *progress) error {
	stream, err := v.engine.ImageSave(ctx, []string{w.id()})
	if cerrdefs.IsInternal(err) {
		// Docker checks files against the checksums that it has of them.
		if strings.Contains(err.Error(), noSpace) {
			return errDiskFull
		}
		return fmt.Errorf("%w; %s", err, v.remedy)
	}
	if err != nil {
		return err
	}
	defer stream.Close()
	archive := tar.NewReader(&countingReader{r: stream, count: func(n int64) { p.moved(w.image.Config.Digest, n) }})
	for {
		h, err := archive.Next()
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err != nil {
			return err
		}
		if h.Typeflag != tar.TypeReg {
			continue
		}
		hash := sha256.New()
		if _, err := io.Copy(hash, archive); err != nil {
			return err
		}
		seen[digest.NewDigest(digest.SHA256, hash)] = true
	}
}
