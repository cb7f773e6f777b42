package apps

import (
	"fmt"
	"maps"
	"slices"

	"github.com/distribution/reference"
)

// appConfig is what counts here of a BrokerAppConfig, in the names of the App
// Launcher's CRD.
type appConfig struct {
	Spec struct {
		Disabled    bool                `json:"disabled"`
		DefaultRepo string              `json:"defaultRepo"`
		DefaultTag  string              `json:"defaultTag"`
		Images      map[string]newImage `json:"images"`
	} `json:"spec"`
}

// newImage takes the place of an image of the app's manifests: the launcher makes it
// an entry of a kustomization's images.
type newImage struct {
	OldRepo string `json:"oldRepo"`
	NewRepo string `json:"newRepo"`
	NewTag  string `json:"newTag"`
	Digest  string `json:"digest"`
}

// images are the references of an app's images.
func (a *appConfig) images() ([]string, error) {
	var refs []string
	if a.Spec.DefaultRepo != "" {
		ref, err := join(a.Spec.DefaultRepo, a.Spec.DefaultTag, "")
		if err != nil {
			return nil, fmt.Errorf("defaultRepo: %w", err)
		}
		refs = append(refs, ref)
	}
	for _, key := range slices.Sorted(maps.Keys(a.Spec.Images)) {
		i := a.Spec.Images[key]
		repo := i.NewRepo
		if repo == "" { // kustomize keeps the old name
			repo = i.OldRepo
		}
		ref, err := join(repo, i.NewTag, i.Digest)
		if err != nil {
			return nil, fmt.Errorf("images.%s: %w", key, err)
		}
		refs = append(refs, ref)
	}
	return refs, nil
}

// join makes one reference. A digest takes precedence over a tag, as in kustomize:
// kubelet drops the tag of a reference that has both.
func join(repo, tag, digest string) (string, error) {
	ref := repo
	switch {
	case digest != "":
		ref += "@" + digest
	case tag != "":
		ref += ":" + tag
	}
	if _, err := reference.ParseNormalizedNamed(ref); err != nil {
		return "", fmt.Errorf("%q: %w", ref, err)
	}
	return ref, nil
}
