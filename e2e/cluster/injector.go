package cluster

import (
	"context"
	"os/exec"

	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"github.com/selkies-project/packer-plugin-selkies/e2e/host"
)

// BuildInjector builds the injector's image for this machine, as make injector-image
// does, into an OCI layout in the folder out.
func BuildInjector(ctx context.Context, out string) error {
	src, err := host.Source(ctx)
	if err != nil {
		return err
	}
	cmd := exec.CommandContext(ctx, "go", "run", "./injector/image", "-platforms", "linux/amd64", "-output", out)
	cmd.Dir = src
	_, err = host.Output(cmd)
	return err
}

// PushInjector pushes what BuildInjector has put into a folder, as ref.
func PushInjector(ctx context.Context, from, ref string) error {
	index, err := layout.ImageIndexFromPath(from)
	if err != nil {
		return err
	}
	r, err := name.ParseReference(ref)
	if err != nil {
		return err
	}
	return remote.WriteIndex(r, index, remote.WithContext(ctx))
}
