//go:generate packer-sdc struct-markdown
//go:generate packer-sdc mapstructure-to-hcl2 -type Auth

// Package gcp is what the components that speak to Google Cloud have in common:
// credentials and endpoints as Packer's googlecompute builder has them, waiting for
// operations, errors that name the missing role, and the way to clusters.
package gcp

import (
	"context"
	"fmt"
	"net/url"
	"os"
	"slices"
	"strings"

	"cloud.google.com/go/auth"
	"cloud.google.com/go/auth/credentials"
	"cloud.google.com/go/auth/credentials/impersonate"
	"github.com/google/go-containerregistry/pkg/authn"
	packersdk "github.com/hashicorp/packer-plugin-sdk/packer"
	"github.com/hashicorp/packer-plugin-sdk/useragent"
	"google.golang.org/api/option"

	"github.com/selkies-project/packer-plugin-selkies/version"
)

// scopes are what access tokens are asked for.
var scopes = []string{
	// What it covers IAM narrows down; narrower ones do not cover GKE.
	"https://www.googleapis.com/auth/cloud-platform",
	// Without it GKE's clusters know a service account by its number only, and what their
	// roles bind to its e-mail address does not count.
	"https://www.googleapis.com/auth/userinfo.email",
}

// The keys of custom_endpoints, and the path that each of the Go clients adds to an
// endpoint by itself.
const (
	Compute   = "compute"
	Container = "container"
)

var apiPaths = map[string]string{Compute: "/compute/v1", Container: "/v1"}

// Auth is how a component authenticates to Google Cloud, and with which endpoints. The
// options are those of the googlecompute builder.
type Auth struct {
	// An OAuth 2.0 access token, such as `gcloud auth print-access-token` prints. It
	// is not renewed, so it must be valid for the whole build. At most one of
	// `access_token`, `credentials_file`, `credentials_json` and
	// `impersonate_service_account` may be set. By default none is set, and the application
	// default credentials are used, which on Google Cloud are those of the attached
	// service account.
	AccessToken string `mapstructure:"access_token"`
	// A JSON file with credentials: a service account's key, the configuration of a
	// workload identity federation, or a user's from gcloud. By default none.
	CredentialsFile string `mapstructure:"credentials_file"`
	// The content of such a file. Sensitive. By default none.
	CredentialsJSON string `mapstructure:"credentials_json"`
	// The e-mail address of a service account to act as, for which the application
	// default credentials need the role `roles/iam.serviceAccountTokenCreator`. By
	// default none.
	ImpersonateServiceAccount string `mapstructure:"impersonate_service_account"`
	// Addresses for Google's APIs, with the keys `compute` and `container` (GKE).
	// Defaults to Google's own; another one is
	// `{ compute = "https://compute-my.p.googleapis.com/compute/v1/" }`.
	CustomEndpoints map[string]string `mapstructure:"custom_endpoints"`

	credentials *auth.Credentials
}

// Prepare checks the options without a request.
func (a *Auth) Prepare() []error {
	var errs []error
	for _, secret := range []string{a.AccessToken, a.CredentialsJSON} {
		if secret != "" {
			packersdk.LogSecretFilter.Set(secret)
		}
	}
	var set []string
	for name, value := range map[string]string{
		"access_token": a.AccessToken, "credentials_file": a.CredentialsFile,
		"credentials_json": a.CredentialsJSON, "impersonate_service_account": a.ImpersonateServiceAccount,
	} {
		if value != "" {
			set = append(set, name)
		}
	}
	slices.Sort(set)
	if len(set) > 1 {
		errs = append(errs, fmt.Errorf("%s are all set; choose one", strings.Join(set, ", ")))
	}
	if a.CredentialsFile != "" {
		if _, err := os.Stat(a.CredentialsFile); err != nil {
			errs = append(errs, fmt.Errorf("credentials_file: %w", err))
		}
	}
	for service, endpoint := range a.CustomEndpoints {
		if _, ok := apiPaths[service]; !ok {
			errs = append(errs, fmt.Errorf("custom_endpoints has the key %q; choose %q or %q", service, Compute, Container))
		}
		if u, err := url.Parse(endpoint); err != nil || u.Host == "" {
			errs = append(errs, fmt.Errorf("custom_endpoints: %s: %q is not an address such as https://host/", service, endpoint))
		}
	}
	return errs
}

