package imagecache

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"strings"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
	"github.com/hashicorp/packer-plugin-sdk/useragent"

	"github.com/selkies-project/packer-plugin-selkies/internal/tlsonly"
	"github.com/selkies-project/packer-plugin-selkies/version"
)

// registryTimeout bounds the search for the injector's image.
const registryTimeout = time.Minute

// pinInjector finds the injector's image and names it by its digest from here on: one
// that nodes could not run is refused before anything changes, and a tag that moves
// changes nothing in the clusters.
func (r *run) pinInjector(ctx context.Context) error {
	c := r.config
	if c.SkipRollout {
		return nil
	}
	ref, platform := c.injector, *c.platform
	ctx, cancel := context.WithTimeout(ctx, registryTimeout)
	defer cancel()
	desc, err := remote.Get(ref, remote.WithContext(ctx), remote.WithTransport(tlsonly.Transport), remote.WithUserAgent(useragent.String(version.String())),
		remote.WithAuthFromKeychain(authn.NewMultiKeychain(authn.DefaultKeychain, c.Keychain(ctx))))
	if err != nil {
		return fmt.Errorf("injector_image %s: %w", ref, explainRegistry(err))
	}
	has, err := platformsOf(desc)
	if err != nil {
		return fmt.Errorf("injector_image %s: %w", ref, explainRegistry(err))
	}
	var others []string
	for _, p := range has {
		if p.Satisfies(platform) {
			c.InjectorImage = ref.Context().Digest(desc.Digest.String()).String()
			return nil
		}
		others = append(others, p.String())
	}
	return fmt.Errorf("injector_image %s is for %s, not for platform %s; push it for that too, or set platform to what the nodes are", ref, strings.Join(others, ", "), &platform)
}

// platformsOf are those that an image can run on.
func platformsOf(desc *remote.Descriptor) ([]v1.Platform, error) {
	if desc.MediaType.IsIndex() {
		index, err := desc.ImageIndex()
		if err != nil {
			return nil, err
		}
		return platformsIn(index)
	}
	image, err := desc.Image()
	if err != nil {
		return nil, err
	}
	config, err := image.ConfigFile()
	if err != nil {
		return nil, err
	}
	return []v1.Platform{*config.Platform()}, nil
}

// platformsIn looks into an index as runtimes do, also into indexes in it.
func platformsIn(index v1.ImageIndex) ([]v1.Platform, error) {
	m, err := index.IndexManifest()
	if err != nil {
		return nil, err
	}
	var has []v1.Platform
	for _, child := range m.Manifests {
		if child.MediaType.IsIndex() {
			inner, err := index.ImageIndex(child.Digest)
			if err != nil {
				return nil, err
			}
			more, err := platformsIn(inner)
			if err != nil {
				return nil, err
			}
			has = append(has, more...)
		}
		if child.Platform != nil && child.Platform.OS != "unknown" { // attestations
			has = append(has, *child.Platform)
		}
	}
	return has, nil
}

// explainRegistry says what to do about a registry's answer.
func explainRegistry(err error) error {
	e, ok := errors.AsType[*transport.Error](err)
	switch {
	case errors.Is(err, tlsonly.ErrPlainHTTP):
		return fmt.Errorf("asking the registry: %w; give it TLS, as nodes want it too", err)
	case !ok:
		return fmt.Errorf("asking the registry: %w; Packer has to reach it, too", err)
	case e.StatusCode == http.StatusNotFound:
		return errors.New("the registry has no such image; make injector-image PUSH=... pushes it")
	case e.StatusCode == http.StatusUnauthorized || e.StatusCode == http.StatusForbidden:
		return fmt.Errorf("the registry refuses it to Packer: %w; grant roles/artifactregistry.reader, or log in with docker login", err)
	}
	return fmt.Errorf("asking the registry: %w", err)
}
