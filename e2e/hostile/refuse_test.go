//go:build e2e

package hostile_test

import (
	"bytes"
	"compress/gzip"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sys/unix"

	"github.com/selkies-project/packer-plugin-selkies/e2e/cachedisk"
	"github.com/selkies-project/packer-plugin-selkies/e2e/host"
	"github.com/selkies-project/packer-plugin-selkies/manifest"
)

// runtimes are what the disks are offered to.
var runtimes = []string{"containerd", "docker"}

// What a refusal may take, on a machine that does other things too.
const (
	maxTime   = time.Minute
	maxMemory = 512 << 20
)

// checkRefused wants one line on stderr with every word, and little time and memory.
func (tr trace) checkRefused(t *testing.T, words ...string) {
	t.Helper()
	if tr.status != 1 {
		t.Errorf("exit status %d, want 1", tr.status)
	}
	line, more, _ := strings.Cut(tr.stderr, "\n")
	if more != "" {
		t.Errorf("more than one line on stderr: %q", tr.stderr)
	}
	if err := host.CheckLine(line); err != nil {
		t.Error(err)
	}
	for _, w := range words {
		if !strings.Contains(line, w) {
			t.Errorf("%q does not have %q", line, w)
		}
	}
	tr.checkCost(t)
}

func (tr trace) checkCost(t *testing.T) {
	t.Helper()
	if tr.took > maxTime || tr.memory > maxMemory {
		t.Errorf("took %v and %d MiB", tr.took, tr.memory>>20)
	}
}

// leadsOut replaces a file of the disk by a symbolic link to the same in outside.
func leadsOut(file, to string) func(dir string) error {
	return leadsTo(outside, file, to)
}

// leadsTo does so with a link to another directory.
func leadsTo(where, file, to string) func(dir string) error {
	return func(dir string) error {
		name := filepath.Join(dir, file)
		return errors.Join(os.RemoveAll(name), os.Symlink(filepath.Join(where, to), name))
	}
}

// pipe replaces a file of the disk by a named pipe.
func pipe(file string) func(dir string) error {
	return func(dir string) error {
		name := filepath.Join(dir, file)
		return errors.Join(os.RemoveAll(name), unix.Mkfifo(name, 0o644))
	}
}

// device replaces a file of the disk by a device, of type S_IFCHR or S_IFBLK.
func device(file string, kind, major, minor uint32) func(dir string) error {
	return func(dir string) error {
		name := filepath.Join(dir, file)
		return errors.Join(os.RemoveAll(name), unix.Mknod(name, kind|0o644, int(unix.Mkdev(major, minor))))
	}
}

// flipped changes one bit of a file of the disk.
func flipped(file string) func(dir string) error {
	return func(dir string) error {
		name := filepath.Join(dir, file)
		data, err := os.ReadFile(name)
		if err != nil {
			return err
		}
		data[len(data)/2] ^= 1
		return os.WriteFile(name, data, 0o600)
	}
}

// bombs replaces the recorded headers of every layer by two MB that expand to two GB: a
// beginning, and one character again and again.
func bombs(beginning, again string) func(dir string) error {
	return func(dir string) error {
		// A gzip stream may have any number of members.
		bomb := slices.Concat(compressed(beginning), bytes.Repeat(compressed(strings.Repeat(again, 16<<20)), 128))
		for _, l := range world.built.Layers {
			file := filepath.Join(dir, world.built.TarSplitPath(l))
			if err := os.WriteFile(file, bomb, 0o644); err != nil {
				return err
			}
		}
		return nil
	}
}

func compressed(text string) []byte {
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	_, _ = z.Write([]byte(text)) // a buffer does not fail
	_ = z.Close()
	return b.Bytes()
}

// edited changes the layer manifest, which is not valid then.
func edited(edit func(m *manifest.Manifest)) func(dir string) error {
	return func(dir string) error {
		m, err := manifest.Read(dir)
		if err != nil {
			return err
		}
		edit(m)
		b, err := json.Marshal(m)
		if err != nil {
			return err
		}
		return os.WriteFile(filepath.Join(dir, manifest.Path), b, 0o644)
	}
}

// replaced writes another layer manifest.
func replaced(text func() []byte) func(dir string) error {
	return func(dir string) error { return os.WriteFile(filepath.Join(dir, manifest.Path), text(), 0o644) }
}

