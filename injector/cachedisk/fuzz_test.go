package cachedisk_test

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/selkies-project/packer-plugin-selkies/injector/cachedisk"
)

// FuzzMountsOnHost reads the mount table of the host, whose paths anyone who mounts may
// choose.
func FuzzMountsOnHost(f *testing.F) {
	f.Add("36 35 98:0 / /var/lib/docker/overlay2/x/diff rw,noatime master:1 - ext4 /dev/sda rw\n")
	f.Add("36 35 98:0 / /var/lib/docker/line\\012break rw - tmpfs tmpfs rw\n")
	f.Add("36 35 98:0 / /var/lib/docker/\\0\\777 rw - \n")
	f.Add("36 35\n\n-")
	host := f.TempDir()
	if err := os.MkdirAll(filepath.Join(host, "proc/1"), 0o755); err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, table string) {
		if err := os.WriteFile(filepath.Join(host, "proc/1/mountinfo"), []byte(table), 0o644); err != nil {
			t.Fatal(err)
		}
		points, err := cachedisk.MountsOnHost(host, "/var/lib/docker")
		for _, p := range points {
			if err == nil && p != "/var/lib/docker" && !strings.HasPrefix(p, "/var/lib/docker/") {
				t.Fatalf("%q is not below the directory", p)
			}
		}
	})
}