// Options are what the client of an API needs, Compute or Container.
func (a *Auth) Options(ctx context.Context, api string) ([]option.ClientOption, error) {
	creds, err := a.find(ctx)
	if err != nil {
		return nil, err
	}
	opts := []option.ClientOption{
		option.WithAuthCredentials(creds),
		option.WithUserAgent(useragent.String(version.String())),
	}
	if endpoint := a.CustomEndpoints[api]; endpoint != "" {
		endpoint = strings.TrimSuffix(strings.TrimRight(endpoint, "/"), apiPaths[api])
		opts = append(opts, option.WithEndpoint(endpoint))
	}
	return opts, nil
}

// token returns an access token that is still valid.
func (a *Auth) token(ctx context.Context) (string, error) {
	creds, err := a.find(ctx)
	if err != nil {
		return "", err
	}
	t, err := creds.Token(ctx)
	if err != nil {
		return "", fmt.Errorf("getting an access token: %w", err)
	}
	// The SDK's secret filter takes no new secrets while others log. This one goes into
	// a header and nowhere else.
	return t.Value, nil
}

// Keychain has the credentials for Google's registries, and none for others.
func (a *Auth) Keychain(ctx context.Context) authn.Keychain { return &keychain{ctx, a} }

type keychain struct {
	ctx  context.Context
	auth *Auth
}

func (k *keychain) Resolve(target authn.Resource) (authn.Authenticator, error) {
	host := target.RegistryStr()
	if host != "gcr.io" && !strings.HasSuffix(host, ".gcr.io") && !strings.HasSuffix(host, ".pkg.dev") {
		return authn.Anonymous, nil
	}
	token, err := k.auth.token(k.ctx)
	if err != nil {
		return nil, err
	}
	return authn.FromConfig(authn.AuthConfig{Username: "oauth2accesstoken", Password: token}), nil
}

// find finds the credentials, once. It is not safe for concurrent use the first time.
func (a *Auth) find(ctx context.Context) (*auth.Credentials, error) {
	if a.credentials != nil {
		return a.credentials, nil
	}
	creds, err := a.detect(ctx)
	if err != nil {
		return nil, err
	}
	a.credentials = creds
	return creds, nil
}

func (a *Auth) detect(context.Context) (*auth.Credentials, error) {
	switch {
	case a.AccessToken != "":
		return auth.NewCredentials(&auth.CredentialsOptions{TokenProvider: staticToken(a.AccessToken)}), nil
	case a.CredentialsFile != "":
		data, err := os.ReadFile(a.CredentialsFile)
		if err != nil {
			return nil, fmt.Errorf("credentials_file: %w", err)
		}
		return fromJSON("credentials_file", data)
	case a.CredentialsJSON != "":
		return fromJSON("credentials_json", []byte(a.CredentialsJSON))
	case a.ImpersonateServiceAccount != "":
		creds, err := impersonate.NewCredentials(&impersonate.CredentialsOptions{
			TargetPrincipal: a.ImpersonateServiceAccount, Scopes: scopes,
		})
		if err != nil {
			return nil, fmt.Errorf("acting as %s: %w", a.ImpersonateServiceAccount, err)
		}
		return creds, nil
	}
	creds, err := credentials.DetectDefault(&credentials.DetectOptions{Scopes: scopes})
	if err != nil {
		return nil, fmt.Errorf("finding Google credentials: %w; run gcloud auth application-default login, or set credentials_file or access_token", err)
	}
	return creds, nil
}

// fromJSON takes any kind of credentials: whoever writes the template is trusted
// with what it may do.
func fromJSON(name string, data []byte) (*auth.Credentials, error) {
	//nolint:staticcheck // deprecated for callers that do not trust the file's origin
	creds, err := credentials.DetectDefault(&credentials.DetectOptions{CredentialsJSON: data, Scopes: scopes})
	if err != nil {
		return nil, fmt.Errorf("%s: %w", name, err)
	}
	return creds, nil
}

type staticToken string

func (t staticToken) Token(context.Context) (*auth.Token, error) {
	return &auth.Token{Value: string(t), Type: "Bearer"}, nil
}