// reconfigured gives the first image another config, with every digest that follows.
func reconfigured(config func() []byte) func(dir string) error {
	return edited(func(m *manifest.Manifest) {
		img := &m.Images[0]
		inline := func(mediaType string, b []byte) ocispec.Descriptor {
			return ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(b), Size: int64(len(b)), Data: b}
		}
		img.Config = inline(img.Config.MediaType, config())
		var im ocispec.Manifest
		if err := json.Unmarshal(img.Manifest.Data, &im); err != nil {
			panic(err) // of an image that was valid
		}
		im.Config = img.Config
		im.Config.Data = nil
		b, err := json.Marshal(im)
		if err != nil {
			panic(err)
		}
		img.Manifest = inline(img.Manifest.MediaType, b)
		img.Names, img.Index = []string{"registry.example.com/hostile:1"}, nil
	})
}

const million = 1_000_000

func many(element string) string { return strings.Repeat(element+",", million) + element }

// hostile is a disk that is refused, with these words.
type hostile struct {
	name  string
	spoil func(dir string) error
	words []string
}

// escaping are disks that want to lead out of themselves.
func escaping(t *testing.T) []hostile {
	t.Helper()
	l := layer(t, 1)
	escape := "\x1b]0;owned\x07\n"
	return []hostile{
		{"manifest outside", leadsOut(manifest.Path, manifest.Path), []string{manifest.Path, "not a regular file"}},
		{"manifest's directory outside", leadsOut(manifest.Dir, manifest.Dir), []string{manifest.Path, "symbolic link"}},
		{"manifest a pipe", pipe(manifest.Path), []string{manifest.Path, "not a regular file"}},
		{"manifest a device", device(manifest.Path, unix.S_IFCHR, 1, 5), []string{manifest.Path, "not a regular file"}},
		{"store outside", leadsOut("docker", ""), []string{"layer sha256:", "symbolic link"}},
		{"manifest in /run", leadsTo(inside.run, manifest.Path, manifest.Path), []string{manifest.Path, "not a regular file"}},
		{"store in containerd's", leadsTo(inside.containerd, "docker", ""), []string{"layer sha256:", "symbolic link"}},
		{"layer in Docker's", leadsTo(inside.docker, filepath.Dir(layerPath(l, "")), ""), []string{l.ChainID.String(), l.Directory, "symbolic link"}},
		{"layer's files in Docker's", leadsTo(inside.docker, layerPath(l, ""), "diff"), []string{l.ChainID.String(), l.Directory, "not a directory"}},
		{"layer's files in /proc", leadsTo(inside.proc, layerPath(l, ""), ""), []string{l.ChainID.String(), l.Directory, "not a directory"}},
		{"store outside, relatively", func(dir string) error {
			return errors.Join(os.Rename(filepath.Join(dir, "docker"), filepath.Join(dir, "moved")), os.Symlink("../../.."+outside, filepath.Join(dir, "docker")))
		}, []string{"layer sha256:", "symbolic link"}},
		{"graph driver outside", leadsOut("docker/overlay2", ""), []string{"layer sha256:", "symbolic link"}},
		{"layer outside", leadsOut(filepath.Dir(layerPath(l, "")), ""), []string{l.ChainID.String(), l.Directory, "symbolic link"}},
		{"layer's files outside", leadsOut(layerPath(l, ""), "diff"), []string{l.ChainID.String(), l.Directory, "not a directory"}},
		{"layer's files a device", device(layerPath(l, ""), unix.S_IFBLK, 7, 0), []string{l.ChainID.String(), "not a directory"}},
		{"absolute root", edited(func(m *manifest.Manifest) { m.Store.Root = outside }), []string{"store.root", `"/srv/outside" is absolute`}},
		{"root outside", edited(func(m *manifest.Manifest) { m.Store.Root = "../../.." + outside }), []string{"store.root", "not a clean relative path"}},
		{"directory outside", edited(func(m *manifest.Manifest) { m.Layers[1].Directory = "../../../../.." + outside }), []string{"layers[1]", "directory"}},
		{"directory of two lines", edited(func(m *manifest.Manifest) { m.Layers[1].Directory = escape }), []string{"layers[1]", `"\x1b]0;owned\a\n"`}},
		{"name of two lines", edited(func(m *manifest.Manifest) { m.Images[0].Names[0] = escape }), []string{"images[0]", `\x1b]0;owned\a\n`}},
		{"parent of two lines", edited(func(m *manifest.Manifest) { m.Layers[1].Parent = digest.Digest(escape) }), []string{"layers[1]", `\x1b]0;owned\a\n`}},
		{"platform of two lines", edited(func(m *manifest.Manifest) { m.Platform.OS = escape }), []string{"platform", `\x1b]0;owned\a\n`}},
	}
}

