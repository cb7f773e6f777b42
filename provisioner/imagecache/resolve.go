package imagecache

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"slices"
	"strings"

	"github.com/containerd/platforms"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"github.com/selkies-project/packer-plugin-selkies/htmlreport"
	"github.com/selkies-project/packer-plugin-selkies/internal/tlsonly"
	"github.com/selkies-project/packer-plugin-selkies/manifest"
)

// wanted is an image that the registry has for the platform, and the references
// that asked for it.
type wanted struct {
	refs []reference
	// image has everything but names that only the registry knows: the true bytes
	// of index, manifest and config.
	image manifest.Image
	// remote reads the image's blobs.
	remote v1.Image
	chain  []digest.Digest
	blobs  []ocispec.Descriptor
	pulled htmlreport.Pull // zero if the store had it
}

// id is what Docker's graph-driver store calls the image.
func (w *wanted) id() string { return w.image.Config.Digest.String() }

// pullRef is the reference by digest that the daemon is given.
func (w *wanted) pullRef() string { return w.refs[0].digested(w.image.Target().Digest) }

func (w *wanted) String() string { return w.refs[0].String() }

// names are all names of the image, sorted.
func (w *wanted) names() []string {
	var names []string
	for _, ref := range w.refs {
		names = append(names, ref.digested(w.image.Target().Digest))
		if t := ref.tag(); t != "" {
			names = append(names, t)
		}
	}
	slices.Sort(names)
	return slices.Compact(names)
}

// failure is a reference that could not be had.
type failure struct {
	ref reference
	err error
}

func (f failure) Error() string { return fmt.Sprintf("%s (%s): %v", f.ref, f.ref.from, f.err) }

// failures are one for each reference to w.
func (w *wanted) failures(err error) (failures []failure) {
	for _, ref := range w.refs {
		failures = append(failures, failure{ref, err})
	}
	return failures
}

// resolveAll resolves references in the order given, several at once. References
// to one image in one repository become one wanted; one that several registries have
// is pulled from each.
func (r *registries) resolveAll(ctx context.Context, refs []reference, platform ocispec.Platform, concurrency int) ([]*wanted, []failure, error) {
	resolved := make([]*wanted, len(refs))
	errs := make([]error, len(refs))
	var g errgroup.Group
	g.SetLimit(concurrency)
	for i, ref := range refs {
		g.Go(func() error {
			resolved[i], errs[i] = r.resolve(ctx, ref, platform)
			return nil
		})
	}
	_ = g.Wait() // errs has them
	if err := ctx.Err(); err != nil {
		return nil, nil, err
	}
	var images []*wanted
	var failures []failure
	known := map[string]*wanted{}
	for i, w := range resolved {
		if errs[i] != nil {
			failures = append(failures, failure{refs[i], errs[i]})
			continue
		}
		if same, ok := known[w.pullRef()]; ok {
			same.refs = append(same.refs, w.refs...)
			continue
		}
		known[w.pullRef()] = w
		images = append(images, w)
	}
	return images, failures, nil
}

func (r *registries) resolve(ctx context.Context, ref reference, platform ocispec.Platform) (*wanted, error) {
	// A reference with tag and digest is looked up by its digest.
	lookup := ref.named.String()
	if d := ref.pinned(); d != "" {
		lookup = ref.digested(d)
	}
	desc, err := r.get(ctx, ref, lookup)
	if err != nil {
		return nil, err
	}
	w := &wanted{refs: []reference{ref}}
	if desc.MediaType.IsIndex() {
		index := descriptor(desc.MediaType, desc.Manifest)
		w.image.Index = &index
		child, err := choose(desc.Manifest, platform)
		if err != nil {
			return nil, err
		}
		if desc, err = r.get(ctx, ref, ref.digested(child)); err != nil {
			return nil, err
		}
	}
	if !desc.MediaType.IsImage() {
		return nil, unsupported(desc.MediaType)
	}
	if w.remote, err = desc.Image(); err != nil {
		return nil, fmt.Errorf("reading the image's manifest: %w", err)
	}
	return w, w.complete(desc, platform)
}

