package apps

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"sigs.k8s.io/yaml"
)

func TestImages(t *testing.T) {
	const digest = "sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"
	tests := []struct {
		name, spec string
		want       []string
		err        string
	}{
		{name: "app alone", spec: `
defaultRepo: gcr.io/p/vdi-blender
defaultTag: v1`, want: []string{"gcr.io/p/vdi-blender:v1"}},
		{name: "with images", spec: `
defaultRepo: gcr.io/p/vdi-blender
defaultTag: latest
images:
  xserver:
    oldRepo: gcr.io/cloud-solutions-images/xserver
    newRepo: gcr.io/p/xserver
    newTag: "1.4"
  desktop:
    oldRepo: gcr.io/cloud-solutions-images/desktop
    newRepo: gcr.io/p/desktop
    newTag: latest
    digest: ` + digest, want: []string{"gcr.io/p/vdi-blender:latest", "gcr.io/p/desktop@" + digest, "gcr.io/p/xserver:1.4"}},
		{name: "kustomize's defaults", spec: `
defaultRepo: localhost:5000/app
images:
  a: {oldRepo: "localhost:5000/a", newTag: v2}`, want: []string{"localhost:5000/app", "localhost:5000/a:v2"}},
		{name: "malformed", spec: `
images:
  a: {newRepo: "UPPER", newTag: v2}`, err: `images.a: "UPPER:v2": `},
		{name: "empty", spec: `
images:
  a: {newTag: v2}`, err: `images.a: ":v2": `},
		{name: "template variable", spec: `
defaultRepo: gcr.io/${PROJECT_ID}/app
defaultTag: latest`, err: "defaultRepo: "},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var app appConfig
			if err := yaml.UnmarshalStrict([]byte(tt.spec), &app.Spec); err != nil {
				t.Fatal(err)
			}
			got, err := app.images()
			if tt.err != "" {
				if err == nil || !strings.HasPrefix(err.Error(), tt.err) {
					t.Errorf("error is %v, want %q", err, tt.err)
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