// exhausting are disks that want to use up time or memory, lying ones that say what is not
// true.
var (
	exhausting = []hostile{
		{"10 GB", func(dir string) error { return os.Truncate(filepath.Join(dir, manifest.Path), 10<<30) }, []string{manifest.Path, "larger than 67108864 bytes"}},
		{"a million layers", replaced(func() []byte { return []byte(`{"schemaVersion":1,"layers":[` + many("{}") + "]}") }), []string{manifest.Path, "more than 250000 values"}},
		{"a million images", replaced(func() []byte { return []byte(`{"schemaVersion":1,"images":[` + many("{}") + "]}") }), []string{manifest.Path, "more than 250000 values"}},
		{"64 MB of one object", replaced(func() []byte { return bytes.Repeat([]byte(`{"a":`), manifest.MaxSize/5) }), []string{manifest.Path, "exceeded max depth"}},
		{"64 MB of one name", replaced(func() []byte {
			return []byte(`{"schemaVersion":1,"platform":{"os":"` + strings.Repeat("x", manifest.MaxSize-100) + `","architecture":"amd64"}}`)
		}), []string{manifest.Path}},
		{"a config of depth 100,000", reconfigured(func() []byte {
			return []byte(strings.Repeat(`{"a":`, 100_000) + "1" + strings.Repeat("}", 100_000))
		}), []string{"hostile:1", "config", "exceeded max depth"}},
		{"a config of a million layers", reconfigured(func() []byte {
			return []byte(`{"os":"linux","architecture":"amd64","rootfs":{"diff_ids":[` + many(`""`) + "]}}")
		}), []string{"hostile:1", "config", "more than 250000 values"}},
		{"a config of 80 MB", reconfigured(func() []byte { return bytes.Repeat([]byte(" "), 80<<20) }), []string{manifest.Path, "larger than 67108864 bytes"}},
	}
	lying = []hostile{
		{"digest", edited(func(m *manifest.Manifest) { m.Images[0].Config.Data[0] ^= 1 }), []string{"images[0]", "config: digest is"}},
		{"size", edited(func(m *manifest.Manifest) { m.Images[0].Manifest.Size++ }), []string{"images[0]", "manifest: sha256:", "size is"}},
		{"size of a layer", edited(func(m *manifest.Manifest) { m.Layers[1].Size = -1 }), []string{"layers[1]", "size is -1"}},
		{"chain ID", edited(func(m *manifest.Manifest) { m.Layers[1].ChainID = digest.FromString("x") }), []string{"layers[1]", "does not follow"}},
		{"diff ID", edited(func(m *manifest.Manifest) { m.Layers[1].DiffID = digest.FromString("x") }), []string{"layers[1]", "does not follow"}},
		{"another platform", edited(func(m *manifest.Manifest) { m.Platform.Architecture = "s390x" }), []string{"images[0]", "config is for platform"}},
		{"a manifest as an index", edited(func(m *manifest.Manifest) { m.Images[0].Manifest.MediaType = ocispec.MediaTypeImageIndex }), []string{"images[0]", "not that of an image manifest"}},
	}
)

// elsewhere are the other commands that open a disk.
var elsewhere = [][]string{{"plan", "--runtime", "containerd"}, {"plan", "--runtime", "docker"}, {"verify", "--log-level", "warn"}, {"report", "--html", "-"}}

