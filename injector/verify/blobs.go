package verify

import (
	"context"
	"fmt"
	"io"
	"path"

	"github.com/opencontainers/go-digest"

	"github.com/selkies-project/packer-plugin-selkies/manifest"
)

// blob is a compressed layer that the disk keeps.
type blob struct {
	digest digest.Digest
	size   int64
}

func (b blob) path() string {
	return path.Join(manifest.BlobsDir, b.digest.Algorithm().String(), b.digest.Encoded())
}

// blobsOf are the blobs that the disk keeps, each once, by a layer that is unpacked
// from it.
func blobsOf(m *manifest.Manifest) (map[digest.Digest][]blob, error) {
	if !m.Store.Blobs {
		return nil, nil
	}
	blobs, seen := map[digest.Digest][]blob{}, map[digest.Digest]bool{}
	for _, img := range m.Images {
		chain, err := img.ChainIDs()
		if err != nil {
			return nil, err
		}
		list, err := img.LayerBlobs()
		if err != nil {
			return nil, err
		}
		for i, b := range list {
			if !seen[b.Digest] {
				seen[b.Digest] = true
				blobs[chain[i]] = append(blobs[chain[i]], blob{b.Digest, b.Size})
			}
		}
	}
	return blobs, nil
}

// layerBlobs verifies the blobs of the layer.
func (r *run) layerBlobs(ctx context.Context, l manifest.Layer, tell func()) ([]string, error) {
	var problems []string
	for _, b := range r.blobs[l.ChainID] {
		problem, err := r.blob(ctx, b, tell)
		if err != nil {
			return problems, err
		}
		if problem != "" {
			problems = append(problems, problem)
		}
	}
	return problems, nil
}

func (r *run) blob(ctx context.Context, b blob, tell func()) (problem string, err error) {
	f, err := r.root.Open(b.path())
	if err != nil {
		return "", fmt.Errorf("opening its blob: %w", err)
	}
	defer f.Close()
	if err := r.claim(b.size); err != nil {
		return "", err
	}
	digester := b.digest.Algorithm().Digester()
	buf := make([]byte, chunk)
	for left := b.size + 1; left > 0; {
		if err := r.count(ctx, int(min(left, chunk)), tell); err != nil {
			return "", err
		}
		n, err := io.ReadFull(f, buf[:min(left, chunk)])
		digester.Hash().Write(buf[:n])
		left -= int64(n)
		if err == io.EOF || err == io.ErrUnexpectedEOF {
			break
		}
		if err != nil {
			return "", fmt.Errorf("reading its blob: %w", err)
		}
	}
	if got := digester.Digest(); got != b.digest {
		return fmt.Sprintf("its blob %s hashes to %s", b.path(), got), nil
	}
	return "", nil
}
