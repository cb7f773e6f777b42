package imagecache

import (
	"context"
	"errors"
	"fmt"
	"io"
	"path"
	"strconv"
	"strings"

	"github.com/docker/go-units"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/selkies-project/packer-plugin-selkies/manifest"
)

// blobStore keeps compressed layers on the disk beside Docker's store, which
// throws them away when it has extracted them.
type blobStore struct {
	vm  *vm
	dir string
	say func(format string, a ...any)
}

func newBlobStore(r *vm, root string, say func(string, ...any)) *blobStore {
	return &blobStore{vm: r, dir: path.Join(root, manifest.BlobsDir), say: say}
}

func (s *blobStore) path(d digest.Digest) string {
	return path.Join(s.dir, d.Algorithm().String(), d.Encoded())
}

// keep copies the layers that are missing from the registries to the disk. What
// is in place was checked against its digest on its way there.
func (s *blobStore) keep(ctx context.Context, images []*wanted) error {
	if _, err := s.vm.run(ctx, "mkdir", "--parents", path.Join(s.dir, digest.SHA256.String())); err != nil {
		return fmt.Errorf("making the directory for blobs: %w", err)
	}
	have, err := s.list(ctx)
	if err != nil {
		return err
	}
	for _, w := range images {
		var missing []ocispec.Descriptor
		var bytes int64
		for _, b := range w.blobs {
			if size, ok := have[b.Digest]; !ok || size != b.Size {
				missing = append(missing, b)
				bytes += b.Size
				have[b.Digest] = b.Size
			}
		}
		if len(missing) > 0 {
			s.say("keeping %d layer blobs of %s, %s", len(missing), w, units.HumanSize(float64(bytes)))
		}
		for _, b := range missing {
			if err := s.copy(ctx, w, b); err != nil {
				return fmt.Errorf("keeping blob %s of %s: %w", b.Digest, w, err)
			}
		}
	}
	if _, err := s.vm.run(ctx, "sync", "--file-system", s.dir); err != nil {
		return fmt.Errorf("flushing blobs: %w", err)
	}
	return s.check(ctx, images)
}

// check finds blobs that were cut off: the SSH communicator reports exit status 0
// for a command whose connection broke.
func (s *blobStore) check(ctx context.Context, images []*wanted) error {
	have, err := s.list(ctx)
	if err != nil {
		return err
	}
	for _, w := range images {
		for _, b := range w.blobs {
			if have[b.Digest] != b.Size {
				return fmt.Errorf("keeping blob %s of %s: %d of %d bytes arrived; build again", b.Digest, w, have[b.Digest], b.Size)
			}
		}
	}
	return nil
}

func (s *blobStore) copy(ctx context.Context, w *wanted, b ocispec.Descriptor) error {
	hash, err := v1.NewHash(b.Digest.String())
	if err != nil {
		return err
	}
	layer, err := w.remote.LayerByDigest(hash)
	if err != nil {
		return explainRegistry(err)
	}
	// The reader fails at its end if the bytes are not those of the digest.
	content, err := layer.Compressed()
	if err != nil {
		return explainRegistry(err)
	}
	defer content.Close()
	counted := &countingReader{r: content}
	err = s.vm.replaceFile(ctx, s.path(b.Digest), counted)
	switch {
	case err != nil && strings.Contains(err.Error(), "No space left on device"):
		return errDiskFull
	case err == nil && counted.n != b.Size:
		return errors.New("the registry's blob is shorter than its manifest says")
	}
	return err
}

// list is what the store has, with sizes.
func (s *blobStore) list(ctx context.Context) (map[digest.Digest]int64, error) {
	out, err := s.vm.run(ctx, "find", s.dir, "-type", "f", "-printf", `%s %P\0`)
	if err != nil {
		return nil, fmt.Errorf("listing blobs: %w", err)
	}
	have := map[digest.Digest]int64{}
	for entry := range strings.SplitSeq(string(out), "\x00") {
		n, name, _ := strings.Cut(entry, " ")
		algorithm, encoded, ok := strings.Cut(name, "/")
		size, err := strconv.ParseInt(n, 10, 64)
		if !ok || err != nil {
			continue
		}
		have[digest.NewDigestFromEncoded(digest.Algorithm(algorithm), encoded)] = size
	}
	return have, nil
}

// prune removes the blobs that no image needs, and all of them with no images.
func (s *blobStore) prune(ctx context.Context, images []*wanted) error {
	if len(images) == 0 {
		if _, err := s.vm.run(ctx, "rm", "--recursive", "--force", s.dir); err != nil {
			return fmt.Errorf("removing blobs: %w", err)
		}
		return nil
	}
	have, err := s.list(ctx)
	if err != nil {
		return err
	}
	for _, w := range images {
		for _, b := range w.blobs {
			delete(have, b.Digest)
		}
	}
	for d := range have {
		if _, err := s.vm.run(ctx, "rm", s.path(d)); err != nil {
			return fmt.Errorf("removing blob %s: %w", d, err)
		}
	}
	return nil
}

type countingReader struct {
	r io.Reader
	n int64
}

func (c *countingReader) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	return n, err
}