// TestRefused has disks that are refused before anything is done with a runtime: by inject,
// and each by one of the other commands, in turn.
func TestRefused(t *testing.T) {
	for i, tt := range slices.Concat(escaping(t), exhausting, lying) {
		t.Run(tt.name, func(t *testing.T) {
			attach(t, cachedisk.Changed(t, world.disk, tt.spoil))
			before := registered(t)
			for _, runtime := range runtimes {
				t.Run(runtime, func(t *testing.T) {
					tr := runTraced(t, "inject", "--runtime", runtime, "--cache", cacheDir)
					tr.checkRefused(t, append(tt.words, cacheDir, "build the disk again")...)
					tr.checkAccesses(t, mayLock)
				})
			}
			other := elsewhere[i%len(elsewhere)]
			t.Run(other[0], func(t *testing.T) {
				tr := runTraced(t, append(other, "--cache", cacheDir)...)
				tr.checkRefused(t, append(tt.words, cacheDir, "build the disk again")...)
				tr.checkAccesses(t, mayLock)
			})
			if after := registered(t); after != before {
				t.Errorf("was %s, is %s", before, after)
			}
		})
	}
}

func leads(i int) string { return fmt.Sprintf("/mnt/disks/leads-%02d", i) }

// TestAgentRefuses has the agent, one for each runtime, find all disks at once that want to
// lead it out of them. It has nothing to serve, and says why when the gate opens.
func TestAgentRefuses(t *testing.T) {
	var caches []string
	disks := escaping(t)
	for i, tt := range disks {
		attachAt(t, cachedisk.Changed(t, world.disk, tt.spoil), leads(i))
		caches = append(caches, "--cache", leads(i))
	}
	before := registered(t)
	var runs []*tracing
	for _, runtime := range runtimes {
		runs = append(runs, startTraced(t, append(caches, "run", "--kubernetes=false", "--runtime", runtime, "--metrics-address", "", "--gate-deadline", "1s")...))
	}
	for _, run := range runs {
		run.waitSaid(t, "reason=BrokenManifest", "build the disk again")
	}
	if _, err := world.node.Signal(syscall.SIGTERM, filepath.Base(injector)[:15]); err != nil {
		t.Error(err)
	}
	for _, run := range runs {
		tr := run.end(t)
		if tr.status != 0 || strings.ContainsAny(tr.stderr, "\x1b\a") {
			t.Errorf("exit status %d: %q", tr.status, tr.stderr)
		}
		tr.checkAccesses(t, mayLock)
		for i := range disks {
			if !slices.ContainsFunc(tr.accesses, func(a access) bool { return below(a.path, leads(i)) }) {
				t.Errorf("nothing of the disk %q was looked at", disks[i].name)
			}
		}
	}
	if after := registered(t); after != before {
		t.Errorf("was %s, is %s", before, after)
	}
}

