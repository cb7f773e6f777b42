package gcp

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	compute "cloud.google.com/go/compute/apiv1"
	"cloud.google.com/go/compute/apiv1/computepb"
	"cloud.google.com/go/container/apiv1/containerpb"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"google.golang.org/api/googleapi"

	fake "github.com/selkies-project/packer-plugin-selkies/e2e/gcp"
)

func TestExplain(t *testing.T) {
	api := func(code int, reason, message string) error {
		return fmt.Errorf("wrapped: %w", &googleapi.Error{Code: code, Message: message, Errors: []googleapi.ErrorItem{{Reason: reason}}})
	}
	tests := []struct {
		name string
		err  error
		want string
	}{
		{"Compute Engine's permission", api(403, "forbidden", "Required 'compute.disks.create' permission for 'projects/p/zones/z/disks/d'"),
			"Required 'compute.disks.create' permission for 'projects/p/zones/z/disks/d'; the permission compute.disks.create is missing, grant roles/compute.storageAdmin (403)"},
		{"GKE's permission", api(403, "forbidden", `Required "container.clusters.list" permission(s) for "projects/p".`),
			`Required "container.clusters.list" permission(s) for "projects/p".; the permission container.clusters.list is missing, grant roles/container.clusterViewer (403)`},
		{"other refusal", api(403, "forbidden", "no"), "no; a role is missing, see docs/iam.md (403)"},
		{"API is off", api(403, "accessNotConfigured", "Compute Engine API has not been used\nin project p"),
			"Compute Engine API has not been used in project p; enable the API with gcloud services enable (403)"},
		{"API is off, in newer words", &googleapi.Error{Code: 403, Message: "off", Details: []any{map[string]any{"reason": "SERVICE_DISABLED"}}},
			"off; enable the API with gcloud services enable (403)"},
		{"quota", api(403, "quotaExceeded", "Quota 'DISKS' exceeded."), "Quota 'DISKS' exceeded.; ask for a higher quota, or ask for less (403)"},
		{"credentials", api(401, "authError", "Invalid Credentials"), "Invalid Credentials; the credentials are not accepted, renew them (401)"},
		{"without words", api(502, "", ""), "Bad Gateway (502)"},
		{"not an API's", errors.New("plain"), "plain"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got := Explain(tt.err)
			if got.Error() != tt.want {
				t.Errorf("got  %s\nwant %s", got, tt.want)
			}
			if !errors.Is(got, tt.err) {
				t.Error("the error does not wrap its cause")
			}
		})
	}
}

func TestRegion(t *testing.T) {
	for location, want := range map[string]string{
		"us-central1-a": "us-central1", "us-central1": "us-central1",
		"northamerica-northeast1-b": "northamerica-northeast1", "us-central1-ai1a": "us-central1", "": "",
	} {
		if got := Region(location); got != want {
			t.Errorf("region of %q is %q, want %q", location, got, want)
		}
	}
}

// TestEndpoints has clients reach the same server by each form of its address.
func TestEndpoints(t *testing.T) {
	s := fake.New(t, fake.Config{Token: "a"})
	s.AddImage("p", &computepb.Image{Name: new("i")})
	for _, endpoint := range []string{s.URL, s.URL + "/", s.URL + "/compute/v1", s.URL + "/compute/v1/"} {
		a := &Auth{AccessToken: "a", CustomEndpoints: map[string]string{Compute: endpoint}}
		opts, err := a.Options(t.Context(), Compute)
		if err != nil {
			t.Fatal(err)
		}
		client, err := compute.NewImagesRESTClient(t.Context(), opts...)
		if err != nil {
			t.Fatal(err)
		}
		defer client.Close()
		if _, err := client.Get(t.Context(), &computepb.GetImageRequest{Project: "p", Image: "i"}); err != nil {
			t.Errorf("%s: %v", endpoint, err)
		}
	}
}

