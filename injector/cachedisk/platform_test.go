package cachedisk_test

import (
	"strings"
	"testing"

	"github.com/containerd/platforms"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/selkies-project/packer-plugin-selkies/injector/cachedisk"
	"github.com/selkies-project/packer-plugin-selkies/manifest"
)

func TestRunnable(t *testing.T) {
	disk := func(architecture string) *cachedisk.Disk {
		return &cachedisk.Disk{Dir: "/mnt/" + architecture, Manifest: &manifest.Manifest{
			Platform: ocispec.Platform{OS: "linux", Architecture: architecture},
		}}
	}
	node := platforms.DefaultSpec().Architecture
	disks, err := cachedisk.Runnable([]*cachedisk.Disk{disk("s390x"), disk(node)})
	if len(disks) != 1 || disks[0].Dir != "/mnt/"+node {
		t.Errorf("disks are %v", disks)
	}
	if err == nil || !strings.Contains(err.Error(), "cache disk /mnt/s390x: its images are for linux/s390x, this node runs linux/"+node) {
		t.Errorf("error is %v", err)
	}
}