// TestRefusedFiles has disks with files that a runtime would be led out of the disk by,
// long after inject has looked at them, or that verify would.
func TestRefusedFiles(t *testing.T) {
	l := layer(t, 1)
	split := world.built.TarSplitPath(l)
	var blobs []string
	for _, img := range world.built.Images {
		list, err := img.LayerBlobs()
		if err != nil {
			t.Fatal(err)
		}
		blobs = append(blobs, list[len(list)-1].Digest.Encoded())
	}
	slices.Sort(blobs)
	blob := filepath.Join(manifest.BlobsDir, "sha256", blobs[0])
	for _, tt := range []struct {
		name    string
		spoil   func(dir string) error
		command []string
		words   []string
	}{
		{"headers, inject into Docker", leadsOut(split, "secret"), []string{"inject", "--runtime", "docker"}, []string{l.ChainID.String(), "not a regular file"}},
		{"headers in Docker's store, inject into Docker", leadsTo(inside.docker, split, "secret"), []string{"inject", "--runtime", "docker"}, []string{l.ChainID.String(), "not a regular file"}},
		{"headers a pipe, inject into Docker", pipe(split), []string{"inject", "--runtime", "docker"}, []string{l.ChainID.String(), "not a regular file"}},
		{"headers a device, inject into Docker", device(split, unix.S_IFCHR, 1, 5), []string{"inject", "--runtime", "docker"}, []string{l.ChainID.String(), "not a regular file"}},
		{"layerdb, inject into Docker", leadsOut(filepath.Dir(split), ""), []string{"inject", "--runtime", "docker"}, []string{l.ChainID.String(), "symbolic link"}},
		{"headers, verify", leadsOut(split, "secret"), []string{"verify", "--log-level", "warn"}, []string{l.Directory, "not a regular file"}},
		{"a file of a layer, verify", leadsOut(layerPath(l, "odd/first"), "secret"), []string{"verify", "--log-level", "warn"}, []string{l.Directory, `"odd/first"`}},
		{"a directory of a layer, verify", leadsOut(layerPath(l, "odd"), "diff"), []string{"verify", "--log-level", "warn"}, []string{l.Directory, `"odd`}},
		{"headers in /run, verify", leadsTo(inside.run, split, "secret"), []string{"verify", "--log-level", "warn"}, []string{l.Directory, "not a regular file"}},
		{"a file of a layer in /proc, verify", leadsTo(inside.proc, layerPath(l, "odd/first"), "shm"), []string{"verify", "--log-level", "warn"}, []string{l.Directory, `"odd/first"`}},
		{"a directory of a layer in Docker's store, verify", leadsTo(inside.docker, layerPath(l, "odd"), "diff"), []string{"verify", "--log-level", "warn"}, []string{l.Directory, `"odd`}},
		{"blob, verify", leadsOut(blob, "secret"), []string{"verify", "--log-level", "warn"}, []string{"is damaged", blobs[0]}},
		// Last: the others' images are registered then.
		{"blob, inject into containerd", leadsOut(blob, "secret"), []string{"inject", "--runtime", "containerd"}, []string{blobs[0], "not a regular file"}},
		{"blob in containerd's store, inject into containerd", leadsTo(inside.containerd, blob, "secret"), []string{"inject", "--runtime", "containerd"}, []string{blobs[0], "not a regular file"}},
		{"blob a pipe, inject into containerd", pipe(blob), []string{"inject", "--runtime", "containerd"}, []string{blobs[0], "not a regular file"}},
		{"blob of other bytes, inject into containerd", flipped(blob), []string{"inject", "--runtime", "containerd"}, []string{blobs[0], "hashes to"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			attach(t, cachedisk.Changed(t, world.disk, tt.spoil))
			tr := runTraced(t, append(tt.command, "--cache", cacheDir)...)
			tr.checkRefused(t, append(tt.words, "build the disk again")...)
			write := mayLock
			if strings.HasPrefix(tt.name, "blob") && tt.command[0] == "inject" {
				write = mayWrite
				defer world.node.Output(t, injector, "eject", "--runtime", "containerd")
			}
			tr.checkAccesses(t, write)
			if out := world.node.Output(t, "sh", "-ec", "ctr -n k8s.io content ls -q; ls "+blobsDir); strings.Contains(out, blobs[0]) {
				t.Errorf("containerd has the blob: %s", out)
			}
		})
	}
}

// blobsDir is where containerd looks for blobs.
const blobsDir = "/var/lib/containerd/io.containerd.content.v1.content/blobs/sha256"

// TestBlobsElsewhere has a disk with the same layer manifest take the place of one whose
// blobs are registered, as after a reboot: containerd would open what is in their place.
func TestBlobsElsewhere(t *testing.T) {
	list, err := world.built.Images[0].LayerBlobs()
	if err != nil {
		t.Fatal(err)
	}
	hash := list[0].Digest.Encoded()
	blob := filepath.Join(manifest.BlobsDir, "sha256", hash)
	command := []string{"inject", "--runtime", "containerd", "--cache", cacheDir}
	registered := func(t *testing.T) {
		t.Helper()
		attach(t, world.disk)
		world.node.Output(t, append([]string{injector}, command...)...)
		if out := world.node.Output(t, "sh", "-ec", "ctr -n k8s.io content get sha256:"+hash+" | sha256sum"); !strings.HasPrefix(out, hash) {
			t.Errorf("containerd gives %s for %s", out, hash)
		}
	}
	t.Run("registered", registered)
	defer world.node.Output(t, injector, "eject", "--runtime", "containerd")
	for _, tt := range []struct {
		name  string
		spoil func(dir string) error
		words []string
	}{
		{"outside", leadsOut(blob, "secret"), []string{"not a regular file"}},
		{"a pipe", pipe(blob), []string{"not a regular file"}},
		{"shorter", func(dir string) error { return os.Truncate(filepath.Join(dir, blob), 1) }, []string{"has 1 bytes"}},
	} {
		t.Run(tt.name, func(t *testing.T) {
			world.node.Output(t, "sh", "-ec", "umount $(findmnt -rno TARGET | grep /snapshots/)")
			attach(t, cachedisk.Changed(t, world.disk, tt.spoil))
			tr := runTraced(t, command...)
			tr.checkRefused(t, append(tt.words, hash, cacheDir, "build the disk again")...)
			tr.checkAccesses(t, mayLock)
			if out := world.node.Output(t, "cat", "/proc/1/mountinfo"); strings.Contains(out, "/snapshots/") {
				t.Errorf("it is mounted for containerd: %s", out)
			}
		})
		t.Run("registered again", registered)
	}
}

