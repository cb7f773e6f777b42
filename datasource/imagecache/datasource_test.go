package imagecache

import (
	"strings"
	"testing"
	"time"

	"cloud.google.com/go/compute/apiv1/computepb"
	"github.com/google/go-cmp/cmp"
	"github.com/hashicorp/hcl/v2/hcldec"
	"github.com/zclconf/go-cty/cty"

	"github.com/selkies-project/packer-plugin-selkies/e2e/gcp"
)

const token = "token-of-the-test"

// google is a server whose clock goes on by an hour with each image.
func google(t *testing.T) *gcp.Server {
	now := time.Date(2026, 11, 1, 12, 0, 0, 0, time.UTC)
	return gcp.New(t, gcp.Config{Token: token, Now: func() time.Time {
		now = now.Add(time.Hour)
		return now
	}})
}

func image(name, family string) *computepb.Image {
	return &computepb.Image{Name: &name, Family: &family, DiskSizeGb: new(int64(20)), Labels: map[string]string{"made-by": "test"}}
}

func configure(s *gcp.Server, options ...string) map[string]any {
	c := map[string]any{
		"project_id": "p", "access_token": token,
		"custom_endpoints": map[string]string{"compute": s.URL + "/compute/v1/"},
	}
	for i := 0; i < len(options); i += 2 {
		c[options[i]] = options[i+1]
	}
	return c
}

func execute(t *testing.T, c map[string]any) (cty.Value, error) {
	t.Helper()
	var d Datasource
	if err := d.Configure(c); err != nil {
		t.Fatal(err)
	}
	v, err := d.Execute()
	if err == nil && !v.Type().Equals(hcldec.ImpliedType(d.OutputSpec())) {
		t.Errorf("output is of type %#v", v.Type())
	}
	return v, err
}

func TestNewest(t *testing.T) {
	s := google(t)
	s.AddImage("p", image("selkies-image-cache-1", "selkies-image-cache"))
	s.AddImage("p", image("selkies-image-cache-2", "selkies-image-cache"))
	s.AddImage("p", image("selkies-image-cache-10", "selkies-image-cache"))
	s.AddImage("p", image("other-3", "selkies-image-cache-test"))
	s.AddImage("debian-cloud", image("debian-12-v1", "debian-12"))
	s.AddImage("debian-cloud", image("debian-12-v2", "debian-12"))

	obsolete := image("selkies-image-cache-20", "selkies-image-cache")
	obsolete.Deprecated = &computepb.DeprecationStatus{State: new("OBSOLETE")}
	s.AddImage("p", obsolete)

	tests := []struct {
		name        string
		config      map[string]any
		image       string
		incremental bool
	}{
		{"newest that is not obsolete", configure(s), "projects/p/global/images/selkies-image-cache-10", true},
		{"other family", configure(s, "family", "selkies-image-cache-test"), "projects/p/global/images/other-3", true},
		{"the cache before the base", configure(s, "base_image", "debian-12-v1", "base_image_project_id", "debian-cloud"), "projects/p/global/images/selkies-image-cache-10", true},
		{"rebuild from an image", configure(s, "rebuild", "true", "base_image", "debian-12-v1", "base_image_project_id", "debian-cloud"), "projects/debian-cloud/global/images/debian-12-v1", false},
		{"rebuild from a family", configure(s, "rebuild", "true", "base_image_family", "debian-12", "base_image_project_id", "debian-cloud"), "projects/debian-cloud/global/images/debian-12-v2", false},
		{"rebuild from nothing", configure(s, "rebuild", "true"), "", false},
		{"no image yet", configure(s, "family", "none"), "", false},
		{"no image yet, from a family", configure(s, "family", "none", "base_image_family", "debian-12", "base_image_project_id", "debian-cloud"), "projects/debian-cloud/global/images/debian-12-v2", false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			v, err := execute(t, tt.config)
			if err != nil {
				t.Fatal(err)
			}
			if got := v.GetAttr("image").AsString(); got != tt.image {
				t.Errorf("image is %q, want %q", got, tt.image)
			}
			if v.GetAttr("incremental").True() != tt.incremental {
				t.Errorf("incremental is %t", !tt.incremental)
			}
		})
	}

	v, err := execute(t, configure(s))
	if err != nil {
		t.Fatal(err)
	}
	want := cty.ObjectVal(map[string]cty.Value{
		"incremental":  cty.True,
		"image":        cty.StringVal("projects/p/global/images/selkies-image-cache-10"),
		"name":         cty.StringVal("selkies-image-cache-10"),
		"project_id":   cty.StringVal("p"),
		"family":       cty.StringVal("selkies-image-cache"),
		"disk_size_gb": cty.NumberIntVal(20),
		"created":      v.GetAttr("created"),
		"labels":       cty.MapVal(map[string]cty.Value{"made-by": cty.StringVal("test")}),
	})
	if !v.RawEquals(want) {
		t.Errorf("output is %#v", v)
	}
	if _, err := time.Parse("2006-01-02T15:04:05Z", v.GetAttr("created").AsString()); err != nil {
		t.Error(err)
	}
	if diff := cmp.Diff([]string{"compute.images.get", "compute.images.getFromFamily", "compute.images.list"}, s.Needed()); diff != "" {
		t.Errorf("permissions: %s", diff)
	}
}

