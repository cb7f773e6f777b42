package cluster

import (
	"context"
	"os/exec"

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