// TestBombs has recorded headers that expand to two GB, of every layer at once.
func TestBombs(t *testing.T) {
	for _, tt := range []struct{ name, beginning, again, says string }{
		{"of spaces", "", " ", "for one file"},
		{"of one name", `{"type":1,"name":"`, "x", "for one file"},
		{"of zeros", "", "\x00", "invalid character"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			attach(t, cachedisk.Changed(t, world.disk, bombs(tt.beginning, tt.again)))
			tr := runTraced(t, "verify", "--log-level", "warn", "--cache", cacheDir)
			if n := strings.Count(tr.stderr, tt.says); tr.status != 1 || n != len(world.built.Layers) {
				t.Errorf("exit status %d, %d of %d layers damaged: %s", tr.status, n, len(world.built.Layers), tr.stderr)
			}
			tr.checkCost(t)
			t.Logf("%v, at most %d MiB", tr.took, tr.memory>>20)
			tr.checkAccesses(t, mayLock)
		})
	}
}

// TestHarmless has what Docker reads of a store of its own, and nobody of a cache disk.
func TestHarmless(t *testing.T) {
	l := layer(t, 1)
	dir := filepath.Dir(layerPath(l, ""))
	image := cachedisk.Changed(t, world.disk, func(root string) error {
		var errs []error
		for file, text := range map[string]string{"link": "../../../../../.." + outside + "\n", "lower": "l/../../../../.." + outside + ":" + outside, "committed": "\x1b"} {
			errs = append(errs, os.WriteFile(filepath.Join(root, dir, file), []byte(text), 0o644))
		}
		return errors.Join(append(errs,
			leadsOut("docker/overlay2/l", "")(root),
			leadsOut(filepath.Join(filepath.Dir(world.built.TarSplitPath(l)), "cache-id"), "secret")(root),
			leadsOut("docker/image/overlay2/repositories.json", "secret")(root),
			leadsOut("docker/image/overlay2/imagedb", "")(root))...)
	})
	attach(t, image)
	for _, runtime := range runtimes {
		t.Run(runtime, func(t *testing.T) {
			tr := runTraced(t, "inject", "--runtime", runtime, "--cache", cacheDir)
			if tr.status != 0 || tr.stderr != "" {
				t.Fatalf("exit status %d: %s", tr.status, tr.stderr)
			}
			tr.checkAccesses(t, mayWrite)
			if runtime == "docker" {
				for _, ref := range world.refs {
					if out := world.node.Output(t, "docker", "run", "--rm", "--network", "none", ref, "/bin/echo", "hello"); out != "hello\n" {
						t.Errorf("%s says %q", ref, out)
					}
				}
			}
			for _, command := range [][]string{{"plan"}, append([]string{"plan"}, world.refs...), {"status"}, {"report", "--html", "-"}} {
				tr := runTraced(t, append(command, "--runtime", runtime, "--cache", cacheDir)...)
				if tr.status != 0 || tr.stderr != "" {
					t.Errorf("%v: exit status %d: %s", command, tr.status, tr.stderr)
				}
				tr.checkAccesses(t, mayLock)
			}
			run := startTraced(t, "run", "--kubernetes=false", "--runtime", runtime, "--cache", cacheDir, "--metrics-address", "", "--verify-rate", "1GB")
			run.waitSaid(t, "msg=verified")
			if _, err := world.node.Signal(syscall.SIGTERM, filepath.Base(injector)[:15]); err != nil {
				t.Error(err)
			}
			if tr := run.end(t); tr.status != 0 {
				t.Errorf("run: exit status %d: %s", tr.status, tr.stderr)
			} else {
				tr.checkAccesses(t, mayWrite)
			}
			tr = runTraced(t, "eject", "--runtime", runtime, "--cache", cacheDir)
			if tr.status != 0 {
				t.Errorf("eject: %s", tr.stderr)
			}
			tr.checkAccesses(t, mayWrite)
		})
	}
	note := mayLock[0] + "/note"
	tr := runTraced(t, "verify", "--log-level", "warn", "--cache", cacheDir, "--resume", note)
	if tr.status != 0 {
		t.Errorf("verify: %s", tr.stderr)
	}
	tr.checkAccesses(t, mayLock)
	if _, err := os.Stat(world.node.Path(note)); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the note of a complete verification is left: %v", err)
	}
}

