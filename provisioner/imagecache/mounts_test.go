package imagecache

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestParseMounts(t *testing.T) {
	got, err := parseMounts(`22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw
91 22 8:16 /a\040b /mnt/x\134040y rw,nosuid shared:5 master:2 - ext4 /dev/disk\011one rw,errors=remount-ro
92 22 0:44 / /srv rw - fuse.sshfs me@host:/a\040-\040b rw
`)
	if err != nil {
		t.Fatal(err)
	}
	want := []*mount{
		{8, 1, "/", "/", "/dev/sda1"},
		{8, 16, "/a b", `/mnt/x\040y`, "/dev/disk\tone"},
		{0, 44, "/", "/srv", "me@host:/a - b"},
	}
	if diff := cmp.Diff(want, got, cmp.AllowUnexported(mount{})); diff != "" {
		t.Error(diff)
	}
	for _, line := range []string{"\n", "22 1 8:1 / / rw - ext4\n", "22 1 8:1 / / rw ext4 /dev/sda1 rw\n", "22 1 sda1 / / rw - ext4 /dev/sda1 rw\n"} {
		if _, err := parseMounts("23 1 8:1 / /x rw - ext4 /dev/sda1 rw\n" + line); err == nil {
			t.Errorf("took %q", line)
		}
	}
}

func TestStoreDisk(t *testing.T) {
	const (
		root     = "22 1 8:1 / / rw - ext4 /dev/sda1 rw\n"
		selfBind = "90 22 8:1 /var/lib/docker /var/lib/docker rw - ext4 /dev/sda1 rw\n"
		data     = "91 22 8:16 / /data rw - ext4 /dev/sdb rw\n"
		dataRoot = "92 22 8:16 / /var/lib/docker rw - ext4 /dev/sdb rw\n"
		dataBind = "93 22 8:16 /store /var/lib/docker rw - ext4 /dev/sdb rw\n"
		cover    = "94 22 8:32 / /data rw - ext4 /dev/sdc rw\n"
		// As Container-Optimized OS has it.
		readOnly = "22 1 254:0 / / ro - ext2 /dev/dm-0 ro\n"
		stateful = "23 22 8:1 / /mnt/stateful_partition rw - ext4 /dev/sda1 rw\n"
		varBind  = "24 22 8:1 /var /var rw - ext4 /dev/sda1 rw\n"
	)
	tests := []struct {
		name, mounts, dataRoot, root, rel string
		err                               string
	}{
		{"boot disk", root, "/var/lib/docker", "/", "var/lib/docker", ""},
		{"bound to itself by dockerd", root + selfBind, "/var/lib/docker", "/", "var/lib/docker", ""},
		{"data disk", root + data, "/data/store/docker", "/data", "store/docker", ""},
		{"data disk, bound", root + data + dataBind, "/var/lib/docker/sub/", "/data", "store/sub", ""},
		{"directory of the boot disk, bound", readOnly + stateful + varBind, "/var/lib/docker", "/mnt/stateful_partition", "var/lib/docker", ""},
		{"disk of its own", root + dataRoot, "/var/lib/docker", "", "", "is a disk of its own"},
		{"only a part mounted", root + dataBind, "/var/lib/docker", "", "", "lies on the mount /var/lib/docker, which shows only /store of its file system; mount all of /dev/sdb "},
		{"the rest covered", root + data + cover + dataBind, "/var/lib/docker", "", "", "shows only /store"},
		{"nothing mounted", "", "/var/lib/docker", "", "", "no mount holds it"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			mounts, err := parseMounts(tt.mounts)
			if err != nil {
				t.Fatal(err)
			}
			gotRoot, rel, err := storeDisk(mounts, tt.dataRoot)
			if gotRoot != tt.root || rel != tt.rel {
				t.Errorf("got %q, %q", gotRoot, rel)
			}
			if (err == nil) != (tt.err == "") || err != nil && !strings.Contains(err.Error(), tt.err) {
				t.Errorf("error is %v, want one with %q", err, tt.err)
			}
		})
	}
}
