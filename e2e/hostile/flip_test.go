//go:build e2e

package hostile_test

import (
	"encoding/json"
	"flag"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/selkies-project/packer-plugin-selkies/e2e/cachedisk"
	"github.com/selkies-project/packer-plugin-selkies/injector/report"
	"github.com/selkies-project/packer-plugin-selkies/manifest"
)

var (
	flips = flag.Int("flips", 100, "how many bits TestFlips flips")
	seed  = flag.Uint64("seed", 0, "where they are; 0 is another place each time")
)

// target is a place whose bits are flipped.
type target struct {
	kind string
	path string // of the file, relative to the disk's root
	at   int64  // in the image
	// in is the offset in the file, -1 for what is not a file's contents.
	in int64
}

// TestFlips flips single bits of a cache disk: each is found, by the kernel at the mount
// or by verify, or there is a reason why nobody would notice it.
func TestFlips(t *testing.T) {
	if *seed == 0 {
		*seed = uint64(time.Now().UnixNano())
	}
	t.Logf("%d flips, -seed %d", *flips, *seed)
	random := rand.New(rand.NewPCG(*seed, 1))
	image := cachedisk.Copied(t, world.disk)
	paths, links := list(t, image)
	if d := verified(t, image); d != nil {
		t.Fatalf("as built: %s", d)
	}
	kinds := []string{"data", "data", "data", "data", "inode", "inode", "directory", "attribute", "headers", "blob"}
	found, undetectable := map[string]int{}, map[string]int{}
	sum := struct{ found, undetectable int }{}
	for i := range *flips {
		kind := kinds[i%len(kinds)]
		if i%20 == 19 {
			kind = "manifest"
		}
		if i%20 == 18 {
			kind = "anywhere"
		}
		target := choose(t, random, image, kind, paths)
		bit := random.IntN(8)
		flip(t, image, target.at, bit)
		d := verified(t, image)
		reason := ""
		if d == nil {
			reason = unnoticed(t, image, target)
		}
		flip(t, image, target.at, bit)
		switch {
		case d != nil && slices.Contains(named, kind) && !d.names(links[target.path], slices.Contains(paths["directory"], target.path)):
			t.Errorf("%s of %s, bit %d of byte %d: the file is not named: %s", kind, target.path, bit, target.at, d)
		case d != nil:
			found[kind]++
			sum.found++
		case reason != "":
			undetectable[kind+": "+reason]++
			sum.undetectable++
		default:
			t.Errorf("%s of %s, bit %d of byte %d: not found", kind, target.path, bit, target.at)
		}
	}
	if d := verified(t, image); d != nil {
		t.Errorf("as built again: %s", d)
	}
	t.Logf("found: %v", found)
	for reason, n := range undetectable {
		t.Logf("not to be found: %d of %s", n, reason)
	}
	fmt.Printf("| bits flipped, -seed=%d | %d: %d found, %d that nothing reads or proves, %d missed |\n",
		*seed, *flips, sum.found, sum.undetectable, *flips-sum.found-sum.undetectable)
}

// named are the kinds of which verify has to name the file.
var named = []string{"data", "attribute", "inode", "directory"}

// paths are what a disk has, by what becomes of it.
type paths map[string][]string

// list lists what verify is to prove, and all names of each file of a layer.
func list(t *testing.T, image string) (paths, map[string][]string) {
	t.Helper()
	p, links := paths{"manifest": {manifest.Path}}, map[string][]string{}
	err := mounted(t, image, func(dir string) {
		for _, l := range world.built.Layers {
			p["headers"] = append(p["headers"], world.built.TarSplitPath(l))
			root := filepath.Join(dir, world.built.LayerPath(l))
			seen := map[uint64]string{} // by inode
			err := filepath.WalkDir(root, func(name string, e fs.DirEntry, err error) error {
				if err != nil {
					return err
				}
				rel, err := filepath.Rel(dir, name)
				if err != nil {
					return err
				}
				info, err := e.Info()
				if err != nil {
					return err
				}
				if strings.ContainsAny(rel, "\n\\") || !isASCII(rel) { // debugfs cannot be asked
					return nil
				}
				first, linked := seen[info.Sys().(*syscall.Stat_t).Ino]
				if linked {
					links[first] = append(links[first], rel)
					return nil
				}
				seen[info.Sys().(*syscall.Stat_t).Ino], links[rel] = rel, []string{rel}
				switch {
				case e.IsDir():
					p["directory"] = append(p["directory"], rel)
				case info.Mode().IsRegular() && info.Size() > 0:
					p["data"] = append(p["data"], rel)
				}
				if filepath.Base(rel) == "attributes" {
					p["attribute"] = append(p["attribute"], rel)
				}
				p["inode"] = append(p["inode"], rel)
				return nil
			})
			if err != nil {
				t.Fatal(err)
			}
		}
		blobs, err := filepath.Glob(filepath.Join(dir, manifest.BlobsDir, "sha256/*"))
		if err != nil {
			t.Fatal(err)
		}
		for _, b := range blobs {
			p["blob"] = append(p["blob"], strings.TrimPrefix(b, dir+"/"))
		}
	})
	if err != nil {
		t.Fatal(err)
	}
	return p, links
}

