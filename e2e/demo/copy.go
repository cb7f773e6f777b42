package main

import (
	"context"
	"fmt"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"github.com/selkies-project/packer-plugin-selkies/e2e/desktop"
)

// copyImages copies the images that the user named to the registry.
func copyImages(ctx context.Context, registry string, refs []string) ([]desktop.Image, error) {
	amd64 := v1.Platform{OS: "linux", Architecture: "amd64"}
	var images []desktop.Image
	for _, s := range refs {
		from, err := name.ParseReference(s)
		if err != nil {
			return nil, err
		}
		fmt.Printf("    copying %s\n", s)
		image, err := remote.Image(from, remote.WithContext(ctx), remote.WithPlatform(amd64))
		if err != nil {
			return nil, fmt.Errorf("reading %s: %w", s, err)
		}
		tag := "latest"
		if t, ok := from.(name.Tag); ok {
			tag = t.TagStr()
		}
		to, err := name.NewTag(registry + "/" + from.Context().RepositoryStr() + ":" + tag)
		if err != nil {
			return nil, err
		}
		if err := remote.Write(to, image, remote.WithContext(ctx)); err != nil {
			return nil, fmt.Errorf("copying %s: %w", s, err)
		}
		w := desktop.Image{Ref: to.Name()}
		manifest, err := image.Manifest()
		if err != nil {
			return nil, err
		}
		for _, l := range manifest.Layers {
			w.Packed += l.Size
		}
		images = append(images, w)
	}
	return images, nil
}
