//go:build e2e

package hostile_test

import (
	"encoding/binary"
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/selkies-project/packer-plugin-selkies/e2e/host"
)

// blockSize is that of an ext4 image, in bytes.
func blockSize(t *testing.T, image string) int64 {
	t.Helper()
	f, err := os.Open(image)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var log [4]byte // s_log_block_size
	if _, err := f.ReadAt(log[:], 1024+24); err != nil {
		t.Fatal(err)
	}
	return 1024 << binary.LittleEndian.Uint32(log[:])
}

// debugfs asks for one thing of an ext4 image, by its path or "<inode>".
func debugfs(t *testing.T, image, request string) string {
	t.Helper()
	out, err := host.Output(exec.CommandContext(t.Context(), "debugfs", "-R", request, image))
	if err != nil {
		t.Fatal(err)
	}
	return out
}

var inodePlace = regexp.MustCompile(`located at block (\d+), offset 0x([0-9a-f]+)`)

// inodeAt is where the inode of a path is in the image.
func inodeAt(t *testing.T, image, path string) int64 {
	t.Helper()
	out := debugfs(t, image, fmt.Sprintf("imap %q", "/"+path))
	m := inodePlace.FindStringSubmatch(out)
	if m == nil {
		t.Fatalf("debugfs says %q of the inode of %s", out, path)
	}
	block, _ := strconv.ParseInt(m[1], 10, 64)
	offset, _ := strconv.ParseInt(m[2], 16, 64)
	return block*blockSize(t, image) + offset
}

// contentAt is where a byte of a file's contents, or of a directory's, is in the image,
// 0 for one in a hole.
func contentAt(t *testing.T, image, path string, offset int64) int64 {
	t.Helper()
	size := blockSize(t, image)
	out := strings.TrimSpace(debugfs(t, image, fmt.Sprintf("bmap %q %d", "/"+path, offset/size)))
	block, err := strconv.ParseInt(out, 10, 64)
	if err != nil {
		t.Fatalf("debugfs says %q of block %d of %s", out, offset/size, path)
	}
	if block == 0 {
		return 0
	}
	return block*size + offset%size
}

var inodeTable = regexp.MustCompile(`Group +(\d+): .*inode table at (\d+)`)

// inodeWith is the number of the inode that a byte of the image is part of, 0 if none.
func inodeWith(t *testing.T, image string, at int64) int64 {
	t.Helper()
	f, err := os.Open(image)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var super [1024]byte
	if _, err := f.ReadAt(super[:], 1024); err != nil {
		t.Fatal(err)
	}
	perGroup := int64(binary.LittleEndian.Uint32(super[40:])) // s_inodes_per_group
	size := int64(binary.LittleEndian.Uint16(super[88:]))     // s_inode_size
	for _, m := range inodeTable.FindAllStringSubmatch(debugfs(t, image, "stats"), -1) {
		group, _ := strconv.ParseInt(m[1], 10, 64)
		block, _ := strconv.ParseInt(m[2], 10, 64)
		if in := at - block*blockSize(t, image); in >= 0 && in < perGroup*size {
			return group*perGroup + in/size + 1
		}
	}
	return 0
}

var metadataPlace = regexp.MustCompile(`(Primary superblock|Backup superblock|Group descriptors|Block bitmap|Inode bitmap) at (\d+)(?:-(\d+))?`)

// metadataAt says what of ext4's own is in a block that no inode has: what dumpe2fs calls
// it, "Backup descriptors" for descriptors beside a backup of the superblock, "" if nothing.
func metadataAt(t *testing.T, image string, block int64) string {
	t.Helper()
	out, err := host.Output(exec.CommandContext(t.Context(), "dumpe2fs", image))
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(out) {
		for _, m := range metadataPlace.FindAllStringSubmatch(line, -1) {
			first, _ := strconv.ParseInt(m[2], 10, 64)
			last, err := strconv.ParseInt(m[3], 10, 64)
			if err != nil {
				last = first
			}
			switch {
			case block < first || block > last:
			case m[1] == "Group descriptors" && strings.Contains(line, "Backup"):
				return "Backup descriptors"
			default:
				return m[1]
			}
		}
	}
	return ""
}

// ownerOf is the number of the inode that a block belongs to, 0 if none.
func ownerOf(t *testing.T, image string, block int64) (inode int64) {
	t.Helper()
	_, line, _ := strings.Cut(debugfs(t, image, fmt.Sprintf("icheck %d", block)), "\n")
	_, _ = fmt.Sscanf(line, "%d %d", &block, &inode) // or "<block not found>"
	return inode
}

// pathOf is a path of an inode, relative to the disk's root, "" if it has none.
func pathOf(t *testing.T, image string, inode int64) string {
	t.Helper()
	_, line, _ := strings.Cut(debugfs(t, image, fmt.Sprintf("ncheck %d", inode)), "\n")
	_, path, _ := strings.Cut(strings.TrimSpace(line), "\t")
	return strings.TrimLeft(path, "/")
}

var attributeBlock = regexp.MustCompile(`File ACL: (\d+)`)

// attributesAt is where the block with a file's attributes is in the image.
func attributesAt(t *testing.T, image, path string) int64 {
	t.Helper()
	m := attributeBlock.FindStringSubmatch(debugfs(t, image, fmt.Sprintf("stat %q", "/"+path)))
	if m == nil || m[1] == "0" {
		t.Fatalf("%s has no block of attributes", path)
	}
	block, _ := strconv.ParseInt(m[1], 10, 64)
	return block * blockSize(t, image)
}

// flip flips a bit of a file. Twice, it is as it was.
func flip(t *testing.T, file string, at int64, bit int) {
	t.Helper()
	f, err := os.OpenFile(file, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var b [1]byte
	if _, err := f.ReadAt(b[:], at); err != nil {
		t.Fatal(err)
	}
	b[0] ^= 1 << bit
	if _, err := f.WriteAt(b[:], at); err != nil {
		t.Fatal(err)
	}
}

// mounted calls use with the directory of an image that is mounted as on a node, and
// gives the error of the mount. The superblock does not decide what an error does: it
// could have the kernel panic.
func mounted(t *testing.T, image string, use func(dir string)) error {
	t.Helper()
	loop, err := host.AttachLoop(image, true)
	if err != nil {
		t.Fatal(err)
	}
	defer loop.Close()
	dir := t.TempDir()
	if err := unix.Mount(loop.Path, dir, "ext4", unix.MS_RDONLY, "noload,errors=continue"); err != nil {
		return err
	}
	defer func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Fatal(err)
		}
	}()
	use(dir)
	return nil
}