func isASCII(s string) bool {
	return !strings.ContainsFunc(s, func(r rune) bool { return r >= 0x7f })
}

// choose chooses a place of the kind.
func choose(t *testing.T, random *rand.Rand, image, kind string, paths paths) target {
	t.Helper()
	if kind == "anywhere" {
		fi, err := os.Stat(image)
		if err != nil {
			t.Fatal(err)
		}
		return target{kind, "", random.Int64N(fi.Size()), -1}
	}
	for {
		path := paths[kind][random.IntN(len(paths[kind]))]
		switch kind {
		case "inode":
			return target{kind, path, inodeAt(t, image, path) + random.Int64N(256), -1}
		case "attribute":
			return target{kind, path, attributesAt(t, image, path) + random.Int64N(blockSize(t, image)), -1}
		case "directory":
			return target{kind, path, contentAt(t, image, path, random.Int64N(blockSize(t, image))), -1}
		}
		in := random.Int64N(size(t, image, path))
		if at := contentAt(t, image, path, in); at != 0 {
			return target{kind, path, at, in}
		}
	}
}

// size is a file's size.
func size(t *testing.T, image, path string) (n int64) {
	t.Helper()
	out := debugfs(t, image, fmt.Sprintf("stat %q", "/"+path))
	_, rest, _ := strings.Cut(out, "Size: ")
	if _, err := fmt.Sscan(rest, &n); err != nil {
		t.Fatalf("debugfs says %q of %s", out, path)
	}
	return n
}

// damage is what the mount or verify says of a disk that is not as it was.
type damage struct {
	stderr  string
	reports []report.Verify
}

func (d *damage) String() string { return fmt.Sprintf("%s%+v", d.stderr, d.reports) }

// names says whether it is said of the file that goes by these paths, or, of a directory,
// of something in it.
func (d *damage) names(paths []string, dir bool) bool {
	for _, path := range paths {
		for _, l := range world.built.Layers {
			root := world.built.LayerPath(l)
			if !below(path, root) {
				continue
			}
			// That a layer's root can be read is asked before all else.
			if path == root && len(d.reports) == 0 && strings.Contains(d.stderr, l.Directory) {
				return true
			}
			for _, problem := range d.problems(root) {
				if isOf(problem, root, path, dir) {
					return true
				}
			}
		}
	}
	return false
}

// problems are those of the layer whose files are in root.
func (d *damage) problems(root string) (all []string) {
	for _, r := range d.reports {
		for _, l := range r.Damaged {
			if l.Directory == root {
				all = append(all, l.Problems...)
			}
		}
	}
	return all
}

// isOf says whether a problem of a layer names the path: quoted and relative to the layer's
// root, or as the kernel was asked for it.
func isOf(problem, root, path string, dir bool) bool {
	quoted, err := strconv.QuotedPrefix(problem)
	if err != nil {
		return strings.Contains(problem, path+": ") || dir && strings.Contains(problem, path+"/")
	}
	name, err := strconv.Unquote(quoted)
	name = filepath.Join(root, name)
	return err == nil && (name == path || dir && below(name, path))
}

// verified gives why the disk cannot be mounted, or what verify finds, nil if nothing.
func verified(t *testing.T, image string) (d *damage) {
	t.Helper()
	err := mounted(t, image, func(dir string) {
		cmd := exec.CommandContext(t.Context(), world.injector, "verify", "--log-level", "warn", "-o", "json", "--cache", dir)
		var stderr strings.Builder
		cmd.Stderr = &stderr
		out, err := cmd.Output()
		var reports []report.Verify
		if len(out) > 0 && json.Unmarshal(out, &reports) != nil {
			t.Fatalf("verify says %q", out)
		}
		if err != nil {
			d = &damage{stderr.String(), reports}
		}
		if err == nil && (len(reports) != 1 || reports[0].Layers != len(world.built.Layers)) {
			t.Fatalf("verify says %q", out)
		}
	})
	if err != nil {
		return &damage{stderr: err.Error()}
	}
	return d
}

// unnoticed is the reason why a flipped bit cannot be found, or "".
func unnoticed(t *testing.T, image string, at target) string {
	t.Helper()
	switch at.kind {
	case "headers":
		// Time, flags and operating system (RFC 1952), which decompression skips.
		if at.in >= 4 && at.in < 10 {
			return "the header of the compressed file, which says nothing of the contents"
		}
	case "manifest":
		return unproved(t, image)
	case "anywhere":
		return nobodys(t, image, at.at)
	}
	return ""
}