// TestTwins has a second disk with the same layer manifest, and other files: nothing is read
// of it while the first is there.
func TestTwins(t *testing.T) {
	const twin = "/mnt/disks/twin"
	l := layer(t, 1)
	attach(t, world.disk)
	attachAt(t, cachedisk.Changed(t, world.disk, func(dir string) error {
		return errors.Join(
			leadsOut(world.built.TarSplitPath(l), "secret")(dir),
			os.WriteFile(filepath.Join(dir, layerPath(l, "odd/first")), []byte("of the twin"), 0o644))
	}), twin)
	// By its status: ctr can lose what a container says that ends at once.
	own := []string{"/bin/busybox", "sh", "-c", "! /bin/busybox grep -q twin /odd/first"}
	for _, runtime := range runtimes {
		t.Run(runtime, func(t *testing.T) {
			tr := runTraced(t, "inject", "--runtime", runtime, "--cache", cacheDir, "--cache", twin)
			if tr.status != 0 {
				t.Fatalf("exit status %d: %s", tr.status, tr.stderr)
			}
			tr.checkAccesses(t, mayWrite)
			defer world.node.Output(t, injector, "eject", "--runtime", runtime)
			ref := world.refs[slices.IndexFunc(world.refs, func(ref string) bool { return strings.Contains(ref, "/odd-files") })]
			run := append([]string{"docker", "run", "--rm", "--network", "none", ref}, own...)
			if runtime == "containerd" {
				run = append([]string{"ctr", "-n", "k8s.io", "run", "--rm", ref, "twins"}, own...)
			}
			world.node.Output(t, run...)
		})
	}
	// Who asks for both has both proved.
	tr := runTraced(t, "verify", "--log-level", "warn", "--cache", cacheDir, "--cache", twin)
	tr.checkRefused(t, twin, l.Directory, "not a regular file", "build the disk again")
	tr.checkAccesses(t, mayLock)
}

// TestTracer proves that an escape would be seen.
func TestTracer(t *testing.T) {
	attach(t, cachedisk.Changed(t, world.disk, leadsOut("leads", "secret")))
	for name, want := range map[string]bool{"leads": true, manifest.Path: false} {
		found := false
		for _, line := range []string{
			fmt.Sprintf(`newfstatat(AT_FDCWD</>, "%s/%s", {st_mode=S_IFREG|0600}, 0) = 0`, cacheDir, name),
			fmt.Sprintf(`openat(5<%s>, "%s", O_RDONLY) = -1 EACCES (Permission denied)`, cacheDir, name),
			fmt.Sprintf(`openat2(5<%s>, "%s", {flags=O_RDONLY, resolve=RESOLVE_NO_XDEV}, 24) = -1 EXDEV (Invalid cross-device link)`, cacheDir, name),
		} {
			accesses := parse(t, line)
			for _, a := range accesses {
				found = found || below(a.path, outside)
			}
			if stray := len(strays(accesses, nil)) > 0; stray != want {
				t.Errorf("%s: a stray %t", line, stray)
			}
		}
		if found != want {
			t.Errorf("%s: found %t", name, found)
		}
	}
	for _, dir := range []string{inside.run, inside.docker, inside.containerd, inside.proc} {
		line := fmt.Sprintf(`openat(AT_FDCWD</>, "%s", O_RDONLY|O_CLOEXEC) = 5<%[1]s>`, dir)
		if found := strays(parse(t, line), nil); len(found) != 1 {
			t.Errorf("%s: %q", line, found)
		}
	}
	if a := parse(t, `newfstatat(AT_FDCWD</>, "`+cacheDir+`/leads", {st_mode=S_IFLNK|0777}, AT_SYMLINK_NOFOLLOW) = 0`); below(a[0].path, outside) {
		t.Errorf("followed %s", a[0])
	}
}
