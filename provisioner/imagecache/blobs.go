package imagecache

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/docker/go-units"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/selkies-project/packer-plugin-selkies/manifest"
)

// blobStore keeps compressed layers on the disk beside Docker's store, which
// throws them away when it has extracted them.
type blobStore struct {
	vm  *vm
	dir string
}

func newBlobStore(r *vm, root string) *blobStore {
	return &blobStore{vm: r, dir: path.Join(root, manifest.BlobsDir)}
}

func (s *blobStore) path(d digest.Digest) string {
	return path.Join(s.dir, d.Algorithm().String(), d.Encoded())
}

// keep copies the blobs that are missing from the registries to the disk, several at
// once. What is in place was checked against its digest on its way there.
func (s *blobStore) keep(ctx context.Context, images []*wanted, concurrency int, patience patience) (kept []*wanted, failures []failure, err error) {
	// As Docker's own directory: wherever a node mounts the disk, private layers are root's alone.
	if _, err := s.vm.run(ctx, "install", "--directory", "--mode=700", s.dir, path.Join(s.dir, digest.SHA256.String())); err != nil {
		return nil, nil, fmt.Errorf("making the directory for blobs: %w", err)
	}
	have, err := s.list(ctx)
	if err != nil {
		return nil, nil, err
	}
	p := newProgress("keeping blobs", time.Now())
	var missing []*blob
	known := map[digest.Digest]*blob{}
	for _, w := range images {
		ip := p.add(w)
		for _, d := range w.blobs {
			size, there := have[d.Digest]
			there = there && size == d.Size
			p.addBlob(ip, d.Digest, d.Size, !there)
			if !there && known[d.Digest] == nil {
				known[d.Digest] = &blob{Descriptor: d, image: w}
				missing = append(missing, known[d.Digest])
			}
		}
	}
	var errs []error
	p.during(ctx, patience.say, func() {
		errs, err = each(ctx, concurrency, missing, func(ctx context.Context, b *blob) error {
			return patience.try(ctx, "keeping "+b.String(), func() error { return s.copy(ctx, b, p) })
		})
	})
	if err != nil {
		return nil, nil, err
	}
	failed := map[digest.Digest]error{}
	for i, b := range missing {
		if errs[i] != nil {
			failed[b.Digest] = fmt.Errorf("keeping %s: %w", b, errs[i])
		}
	}
	for _, w := range images {
		i := slices.IndexFunc(w.blobs, func(d ocispec.Descriptor) bool { return failed[d.Digest] != nil })
		if i >= 0 {
			failures = append(failures, w.failures(failed[w.blobs[i].Digest])...)
			continue
		}
		kept = append(kept, w)
	}
	if _, err := s.vm.run(ctx, "sync", "--file-system", s.dir); err != nil {
		return nil, nil, fmt.Errorf("flushing blobs: %w", err)
	}
	done, _, there := p.counts()
	patience.say("copied %s of blobs, kept %s", units.HumanSize(float64(done)), units.HumanSize(float64(there)))
	return kept, failures, nil
}

// blob is a layer as the registry of an image serves it.
type blob struct {
	ocispec.Descriptor
	image *wanted
}

func (b *blob) String() string { return fmt.Sprintf("blob %s of %s", b.Digest, b.image) }

func (s *blobStore) copy(ctx context.Context, b *blob, p *progress) error {
	hash, err := v1.NewHash(b.Digest.String())
	if err != nil {
		return err
	}
	layer, err := b.image.remote.LayerByDigest(hash)
	if err != nil {
		return err
	}
	// The reader fails at its end if the bytes are not those of the digest.
	content, err := layer.Compressed()
	if e, ok := errors.AsType[*transport.Error](err); ok && e.StatusCode == http.StatusNotFound {
		return errors.New("not found in the registry; push the image again")
	} else if err != nil {
		return explainRegistry(err)
	}
	defer content.Close()
	counted := &countingReader{r: content, count: func(n int64) { p.moved(b.Digest, n) }}
	name := s.path(b.Digest)
	if err := s.vm.replaceFile(ctx, name, counted); err != nil {
		if strings.Contains(err.Error(), "No space left on device") {
			return errDiskFull
		}
		return err
	}
	// The SSH communicator reports exit status 0 for a command whose connection broke.
	out, err := s.vm.run(ctx, "stat", "--format=%s", name)
	if err != nil {
		return err
	}
	if got := strings.TrimSpace(string(out)); got != strconv.FormatInt(b.Size, 10) {
		return fmt.Errorf("%q of %d bytes arrived", got, b.Size)
	}
	return nil
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

func wantedBlobs(images []*wanted) map[digest.Digest]bool {
	blobs := map[digest.Digest]bool{}
	for _, w := range images {
		for _, b := range w.blobs {
			blobs[b.Digest] = true
		}
	}
	return blobs
}

// remove removes all blobs.
func (s *blobStore) remove(ctx context.Context) error {
	if _, err := s.vm.run(ctx, "rm", "--recursive", "--force", s.dir); err != nil {
		return fmt.Errorf("removing blobs: %w", err)
	}
	return nil
}

// prune removes all blobs but some.
func (s *blobStore) prune(ctx context.Context, keep map[digest.Digest]bool) error {
	have, err := s.list(ctx)
	if err != nil {
		return err
	}
	for d := range have {
		if keep[d] {
			continue
		}
		if _, err := s.vm.run(ctx, "rm", s.path(d)); err != nil {
			return fmt.Errorf("removing blob %s: %w", d, err)
		}
	}
	return nil
}

// countingReader tells how many bytes have been read.
type countingReader struct {
	r     io.Reader
	n     int64
	count func(n int64)
}

func (c *countingReader) Read(p []byte) (int, error) {
	n, err := c.r.Read(p)
	c.n += int64(n)
	c.count(c.n)
	return n, err
}