// unproved says what of the layer manifest has changed that nothing proves, "" if there is
// more.
func unproved(t *testing.T, image string) (reason string) {
	t.Helper()
	if err := mounted(t, image, func(dir string) {
		now, err := manifest.Read(dir)
		switch {
		case err != nil:
			t.Fatal(err)
		case reflect.DeepEqual(proved(now), proved(world.built)) && !reflect.DeepEqual(now, world.built):
			reason = "names, sizes, dates, versions and variants in the layer manifest, which no digest but the cache ID covers; that changes"
		case reflect.DeepEqual(now, world.built):
			reason = "how the layer manifest is spelt: white space, fields that are unknown or empty, the last bits of base64"
		}
	}); err != nil {
		t.Fatal(err)
	}
	return reason
}

// proved is a layer manifest without what nothing on the disk proves.
func proved(m *manifest.Manifest) manifest.Manifest {
	p := *m
	p.Created, p.Tool, p.Store.EngineVersion = time.Time{}, "", ""
	p.Platform = ocispec.Platform{OS: m.Platform.OS, Architecture: m.Platform.Architecture}
	p.Images, p.Layers = slices.Clone(m.Images), slices.Clone(m.Layers)
	for i := range p.Images {
		p.Images[i].Names = nil
	}
	for i := range p.Layers {
		p.Layers[i].Size = 0
	}
	return p
}

// nobodys says whose byte it is that verify does not prove, "" if it should.
func nobodys(t *testing.T, image string, at int64) string {
	t.Helper()
	block := at / blockSize(t, image)
	if inode := inodeWith(t, image, at); inode != 0 {
		if !strings.Contains(debugfs(t, image, fmt.Sprintf("testi <%d>", inode)), "marked in use") {
			return "an inode that is not in use"
		}
		return unread(t, image, inode)
	}
	if inode := ownerOf(t, image, block); inode != 0 {
		reason := unread(t, image, inode)
		if path := pathOf(t, image, inode); reason == "" && path != "" {
			if in := size(t, image, path) % blockSize(t, image); in > 0 && at%blockSize(t, image) >= in {
				return "the rest of a file's last block"
			}
		}
		return reason
	}
	if strings.Contains(debugfs(t, image, fmt.Sprintf("testb %d", block)), "not in use") {
		return "a block that is not in use"
	}
	switch metadataAt(t, image, block) {
	case "Block bitmap", "Inode bitmap", "Backup superblock", "Backup descriptors":
		return "a bitmap or a copy of the superblock or the descriptors, which a read-only mount does not read"
	case "Group descriptors":
		return "what a group's descriptor says of its room, which a read-only mount does not need"
	case "Primary superblock":
		if in := at % blockSize(t, image); in < 1024 || in >= 2048 {
			return "what is around the superblock in its block"
		}
	}
	return ""
}

// TestNobodys asks of places that ext4 has for itself, and of one that verify proves.
func TestNobodys(t *testing.T) {
	block := blockSize(t, world.disk)
	group := 8 * block * block // in bytes: a bitmap is a block
	if block == 1024 {
		t.Fatal("the superblock has a block of its own")
	}
	for at, want := range map[int64]string{
		0:             "around the superblock",
		1024 + 0x68:   "",
		2048:          "around the superblock",
		block:         "group's descriptor",
		group + 100:   "a copy of the superblock",
		group + block: "a copy of the superblock or the descriptors",
		contentAt(t, world.disk, manifest.Path, 0): "",
	} {
		if got := nobodys(t, world.disk, at); (got == "") != (want == "") || !strings.Contains(got, want) {
			t.Errorf("byte %d is %q, want %q", at, got, want)
		}
	}
}

// unread says why nobody reads an inode in use and what it has, "" if verify does.
func unread(t *testing.T, image string, inode int64) string {
	t.Helper()
	const root, first = 2, 11 // what is between is ext4's own
	path := pathOf(t, image, inode)
	read := inode == root || below(path, manifest.Dir) || slices.ContainsFunc(world.built.Layers, func(l manifest.Layer) bool {
		dir := world.built.LayerPath(l)
		return below(path, dir) || below(dir, path) || below(world.built.TarSplitPath(l), path)
	})
	switch {
	case read:
	case inode < first:
		return "the journal, room for a larger disk or another of ext4's own inodes, which a read-only mount does not read"
	case path == "lost+found":
		return "the directory lost+found"
	case below(path, world.built.Store.Root):
		return "a file that Docker keeps for itself and no node reads"
	}
	return ""
}