func TestExecuteErrors(t *testing.T) {
	s := google(t)
	old := image("old", "")
	old.Deprecated = &computepb.DeprecationStatus{State: new("OBSOLETE")}
	s.AddImage("p", old)
	tests := []struct {
		name   string
		config map[string]any
		deny   string
		want   string
	}{
		{"no permission", configure(s), "compute.images.list",
			"listing the images of family selkies-image-cache in project p: Required 'compute.images.list' permission for 'projects/p'; the permission compute.images.list is missing, grant roles/compute.imageUser (403)"},
		{"no permission for the base", configure(s, "base_image", "old"), "compute.images.get", "grant roles/compute.imageUser"},
		{"no such family", configure(s, "base_image_family", "debian-99"), "", "base_image_family: project p has no image of family debian-99; is base_image_project_id right?"},
		{"no such image", configure(s, "base_image", "none"), "", "base_image: project p has no image none"},
		{"obsolete base", configure(s, "base_image", "old"), "", "base_image: old is obsolete; choose another"},
		{"wrong token", configure(s, "access_token", "wrong"), "", "the credentials are not accepted, renew them (401)"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if tt.deny != "" {
				s.Deny(tt.deny)
				defer s.Allow(tt.deny)
			}
			_, err := execute(t, tt.config)
			if err == nil || !strings.Contains(err.Error(), tt.want) || strings.Contains(err.Error(), "\n") {
				t.Errorf("error is %v, want one line with %q", err, tt.want)
			}
		})
	}
}

// TestLost has the first request fail.
func TestLost(t *testing.T) {
	s := google(t)
	s.AddImage("p", image("selkies-image-cache-1", "selkies-image-cache"))
	s.Inject(gcp.Fault{Call: "images.list", LoseAnswer: true})
	if v, err := execute(t, configure(s)); err != nil || v.GetAttr("name").AsString() != "selkies-image-cache-1" {
		t.Errorf("got %#v, %v", v, err)
	}
}

func TestConfigure(t *testing.T) {
	tests := []struct {
		name   string
		config map[string]any
		want   string
	}{
		{"nothing", map[string]any{}, "project_id is not set"},
		{"two bases", map[string]any{"project_id": "p", "base_image": "a", "base_image_family": "b"}, "base_image and base_image_family are both set"},
		{"two credentials", map[string]any{"project_id": "p", "access_token": "a", "impersonate_service_account": "b"}, "access_token, impersonate_service_account are all set; choose one"},
		{"no such file", map[string]any{"project_id": "p", "credentials_file": "/none.json"}, "credentials_file: stat /none.json"},
		{"endpoint", map[string]any{"project_id": "p", "custom_endpoints": map[string]string{"storage": "x"}}, `custom_endpoints has the key "storage"`},
		{"unknown option", map[string]any{"project_id": "p", "familiy": "x"}, "familiy"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			err := new(Datasource).Configure(tt.config)
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error is %v, want one with %q", err, tt.want)
			}
		})
	}
}
