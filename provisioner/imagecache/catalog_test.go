package imagecache

import (
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/registry"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/google"
	"github.com/google/go-containerregistry/pkg/v1/remote"
)

// listCatalog is what a build with the block and the images given resolves.
func listCatalog(t *testing.T, host string, block Catalog, images ...string) ([]string, error) {
	t.Helper()
	block.Repository = strings.TrimSuffix(host+"/"+block.Repository, "/")
	c, err := newCatalog("catalog[0]", block, nil)
	if err != nil {
		t.Fatal(err)
	}
	known, errs := parseList(images)
	if len(errs) > 0 {
		t.Fatal(errs)
	}
	r := &registries{keychain: authn.NewMultiKeychain()}
	refs, err := r.listAll(t.Context(), known, []*catalog{c}, 2)
	var got []string
	for _, ref := range refs {
		got = append(got, strings.TrimPrefix(ref.String(), host+"/"))
	}
	return got, err
}

// push puts an image of no layers under the references given.
func push(t *testing.T, host string, refs ...string) {
	t.Helper()
	for _, s := range refs {
		ref, err := name.ParseReference(host + "/" + s)
		if err != nil {
			t.Fatal(err)
		}
		if err := remote.Write(ref, empty.Image); err != nil {
			t.Fatal(err)
		}
	}
}

type catalogTest struct {
	name   string
	block  Catalog
	images []string
	want   []string
	err    string // empty for none
}

func runCatalogTests(t *testing.T, host string, tests []catalogTest) {
	t.Helper()
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var images []string
			for _, i := range tt.images {
				images = append(images, host+"/"+i)
			}
			got, err := listCatalog(t, host, tt.block, images...)
			if tt.err != "" {
				if err == nil || !strings.Contains(err.Error(), tt.err) || !strings.HasPrefix(err.Error(), "catalog[0]: ") {
					t.Errorf("error is %v, want one with %q", err, tt.err)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestCatalog(t *testing.T) {
	reg := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	server := httptest.NewServer(reg)
	defer server.Close()
	host := server.Listener.Addr().String()
	signature := "sha256-" + strings.Repeat("a", 64)
	push(t, host, "apps:1", "apps/desktop:latest", "apps/desktop:v1", "apps/desktop:v2", "apps/desktop:"+signature+".sig",
		"apps/team/editor:latest", "apps/team/editor:"+signature, "apps/tool:v2", "appstore:latest")
	runCatalogTests(t, host, []catalogTest{
		{"whole registry", Catalog{}, nil, []string{"apps/desktop:latest", "apps/team/editor:latest", "appstore:latest"}, ""},
		{"below a path", Catalog{Repository: "apps"}, nil, []string{"apps/desktop:latest", "apps/team/editor:latest"}, ""},
		{"include by whole names", Catalog{Repository: "apps", Include: []string{"desk", "team/.*"}}, nil, []string{"apps/team/editor:latest"}, ""},
		{"exclude wins", Catalog{Include: []string{"apps.*"}, Exclude: []string{"apps/.*/.*", "appstore"}}, nil, []string{"apps/desktop:latest"}, ""},
		{"tags", Catalog{Repository: "apps", Tags: []string{"v2", "1"}}, nil, []string{"apps/desktop:v2", "apps/tool:v2", "apps:1"}, ""},
		{"every tag is an image", Catalog{Repository: "apps/team", Tags: []string{".*"}}, nil, []string{"apps/team/editor:latest"}, ""},
		{"repository itself", Catalog{Repository: "apps", Include: []string{`\.`}, Tags: []string{".*"}}, nil, []string{"apps:1"}, ""},
		{
			"beside images", Catalog{Repository: "apps"},
			[]string{"apps/tool:v2", "apps/team/editor:latest"},
			[]string{"apps/tool:v2", "apps/team/editor:latest", "apps/desktop:latest"}, "",
		},
		{"as many as the limit", Catalog{Tags: []string{"v2"}, Limit: 2}, nil, []string{"apps/desktop:v2", "apps/tool:v2"}, ""},
		{"too many", Catalog{Tags: []string{"v.*"}, Limit: 2}, nil, nil, host + " has 3 tags that match, more than limit = 2"},
		{"no such repository", Catalog{Repository: "none"}, nil, nil, host + "/none has no image that matches"},
		{"nothing left", Catalog{Exclude: []string{".*"}}, nil, nil, "has no image that matches; check repository, include, exclude and tags"},
	})
}

// TestCatalogRefused has registries that list no repositories, as most public ones.
func TestCatalogRefused(t *testing.T) {
	reg := registry.New(registry.Logger(log.New(io.Discard, "", 0)))
	for _, status := range []int{http.StatusUnauthorized, http.StatusNotFound} {
		t.Run(http.StatusText(status), func(t *testing.T) {
			server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, req *http.Request) {
				if strings.HasSuffix(req.URL.Path, "/_catalog") {
					w.WriteHeader(status)
					return
				}
				reg.ServeHTTP(w, req)
			}))
			defer server.Close()
			host := server.Listener.Addr().String()
			push(t, host, "org/app:latest", "org/app:v1", "org/other:latest")
			refused := "the registry refused access (401 Unauthorized); set registry_auth"
			if status == http.StatusNotFound {
				refused = "does not list its repositories; set repository to one that it has"
			}
			runCatalogTests(t, host, []catalogTest{
				{"one repository", Catalog{Repository: "org/app"}, nil, []string{"org/app:latest"}, ""},
				{"its tags", Catalog{Repository: "org/app", Tags: []string{"v.*", "latest"}}, nil, []string{"org/app:latest", "org/app:v1"}, ""},
				{"path", Catalog{Repository: "org"}, nil, nil, "has no image that matches"},
				{"registry", Catalog{}, nil, nil, refused},
			})
		})
	}
}

