package cachedisk_test

import (
	"testing"
	"time"

	"github.com/selkies-project/packer-plugin-selkies/injector/cachedisk"
	"github.com/selkies-project/packer-plugin-selkies/manifest"
)

func TestNewestFirst(t *testing.T) {
	disk := func(created int64) *cachedisk.Disk {
		return &cachedisk.Disk{Manifest: &manifest.Manifest{Created: time.Unix(created, 0)}}
	}
	older, newer := disk(1), disk(2)
	if got := cachedisk.NewestFirst([]*cachedisk.Disk{older, newer}); got[0] != newer || got[1] != older {
		t.Error("the older comes first")
	}
}