// complete fills in what manifest and config say.
func (w *wanted) complete(desc *remote.Descriptor, platform ocispec.Platform) error {
	var m ocispec.Manifest
	if err := json.Unmarshal(desc.Manifest, &m); err != nil {
		return fmt.Errorf("reading the image's manifest: %w", err)
	}
	if !types.MediaType(m.Config.MediaType).IsConfig() {
		return fmt.Errorf("it is not a container image but an artifact (config %s)", m.Config.MediaType)
	}
	if err := checkConfigSize(m.Config.Size); err != nil {
		return err
	}
	config, err := w.remote.RawConfigFile()
	if err != nil {
		return explainRegistry(fmt.Errorf("reading the image's config: %w", err))
	}
	var c ocispec.Image
	if err := json.Unmarshal(config, &c); err != nil {
		return fmt.Errorf("reading the image's config: %w", err)
	}
	if c.OS != platform.OS || c.Architecture != platform.Architecture {
		return fmt.Errorf("it is for platform %s/%s, not %s; set platform or choose another image", c.OS, c.Architecture, platforms.Format(platform))
	}
	for i, layer := range m.Layers {
		if err := layer.Digest.Validate(); err != nil || layer.Size < 0 {
			return fmt.Errorf("its manifest's layer %d, digest %q of %d bytes, is none; push it again", i, layer.Digest, layer.Size)
		}
	}
	w.image.Manifest = descriptor(desc.MediaType, desc.Manifest)
	w.image.Config = descriptor(types.MediaType(m.Config.MediaType), config)
	w.blobs = m.Layers
	if w.chain, err = w.image.ChainIDs(); err != nil {
		return err
	}
	if len(w.chain) != len(w.blobs) {
		return fmt.Errorf("its manifest lists %d layers, its config %d", len(w.blobs), len(w.chain))
	}
	return nil
}

func (r *registries) get(ctx context.Context, ref reference, s string) (*remote.Descriptor, error) {
	parsed, err := r.parse(ref, s)
	if err != nil {
		return nil, err
	}
	desc, err := remote.Get(parsed, r.options(ctx, ref.registry())...)
	if err != nil {
		return nil, explainRegistry(err)
	}
	return desc, nil
}

// choose picks the manifest of an index for the platform, as Docker would: the
// best match, the first of equal ones.
func choose(index []byte, platform ocispec.Platform) (digest.Digest, error) {
	var idx ocispec.Index
	if err := json.Unmarshal(index, &idx); err != nil {
		return "", fmt.Errorf("reading the image's index: %w", err)
	}
	match := platforms.Only(platform)
	var best *ocispec.Descriptor
	var has []string
	for i, m := range idx.Manifests {
		if m.Platform == nil {
			continue
		}
		if m.Platform.OS != "unknown" { // attestations
			has = append(has, platforms.Format(*m.Platform))
		}
		if match.Match(*m.Platform) && (best == nil || match.Less(*m.Platform, *best.Platform)) {
			best = &idx.Manifests[i]
		}
	}
	if best == nil {
		return "", fmt.Errorf("it is for %s, not for platform %s; set platform or choose another image", strings.Join(has, ", "), platforms.Format(platform))
	}
	if err := best.Digest.Validate(); err != nil {
		return "", fmt.Errorf("reading the image's index: digest %q: %w", best.Digest, err)
	}
	return best.Digest, nil
}

func descriptor(mediaType types.MediaType, data []byte) ocispec.Descriptor {
	return ocispec.Descriptor{
		MediaType: string(mediaType),
		Digest:    digest.FromBytes(data),
		Size:      int64(len(data)),
		Data:      data,
	}
}

func unsupported(mediaType types.MediaType) error {
	if mediaType == types.DockerManifestSchema1 || mediaType == types.DockerManifestSchema1Signed {
		return errors.New("its manifest is of Docker's schema 1, which neither Docker nor containerd reads any more; push it again")
	}
	return fmt.Errorf("its manifest is of the unknown type %s", mediaType)
}

// What Go's libraries say of registries without TLS and with certificates that nobody
// vouches for, here and in Docker.
const (
	plainHTTP          = "http: server gave HTTP response to HTTPS client"
	unknownCertificate = "x509: certificate signed by unknown authority"
)

// explainRegistry turns a registry's answer into one line with a remedy.
func explainRegistry(err error) error {
	if e, ok := errors.AsType[*transport.Error](err); ok {
		switch e.StatusCode {
		case http.StatusNotFound:
			return errors.New("the registry has no such image; check name, tag and digest")
		case http.StatusUnauthorized, http.StatusForbidden:
			return fmt.Errorf("the registry refused access (%d %s); set registry_auth", e.StatusCode, http.StatusText(e.StatusCode))
		}
		return err
	}
	if strings.Contains(err.Error(), plainHTTP) {
		return fmt.Errorf("%w; set insecure_registries", err)
	}
	if strings.Contains(err.Error(), unknownCertificate) {
		return fmt.Errorf("%w; make the Packer host trust its authority, or set insecure_registries", err)
	}
	if _, ok := errors.AsType[*net.OpError](err); ok {
		return fmt.Errorf("%w; the Packer host reads manifests itself, so it needs a way to the registry too: set HTTPS_PROXY there, or insecure_registries if it speaks plain HTTP", err)
	}
	if errors.Is(err, tlsonly.ErrPlainHTTP) {
		return fmt.Errorf("%w; set insecure_registries", err)
	}
	return err
}