func TestClusters(t *testing.T) {
	s := fake.New(t, fake.Config{Token: "a"})
	s.AddCluster("p", &containerpb.Cluster{
		Name: "regional", Location: "us-central1", Endpoint: "192.0.2.1",
		PrivateClusterConfig: &containerpb.PrivateClusterConfig{PrivateEndpoint: "10.0.0.1"}, //nolint:staticcheck // what the plugin falls back on
		Locations:            []string{"us-central1-a", "us-central1-b", "us-central1-c"},
		NodePools:            []*containerpb.NodePool{{Locations: []string{"us-central1-b"}}, {Locations: []string{"us-central1-a", "us-central1-b"}}},
	})
	s.AddCluster("p", &containerpb.Cluster{Name: "no-pools", Location: "europe-west4-a", Locations: []string{"europe-west4-a"}})
	s.AddCluster("p", &containerpb.Cluster{Name: "ending", Location: "us-central1", Status: containerpb.Cluster_STOPPING})
	s.AddCluster("q", &containerpb.Cluster{Name: "elsewhere", Location: "us-central1"})
	s.Inject(fake.Fault{Call: "clusters.list", LoseRequest: true})

	for endpoint, want := range map[string]string{EndpointPublic: "https://192.0.2.1", EndpointPrivate: "https://10.0.0.1", EndpointDNS: ""} {
		a := &Auth{AccessToken: "a", CustomEndpoints: map[string]string{Container: s.URL}}
		clusters, err := a.Clusters(t.Context(), "p", endpoint)
		if err != nil {
			t.Fatal(err)
		}
		got := map[string][]string{}
		for _, c := range clusters {
			got[c.String()] = c.Zones
		}
		if diff := cmp.Diff(map[string][]string{"us-central1/regional": {"us-central1-a", "us-central1-b"}, "europe-west4-a/no-pools": {"europe-west4-a"}}, got); diff != "" {
			t.Errorf("clusters: %s", diff)
		}
		if _, err := clusters[0].Config(); err == nil || err.Error() != "it has no "+endpoint+" endpoint; choose another cluster_endpoint" {
			t.Errorf("without an address the error is %v", err)
		}
		config, err := clusters[1].Config()
		if (err == nil) != (want != "") || err == nil && config.Host != want {
			t.Errorf("%s endpoint: %v, %v, want %q", endpoint, config, err, want)
		}
	}
}

func TestKubeconfig(t *testing.T) {
	file := filepath.Join(t.TempDir(), "config")
	text := `
apiVersion: v1
kind: Config
current-context: one
contexts:
- {name: one, context: {cluster: a}}
- {name: two, context: {cluster: b}}
clusters:
- {name: a, cluster: {server: "https://a.example"}}
- {name: b, cluster: {server: "https://b.example"}}
`
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	for context, want := range map[string][]string{"": {"one", "https://a.example"}, "two": {"two", "https://b.example"}} {
		c, err := Kubeconfig(file, context)
		if err != nil {
			t.Fatal(err)
		}
		config, err := c.Config()
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, []string{c.String(), config.Host}); diff != "" {
			t.Errorf("context %q: %s", context, diff)
		}
	}
	if _, err := Kubeconfig(file, "three"); err == nil || !strings.Contains(err.Error(), `reading the kubeconfig: context "three" does not exist`) {
		t.Errorf("error is %v", err)
	}
}

func TestAuthNone(t *testing.T) {
	// The credentials of the machine, if it has any, are not found.
	t.Setenv("GOOGLE_APPLICATION_CREDENTIALS", filepath.Join(t.TempDir(), "none.json"))
	_, err := new(Auth).Options(t.Context(), Compute)
	if err == nil || !strings.HasPrefix(err.Error(), "finding Google credentials: ") || !strings.HasSuffix(err.Error(), "set credentials_file or access_token") {
		t.Errorf("error is %v", err)
	}
}

// TestKeychain gives the access token to Google's registries and to no other.
func TestKeychain(t *testing.T) {
	a := &Auth{AccessToken: "a"}
	for host, want := range map[string]authn.AuthConfig{
		"us-docker.pkg.dev": {Username: "oauth2accesstoken", Password: "a"},
		"eu.gcr.io":         {Username: "oauth2accesstoken", Password: "a"},
		"gcr.io":            {Username: "oauth2accesstoken", Password: "a"},
		"index.docker.io":   {},
		"notgcr.io":         {},
		"pkg.dev.example":   {},
	} {
		r, err := name.NewRegistry(host)
		if err != nil {
			t.Fatal(err)
		}
		found, err := a.Keychain(t.Context()).Resolve(r)
		if err != nil {
			t.Fatal(err)
		}
		got, err := found.Authorization()
		if err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, *got); diff != "" {
			t.Errorf("%s: %s", host, diff)
		}
	}
}
