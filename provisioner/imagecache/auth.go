package imagecache

import (
	"context"
	"crypto/tls"
	"fmt"
	"net/http"
	"slices"

	"github.com/docker/docker/api/types/registry"
	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/google"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	packersdk "github.com/hashicorp/packer-plugin-sdk/packer"

	"github.com/selkies-project/packer-plugin-selkies/internal/tlsonly"
)

// registries is how the Packer host reaches registries and what it proves itself
// with.
type registries struct {
	keychain authn.Keychain
	insecure []string
	// insecureTransport takes any certificate.
	insecureTransport http.RoundTripper
}

func newRegistries(c *Config) *registries {
	// What remote.DefaultTransport is, in the form that can be cloned.
	t := http.DefaultTransport.(*http.Transport).Clone()
	t.TLSClientConfig = &tls.Config{InsecureSkipVerify: true}
	return &registries{
		keychain:          authn.NewMultiKeychain(configured(c.RegistryAuth), authn.DefaultKeychain, google.Keychain),
		insecure:          c.InsecureRegistries,
		insecureTransport: t,
	}
}

// configured is the keychain of the registry_auth blocks.
type configured []RegistryAuth

func (k configured) Resolve(target authn.Resource) (authn.Authenticator, error) {
	for _, a := range k {
		if registryHost(a.Server) == registryHost(target.RegistryStr()) {
			return authn.FromConfig(authn.AuthConfig{Username: a.Username, Password: a.Password}), nil
		}
	}
	return authn.Anonymous, nil
}

// hideSecrets has the credentials of every registry filtered out of the log. It
// runs before anything else does, since the SDK's filter must not be added to
// while lines pass through it.
func (r *registries) hideSecrets(ctx context.Context, refs []reference, catalogs []*catalog) error {
	targets := map[string]authn.Resource{}
	for _, c := range catalogs {
		targets[c.host()] = c.target()
	}
	for _, ref := range refs {
		targets[ref.registry()] = ref.repository
	}
	for host, target := range targets {
		cfg, err := r.authorization(ctx, host, target)
		if err != nil {
			return err
		}
		header, err := authHeader(host, cfg)
		if err != nil {
			return err
		}
		packersdk.LogSecretFilter.Set(cfg.Password, cfg.Auth, cfg.IdentityToken, cfg.RegistryToken, header)
	}
	return nil
}

// header is the value of X-Registry-Auth for pulls from ref's registry, "" without
// credentials. Tokens that expire are renewed by their keychain.
func (r *registries) header(ctx context.Context, ref reference) (string, error) {
	cfg, err := r.authorization(ctx, ref.registry(), ref.repository)
	if err != nil {
		return "", err
	}
	return authHeader(ref.registry(), cfg)
}

func authHeader(host string, cfg *authn.AuthConfig) (string, error) {
	if *cfg == (authn.AuthConfig{}) {
		return "", nil
	}
	header, err := registry.EncodeAuthConfig(registry.AuthConfig{
		Username:      cfg.Username,
		Password:      cfg.Password,
		IdentityToken: cfg.IdentityToken,
		RegistryToken: cfg.RegistryToken,
		ServerAddress: host,
	})
	if err != nil {
		return "", fmt.Errorf("encoding the credentials for %s: %w", host, err)
	}
	return header, nil
}

func (r *registries) authorization(ctx context.Context, host string, target authn.Resource) (*authn.AuthConfig, error) {
	a, err := authn.Resolve(ctx, r.keychain, target)
	if err != nil {
		return nil, fmt.Errorf("finding credentials for %s: %w; set registry_auth", host, err)
	}
	cfg, err := authn.Authorization(ctx, a)
	if err != nil {
		return nil, fmt.Errorf("finding credentials for %s: %w; set registry_auth", host, err)
	}
	return cfg, nil
}

// parse makes a reference that go-containerregistry understands.
func (r *registries) parse(ref reference, s string) (name.Reference, error) {
	var opts []name.Option
	if r.isInsecure(ref.registry()) {
		opts = append(opts, name.Insecure)
	}
	return name.ParseReference(s, opts...)
}

func (r *registries) isInsecure(host string) bool {
	return slices.Contains(r.insecure, host)
}

func (r *registries) transport(host string) http.RoundTripper {
	if r.isInsecure(host) {
		return bounded{impatient{r.insecureTransport, ofRegistry}}
	}
	return bounded{impatient{tlsonly.Transport, ofRegistry}}
}

func (r *registries) options(ctx context.Context, host string) []remote.Option {
	return []remote.Option{
		remote.WithContext(ctx),
		remote.WithAuthFromKeychain(r.keychain),
		remote.WithTransport(r.transport(host)),
		remote.WithUserAgent(toolName()),
	}
}
