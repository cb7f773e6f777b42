package imagecache

import (
	"strings"
	"testing"

	"github.com/moby/sys/mountinfo"
)

func TestStoreDisk(t *testing.T) {
	const (
		root     = "22 1 8:1 / / rw - ext4 /dev/sda1 rw\n"
		selfBind = "90 22 8:1 /var/lib/docker /var/lib/docker rw - ext4 /dev/sda1 rw\n"
		data     = "91 22 8:16 / /data rw - ext4 /dev/sdb rw\n"
		dataRoot = "92 22 8:16 / /var/lib/docker rw - ext4 /dev/sdb rw\n"
	)
	tests := []struct {
		name, mounts, dataRoot, root, rel string
	}{
		{"boot disk", root, "/var/lib/docker", "/", "var/lib/docker"},
		{"bound to itself by dockerd", root + selfBind, "/var/lib/docker", "/", "var/lib/docker"},
		{"data disk", root + data, "/data/store/docker", "/data", "store/docker"},
		{"disk of its own", root + dataRoot, "/var/lib/docker", "", ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			mounts, err := mountinfo.GetMountsFromReader(strings.NewReader(tt.mounts), nil)
			if err != nil {
				t.Fatal(err)
			}
			gotRoot, rel, err := storeDisk(mounts, tt.dataRoot)
			if (err != nil) != (tt.root == "") || gotRoot != tt.root || rel != tt.rel {
				t.Errorf("got %q, %q, %v", gotRoot, rel, err)
			}
		})
	}
}
