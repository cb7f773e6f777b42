// Command packer-plugin-selkies is a Packer plugin that fills disks with container
// images, so that nodes start them without a pull.
package main

import (
	"fmt"
	"log"
	"os"

	packersdk "github.com/hashicorp/packer-plugin-sdk/packer"
	"github.com/hashicorp/packer-plugin-sdk/plugin"
	sdkversion "github.com/hashicorp/packer-plugin-sdk/version"

	"github.com/selkies-project/packer-plugin-selkies/datasource/apps"
	lastimage "github.com/selkies-project/packer-plugin-selkies/datasource/imagecache"
	"github.com/selkies-project/packer-plugin-selkies/internal/coredump"
	rollout "github.com/selkies-project/packer-plugin-selkies/post-processor/imagecache"
	"github.com/selkies-project/packer-plugin-selkies/provisioner/imagecache"
	"github.com/selkies-project/packer-plugin-selkies/version"
)

func main() {
	// Packer filters the secrets that it knows out of the plugin's log; those that
	// the plugin itself comes by are filtered here.
	packersdk.LogSecretFilter.SetOutput(os.Stderr)
	log.SetOutput(&packersdk.LogSecretFilter)
	if err := run(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func run() error {
	if err := coredump.Forbid(); err != nil {
		return err
	}
	set := plugin.NewSet()
	set.RegisterDatasource("image-cache", new(lastimage.Datasource))
	set.RegisterDatasource("apps", new(apps.Datasource))
	set.RegisterProvisioner("image-cache", new(imagecache.Provisioner))
	set.RegisterPostProcessor("image-cache", new(rollout.PostProcessor))
	set.SetVersion(sdkversion.NewPluginVersion(version.Version, version.VersionPrerelease, version.VersionMetadata))
	return set.Run()
}