// artifactRegistry stands in for Artifact Registry's tags list, which has Google's
// extension: the repositories below, and every manifest with its tags and when it was
// uploaded.
type artifactRegistry map[string]google.Tags

func (a artifactRegistry) ServeHTTP(w http.ResponseWriter, req *http.Request) {
	path := strings.TrimPrefix(req.URL.Path, "/v2/")
	repo, ok := strings.CutSuffix(path, "/tags/list")
	list, known := a[repo]
	switch {
	case path == "":
	case path == "_catalog":
		http.NotFound(w, req)
	case ok && known:
		_ = json.NewEncoder(w).Encode(list)
	case ok && strings.HasPrefix(repo, "project/secret"):
		http.Error(w, `{"errors":[{"code":"DENIED","message":"Permission \"artifactregistry.repositories.downloadArtifacts\" denied"}]}`, http.StatusForbidden)
	case ok:
		http.Error(w, `{"errors":[{"code":"NAME_UNKNOWN","message":"Repository \"`+repo+`\" not found"}]}`, http.StatusNotFound)
	default:
		http.Error(w, fmt.Sprintf("nobody should ask for %s", req.URL.Path), http.StatusInternalServerError)
	}
}

func TestArtifactRegistry(t *testing.T) {
	day := func(n int) time.Time { return time.Date(2026, 1, n, 0, 0, 0, 0, time.UTC) }
	manifests := func(list ...google.ManifestInfo) map[string]google.ManifestInfo {
		m := map[string]google.ManifestInfo{}
		for i, info := range list {
			m[fmt.Sprintf("sha256:%064x", i)] = info
		}
		return m
	}
	registry := artifactRegistry{
		"project/apps": {Name: "project/apps", Children: []string{"desktop", "team", "untagged"}},
		"project/apps/desktop": {Manifests: manifests(
			google.ManifestInfo{Tags: []string{"latest", "v1"}, Uploaded: day(1)},
			google.ManifestInfo{Tags: []string{"v3", "nightly"}, Uploaded: day(3)},
			google.ManifestInfo{Tags: []string{"v2"}, Uploaded: day(2)},
			// A platform's manifest of an index, and a signature.
			google.ManifestInfo{Uploaded: day(4)},
			google.ManifestInfo{Tags: []string{"sha256-" + strings.Repeat("a", 64) + ".sig"}, Uploaded: day(5)},
		)},
		"project/apps/team": {Children: []string{"editor"}},
		"project/apps/team/editor": {Manifests: manifests(
			google.ManifestInfo{Tags: []string{"a"}, Uploaded: day(1)},
			google.ManifestInfo{Tags: []string{"b"}, Uploaded: day(1)},
		)},
		"project/apps/untagged": {Manifests: manifests(google.ManifestInfo{Uploaded: day(1)})},
		"project/empty":         {Name: "project/empty"},
		"project/mixed":         {Children: []string{"there", "gone"}},
		"project/mixed/there":   {Manifests: manifests(google.ManifestInfo{Tags: []string{"1"}, Uploaded: day(1)})},
	}
	server := httptest.NewServer(registry)
	defer server.Close()
	host := server.Listener.Addr().String()
	runCatalogTests(t, host, []catalogTest{
		{"newest, under all tags", Catalog{Repository: "project/apps"}, nil, []string{
			"project/apps/desktop:nightly", "project/apps/desktop:v3", "project/apps/team/editor:b",
		}, ""},
		{"tags", Catalog{Repository: "project/apps", Tags: []string{"v[12]", "latest"}}, nil, []string{
			"project/apps/desktop:latest", "project/apps/desktop:v1", "project/apps/desktop:v2",
		}, ""},
		{"filters", Catalog{Repository: "project/apps", Exclude: []string{"desktop"}}, nil, []string{"project/apps/team/editor:b"}, ""},
		{"one repository", Catalog{Repository: "project/apps/desktop", Tags: []string{"v2"}}, nil, []string{"project/apps/desktop:v2"}, ""},
		{"limit", Catalog{Repository: "project/apps", Tags: []string{"v.*"}, Limit: 2}, nil, nil, "has 3 tags that match, more than limit = 2"},
		{"empty", Catalog{Repository: "project/empty"}, nil, nil, "project/empty has no image that matches"},
		{"no such repository", Catalog{Repository: "project/none"}, nil, nil, "project/none has no image that matches"},
		{"no permission", Catalog{Repository: "project/secret"}, nil, nil, "the registry refused access (403 Forbidden); set registry_auth"},
		// Without what it holds, pruning would take that off the disk.
		{"gone in between", Catalog{Repository: "project/mixed"}, nil, nil, "project/mixed/gone: "},
	})
}

func TestChooseNewestIsStable(t *testing.T) {
	same := map[string]google.ManifestInfo{}
	for i := range 20 {
		same[fmt.Sprintf("sha256:%064x", i)] = google.ManifestInfo{Tags: []string{fmt.Sprint(i)}}
	}
	for range 20 {
		if got := (&catalog{}).chooseNewest(same); !slices.Equal(got, []string{"19"}) {
			t.Fatalf("chose %v", got)
		}
	}
}
