package docker

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/docker/docker/api/types/system"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-cmp/cmp/cmpopts"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	testdisk "github.com/selkies-project/packer-plugin-selkies/e2e/cachedisk"
	"github.com/selkies-project/packer-plugin-selkies/injector/cachedisk"
	"github.com/selkies-project/packer-plugin-selkies/injector/report"
	"github.com/selkies-project/packer-plugin-selkies/manifest"
)

// newStore is a store as dockerd makes it, below a directory that stands for the
// host's root.
func newStore(t testing.TB) store {
	t.Helper()
	s := store{hostRoot: t.TempDir(), root: DefaultRoot}
	for _, dir := range []string{"proc/1", "var/lib"} {
		if err := os.MkdirAll(filepath.Join(s.hostRoot, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink(s.hostRoot, filepath.Join(s.hostRoot, "proc/1/root")); err != nil {
		t.Fatal(err)
	}
	write(t, filepath.Join(s.hostRoot, "proc/1/mountinfo"), "")
	for _, dir := range []string{s.overlay("l"), s.image("layerdb"), s.image("imagedb/content/sha256"), s.image("imagedb/metadata/sha256")} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	return s
}

func write(t testing.TB, name, content string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(name, []byte(content), 0o644); err != nil {
		t.Fatal(err)
	}
}

// pulled puts a layer into the store as dockerd does.
func (s store) pulled(t *testing.T, chain, parent digest.Digest, id, link, lower string) {
	t.Helper()
	write(t, filepath.Join(s.layerdb(chain), "cache-id"), id)
	if parent != "" {
		write(t, filepath.Join(s.layerdb(chain), "parent"), parent.String())
		write(t, s.overlay(id, "lower"), lower)
	}
	write(t, s.overlay(id, "link"), link)
}

// newDisk is a cache disk with one image of n layers.
func newDisk(t testing.TB, n int, names ...string) *cachedisk.Disk {
	t.Helper()
	m := newManifest()
	addImage(t, m, "d", n, names...)
	d := &cachedisk.Disk{Dir: t.TempDir(), ID: cacheID(t, m), Manifest: m}
	for _, l := range m.Layers {
		write(t, filepath.Join(d.Dir, m.TarSplitPath(l)), "")
	}
	return d
}

func newManifest() *manifest.Manifest {
	return &manifest.Manifest{
		SchemaVersion: 1, Created: time.Unix(1, 0), Tool: "test",
		Platform: ocispec.Platform{OS: "linux", Architecture: "amd64"},
		Store:    manifest.Store{Driver: "overlay2", Root: "docker", EngineVersion: "1"},
	}
}

func cacheID(t testing.TB, m *manifest.Manifest) digest.Digest {
	t.Helper()
	id, err := m.ID()
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// addImage adds an image of n layers, whose directories are salt0, salt1 and so on.
func addImage(t testing.TB, m *manifest.Manifest, salt string, n int, names ...string) {
	t.Helper()
	config := ocispec.Image{Platform: m.Platform, RootFS: ocispec.RootFS{Type: "layers"}}
	image := ocispec.Manifest{MediaType: ocispec.MediaTypeImageManifest}
	var parent digest.Digest
	for i := range n {
		dir := fmt.Sprint(salt, i)
		config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, digest.FromString(dir))
		chain := identity.ChainID(slices.Clone(config.RootFS.DiffIDs))
		m.Layers = append(m.Layers, manifest.Layer{
			DiffID: digest.FromString(dir), ChainID: chain, Parent: parent, Directory: dir, Size: int64(i),
		})
		parent = chain
		image.Layers = append(image.Layers, ocispec.Descriptor{Digest: digest.FromString("blob " + dir)})
	}
	inline := func(mediaType string, v any) ocispec.Descriptor {
		b, err := json.Marshal(v)
		if err != nil {
			t.Fatal(err)
		}
		return ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(b), Size: int64(len(b)), Data: b}
	}
	img := manifest.Image{Names: names, Config: inline(ocispec.MediaTypeImageConfig, config)}
	image.Config = img.Config
	image.Config.Data = nil
	img.Manifest = inline(image.MediaType, image)
	m.Images = append(m.Images, img)
}

func TestFamiliar(t *testing.T) {
	d := "@sha256:" + strings.Repeat("a", 64)
	for normalised, want := range map[string]name{
		"docker.io/library/debian:12":     {"debian", "debian:12"},
		"debian":                          {"debian", "debian:latest"},
		"docker.io/library/debian" + d:    {"debian", "debian" + d},
		"docker.io/library/debian:12" + d: {"debian", "debian" + d},
		"docker.io/selkies/desktop:1.4":   {"selkies/desktop", "selkies/desktop:1.4"},
		"gcr.io/project/a/b:c":            {"gcr.io/project/a/b", "gcr.io/project/a/b:c"},
		"127.0.0.1:5000/a:b":              {"127.0.0.1:5000/a", "127.0.0.1:5000/a:b"},
	} {
		got, err := familiar(normalised)
		if err != nil || got != want {
			t.Errorf("familiar(%q) = %v, %v; want %v", normalised, got, err, want)
		}
		if got.tagged() == strings.Contains(want.ref, "@") {
			t.Errorf("%q: tagged() = %t", want.ref, got.tagged())
		}
	}
	if _, err := familiar("Not a reference"); err == nil {
		t.Error("no error for a malformed reference")
	}
}

func TestRepositories(t *testing.T) {
	s := newStore(t)
	a, b := digest.FromString("a"), digest.FromString("b")
	const was = `{"Repositories":{"debian":{"debian:12":"` // as dockerd writes it
	write(t, s.image("repositories.json"), was+a.String()+`"}}}`)
	r, err := s.readRepositories()
	if err != nil {
		t.Fatal(err)
	}
	if r.set(name{"debian", "debian:12"}, newName{"", b}) || r.set(name{"debian", "debian:12"}, newName{b, b}) {
		t.Error("a name that the node has was replaced")
	}
	if !r.set(name{"debian", "debian:13"}, newName{"", a}) || !r.set(name{"x", "x:1"}, newName{"", b}) {
		t.Error("a new name was not added")
	}
	if !r.set(name{"debian", "debian:13"}, newName{a, b}) {
		t.Error("an older generation's name was not replaced")
	}
	if err := s.writeRepositories(r); err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(s.image("repositories.json"))
	want := was + a.String() + `","debian:13":"` + b.String() + `"},"x":{"x:1":"` + b.String() + `"}}}`
	if err != nil || string(got) != want {
		t.Errorf("wrote %s, %v; want %s", got, err, want)
	}

	write(t, s.image("repositories.json"), "{")
	if _, err := s.readRepositories(); err == nil || !strings.Contains(err.Error(), "repositories.json") {
		t.Errorf("a broken file gives %v", err)
	}
}

// TestPlanLower has the node's own layers below those of the disk.
func TestPlanLower(t *testing.T) {
	r := &Runtime{store: newStore(t), opt: Options{Link: LinkSymlink}}
	d := newDisk(t, 4, "docker.io/library/x:1")
	l := d.Manifest.Layers
	r.pulled(t, l[0].ChainID, "", "node0", "NODE0", "")
	r.pulled(t, l[1].ChainID, l[0].ChainID, "node1", "NODE1", "l/NODE0")
	c, err := r.plan([]*cachedisk.Disk{d}, r.checker())
	if err != nil {
		t.Fatal(err)
	}
	var lowers []string
	for _, l := range c.layers {
		lowers = append(lowers, l.Lower)
	}
	want := []string{"l/NODE1:l/NODE0", "l/" + ownLink(l[2].ChainID) + ":l/NODE1:l/NODE0"}
	if diff := cmp.Diff(want, lowers); diff != "" {
		t.Errorf("lower (-want +got):\n%s", diff)
	}
	if got, want := c.layers[0].Source, StateDir+"/"+d.ID.Encoded()+"/docker/overlay2/d2/diff"; got != want {
		t.Errorf("linked to %s, want %s", got, want)
	}
	if got := c.disks[0]; got.Registered != 2 || got.Present != 2 || got.Images[0].State != report.Registered {
		t.Errorf("reported %+v", got)
	}
}

// TestCommit registers, looks again, and takes the distribution metadata back.
func TestCommit(t *testing.T) {
	r := &Runtime{store: newStore(t), opt: Options{Link: LinkSymlink}}
	disks := []*cachedisk.Disk{newDisk(t, 3, "docker.io/library/x:1", "gcr.io/p/x:1")}
	c, err := r.plan(disks, r.checker())
	if err != nil {
		t.Fatal(err)
	}
	if err := r.checkRoom(c); err != nil {
		t.Fatal(err)
	}
	if err := r.saveAll(c); err != nil {
		t.Fatal(err)
	}
	// Twice, as after a run that was killed.
	for range 2 {
		if err := r.stage(c, LinkSymlink); err != nil {
			t.Fatal(err)
		}
	}
	if err := r.commit(c); err != nil {
		t.Fatal(err)
	}
	again, err := r.plan(disks, r.checker())
	if err != nil {
		t.Fatal(err)
	}
	if again.restart() || again.disks[0].Images[0].State != report.Present || len(again.metadata.Sources) > 0 {
		t.Errorf("after commit there is still %+v", again)
	}
	if len(again.relinks) > 0 {
		t.Errorf("relinks %v of a disk that is there", again.relinks)
	}

	// As dockerd removes a layer that inject has just looked at.
	l := c.layers[0]
	if err := os.RemoveAll(r.overlay(l.ID)); err != nil {
		t.Fatal(err)
	}
	if err := r.relinkLayers([]relink{{l.Chain, l, false}}); err != nil {
		t.Error(err)
	}
	repos, err := r.readRepositories()
	if err != nil || len(repos.Repositories) != 2 {
		t.Errorf("names %v, %v", repos, err)
	}
	sources := r.readSources(disks[0].Manifest.Layers[0].DiffID)
	if len(sources) != 2 || sources[0].SourceRepository != "docker.io/library/x" {
		t.Errorf("sources %v", sources)
	}

	// After a power loss files can be there without their contents.
	blob := digest.FromString("blob d0")
	for _, name := range []string{r.diffIDFile(blob), r.sourcesFile(disks[0].Manifest.Layers[1].DiffID)} {
		write(t, name, "\x00\x00")
	}
	lost, err := r.plan(disks, r.checker())
	if err != nil {
		t.Fatal(err)
	}
	if err := r.addMetadata(lost.metadata); err != nil {
		t.Fatal(err)
	}
	if b, err := os.ReadFile(r.diffIDFile(blob)); err != nil || digest.Digest(b) != disks[0].Manifest.Layers[0].DiffID {
		t.Errorf("blob %s leads to layer %q, %v", blob, b, err)
	}
	if left := r.missing(c.metadata); len(left.Sources)+len(left.DiffIDs) > 0 {
		t.Errorf("of the distribution metadata %v is lost", left)
	}
	write(t, r.sourcesFile(disks[0].Manifest.Layers[2].DiffID), "")

	// A second save, of a run that had nothing to add, forgets nothing.
	if err := r.saveAll(again); err != nil {
		t.Fatal(err)
	}
	recs, err := r.records()
	if err != nil || len(recs) != 1 {
		t.Fatal(recs, err)
	}
	if diff := cmp.Diff(c.records[0].normal(), recs[0], cmpopts.EquateEmpty()); diff != "" {
		t.Errorf("the record changed (-first +second):\n%s", diff)
	}
	if err := r.removeMetadata(recs[0].Metadata); err != nil {
		t.Fatal(err)
	}
	if left, _ := filepath.Glob(r.image("distribution", "*")); len(left) > 0 {
		t.Errorf("left over: %v", left)
	}
}

// TestRemovals has a dockerd that was killed as it removed a layer of ours, and that
// finishes that as it stops.
func TestRemovals(t *testing.T) {
	r := &Runtime{store: newStore(t), opt: Options{Link: LinkSymlink, Log: slog.New(slog.DiscardHandler)}}
	disks := []*cachedisk.Disk{newDisk(t, 3, "docker.io/library/x:1")}
	c, err := r.plan(disks, r.checker())
	if err != nil {
		t.Fatal(err)
	}
	l := c.layers[1]
	removing := r.layerdb(l.Chain) + "-0123-removing"
	write(t, filepath.Join(removing, "cache-id"), l.ID)
	other := r.layerdb(l.Chain) + "-4567-removing"
	write(t, filepath.Join(other, "cache-id"), "dockerd's own")
	if err := r.stage(c, LinkSymlink); err != nil {
		t.Fatal(err)
	}
	if !r.staged(c) {
		t.Fatal("not staged")
	}
	if err := os.Remove(r.overlay(l.ID, "committed")); err != nil {
		t.Fatal(err)
	}
	if c, err = r.restage(c, disks, r.checker()); err != nil {
		t.Fatal(err)
	}
	if err := r.commit(c); err != nil {
		t.Fatal(err)
	}
	if !r.staged(c) {
		t.Error("a layer is registered without its directory")
	}
	if _, err := os.Stat(removing); !errors.Is(err, fs.ErrNotExist) {
		t.Error("dockerd would remove a registered layer's directory")
	}
	if _, err := os.Stat(other); err != nil {
		t.Error(err)
	}
}

// TestCheckFiles has a disk whose files dockerd would follow out of it.
func TestCheckFiles(t *testing.T) {
	secret := filepath.Join(t.TempDir(), "secret")
	write(t, secret, "")
	for name, tt := range map[string]struct {
		spoil func(file string) error
		want  string
	}{
		"good":    {func(string) error { return nil }, ""},
		"missing": {os.Remove, "no such file"},
		"a link":  {func(file string) error { return errors.Join(os.Remove(file), os.Symlink(secret, file)) }, "not a regular file"},
		"a pipe":  {func(file string) error { return errors.Join(os.Remove(file), syscall.Mkfifo(file, 0o644)) }, "not a regular file"},
		"linked directory": {func(file string) error {
			dir := filepath.Dir(file)
			outside := filepath.Join(t.TempDir(), "outside")
			return errors.Join(os.Rename(dir, outside), os.Symlink(outside, dir))
		}, "a symbolic link leads there"},
	} {
		t.Run(name, func(t *testing.T) {
			r := &Runtime{store: newStore(t), opt: Options{Link: LinkSymlink}}
			d := newDisk(t, 3, "docker.io/library/x:1")
			l := d.Manifest.Layers[1]
			if err := tt.spoil(filepath.Join(d.Dir, d.Manifest.TarSplitPath(l))); err != nil {
				t.Fatal(err)
			}
			c, err := r.plan([]*cachedisk.Disk{d}, r.checker())
			if err != nil {
				t.Fatal(err)
			}
			err = c.checkFiles([]*cachedisk.Disk{d})
			if tt.want == "" {
				if err != nil {
					t.Error(err)
				}
				return
			}
			for _, want := range []string{tt.want, l.ChainID.String(), d.Dir, "build the disk again"} {
				if err == nil || !strings.Contains(err.Error(), want) {
					t.Errorf("error is %v, want %q in it", err, want)
				}
			}
		})
	}
}

// TestRemountTwin has another disk with the layer manifest of one that is registered: its
// files are looked at before dockerd finds them by the old links.
func TestRemountTwin(t *testing.T) {
	r := &Runtime{store: newStore(t), opt: Options{Link: LinkSymlink}}
	d := newDisk(t, 3, "docker.io/library/x:1")
	disks := []*cachedisk.Disk{d}
	c, err := r.plan(disks, r.checker())
	if err == nil {
		err = errors.Join(r.saveAll(c), r.stage(c, LinkSymlink), r.commit(c))
	}
	if err != nil {
		t.Fatal(err)
	}
	if err := r.checkLinked(d); err != nil {
		t.Error(err)
	}
	l := d.Manifest.Layers[1]
	file := filepath.Join(d.Dir, d.Manifest.TarSplitPath(l))
	if err := errors.Join(os.Remove(file), syscall.Mkfifo(file, 0o644)); err != nil {
		t.Fatal(err)
	}
	if err := r.remount(disks); err == nil || !strings.Contains(err.Error(), "not a regular file") || !strings.Contains(err.Error(), l.ChainID.String()) {
		t.Errorf("error is %v", err)
	}
	if _, err := os.Stat(r.host(mountpoint(d.ID))); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the mount point: %v", err)
	}
}

// TestLinks reads what a store must not have: it would end up in a mount's options.
func TestLinks(t *testing.T) {
	for name, tt := range map[string]struct{ link, lower, want string }{
		"good":      {"LINK1", "l/LINK2:l/LINK3", ""},
		"base":      {"LINK1\n", "", ""},
		"slashes":   {"../../../../etc", "", "no name of a link"},
		"newline":   {"LINK1\nLINK2", "", "no name of a link"},
		"option":    {"LINK1,upperdir=x", "", "no name of a link"},
		"empty":     {"", "", "no name of a link"},
		"elsewhere": {"LINK1", "l/LINK2:/etc", "no list of links"},
		"upward":    {"LINK1", "l/../../etc", "no list of links"},
	} {
		t.Run(name, func(t *testing.T) {
			s := newStore(t)
			write(t, s.overlay("id", "link"), tt.link)
			write(t, s.overlay("id", "lower"), tt.lower)
			_, _, err := s.links("id")
			if (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error is %v, want %q in it", err, tt.want)
			}
		})
	}
}

func TestPlanRefuses(t *testing.T) {
	for _, tt := range []struct {
		name   string
		layers int
		node   func(t *testing.T, s store, d *cachedisk.Disk)
		reason string
	}{
		{"too deep", maxLayers + 1, nil, "126 layers"},
		{"damaged", 2, func(t *testing.T, s store, d *cachedisk.Disk) {
			write(t, filepath.Join(s.layerdb(d.Manifest.Layers[0].ChainID), "size"), "1")
		}, "damaged"},
		{"directory gone", 2, func(t *testing.T, s store, d *cachedisk.Disk) {
			write(t, filepath.Join(s.layerdb(d.Manifest.Layers[0].ChainID), "cache-id"), "nowhere")
		}, "damaged"},
		{"name taken", 2, func(t *testing.T, s store, _ *cachedisk.Disk) {
			write(t, s.image("repositories.json"), `{"Repositories":{"x":{"x:1":"`+digest.FromString("").String()+`"}}}`)
		}, "another image as x:1"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := &Runtime{store: newStore(t), opt: Options{Link: LinkSymlink}}
			d := newDisk(t, tt.layers, "docker.io/library/x:1")
			if tt.node != nil {
				tt.node(t, r.store, d)
			}
			c, err := r.plan([]*cachedisk.Disk{d}, r.checker())
			if err != nil {
				t.Fatal(err)
			}
			img := c.disks[0].Images[0]
			if img.State != report.Skipped || !strings.Contains(img.Reason, tt.reason) || c.restart() {
				t.Errorf("%s: %q, restart %t; want it skipped: %s", img.State, img.Reason, c.restart(), tt.reason)
			}
		})
	}
}

// TestBrokenRecord has a record that a faulty disk has spoilt: inject writes it again.
func TestBrokenRecord(t *testing.T) {
	r := &Runtime{store: newStore(t), opt: Options{Link: LinkSymlink, Log: slog.New(slog.DiscardHandler)}}
	d := newDisk(t, 1, "docker.io/library/x:1")
	write(t, r.recordFile(d.ID), "{")
	if _, err := r.records(); err == nil || !strings.Contains(err.Error(), "run inject") {
		t.Errorf("says %v", err)
	}
	// The agent, which asks for them first, gets to inject.
	if gens, err := r.Generations(t.Context()); err != nil || len(gens) != 0 {
		t.Errorf("generations %v, %v", gens, err)
	}
	c, err := r.plan([]*cachedisk.Disk{d}, r.checker())
	if err != nil {
		t.Fatal(err)
	}
	if err := r.saveAll(c); err != nil {
		t.Fatal(err)
	}
	if recs, err := r.records(); err != nil || len(recs) != 1 {
		t.Errorf("records %v, %v", recs, err)
	}
}

// TestPlanNames has a tag of the disk that stands for another image on the node.
func TestPlanNames(t *testing.T) {
	const older, newer = 0, 2 // the disk is of second 1
	for _, tt := range []struct {
		name    string
		created int64 // of the generation that the node's image came from, -1 for none
		alive   bool  // its disk is there
		run     bool  // and in this run
		retag   bool  // someone has moved the tag since
		left    string
	}{
		{"the node's", -1, false, false, false, "the node has another image as x:1"},
		{"an older generation's", older, true, false, false, ""},
		{"an older generation's, in this run", older, true, true, false, ""},
		{"a newer generation's", newer, true, false, false, "x:1 comes from the newer cache "},
		{"a newer generation's, in this run", newer, true, true, false, "x:1 comes from the newer cache "},
		{"a newer generation's that is gone", newer, false, false, false, ""},
		{"someone's since", older, true, false, true, "the node has another image as x:1"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			r := &Runtime{store: newStore(t), opt: Options{Link: LinkSymlink}}
			d := newDisk(t, 1, "docker.io/library/x:1", "docker.io/library/y:1")
			disks, id := []*cachedisk.Disk{d}, digest.FromString("the node's")
			if tt.created >= 0 {
				m := newManifest()
				m.Created = time.Unix(tt.created, 0)
				addImage(t, m, "o", 2, "docker.io/library/x:1")
				other := &cachedisk.Disk{Dir: "/other", ID: cacheID(t, m), Manifest: m}
				c, err := r.plan([]*cachedisk.Disk{other}, r.checker())
				if err != nil {
					t.Fatal(err)
				}
				if err := r.saveAll(c); err != nil {
					t.Fatal(err)
				}
				if tt.alive {
					if err := testdisk.WriteManifest(r.host(mountpoint(other.ID)), m); err != nil {
						t.Fatal(err)
					}
				}
				if tt.run {
					disks = append(disks, other)
				}
				if !tt.retag {
					id = m.Images[0].Config.Digest
				}
			}
			write(t, r.image("repositories.json"), `{"Repositories":{"x":{"x:1":"`+id.String()+`"}}}`)
			c, err := r.plan(cachedisk.NewestFirst(disks), r.checker())
			if err != nil {
				t.Fatal(err)
			}
			want := map[name]newName{{"y", "y:1"}: {"", d.Manifest.Images[0].Config.Digest}}
			if tt.left == "" {
				want[name{"x", "x:1"}] = newName{id, d.Manifest.Images[0].Config.Digest}
			}
			if diff := cmp.Diff(want, c.names, cmp.AllowUnexported(name{}, newName{})); diff != "" {
				t.Errorf("names (-want +got):\n%s", diff)
			}
			for _, rep := range c.disks {
				reason := rep.Images[0].Reason
				switch {
				case rep.CacheID == d.ID && (!strings.HasPrefix(reason, tt.left) || tt.left == "" && reason != ""):
					t.Errorf("reported %q, want %q", reason, tt.left)
				case rep.CacheID != d.ID && tt.created == older && reason != "x:1 comes from the newer cache "+report.Short(d.ID):
					t.Errorf("of the older disk reported %q", reason)
				}
			}
		})
	}
}

func TestServable(t *testing.T) {
	for _, tt := range []struct {
		name string
		info system.Info
		kind string
		want string
	}{
		{"graph driver", system.Info{Driver: "overlay2", DriverStatus: [][2]string{{"Backing Filesystem", "extfs"}}}, KindOverlay2, ""},
		{"image store", system.Info{Driver: "overlayfs", DriverStatus: [][2]string{{"driver-type", "io.containerd.snapshotter.v1"}}}, KindContainerd, "--containerd-namespace moby"},
		{"vfs", system.Info{Driver: "vfs"}, "vfs", "only overlay2"},
		{"userns-remap", system.Info{Driver: "overlay2", SecurityOptions: []string{"name=seccomp", "name=userns"}}, KindOverlay2, "userns-remap"},
		{"rootless", system.Info{Driver: "overlay2", SecurityOptions: []string{"name=rootless"}}, KindOverlay2, "rootless"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := kind(&tt.info); got != tt.kind {
				t.Errorf("kind is %s, want %s", got, tt.kind)
			}
			err := servable(&tt.info)
			if (err == nil) != (tt.want == "") || err != nil && !strings.Contains(err.Error(), tt.want) {
				t.Errorf("says %v, want %q", err, tt.want)
			}
		})
	}
}

func TestCheck(t *testing.T) {
	s := newStore(t)
	if err := s.check(); err != nil {
		t.Error(err)
	}
	s.root = "/var/lib/docker/100000.100000"
	if err := s.check(); err == nil || !strings.Contains(err.Error(), "userns-remap") {
		t.Errorf("says %v", err)
	}
	s.root = "/srv"
	if err := s.check(); err == nil || !strings.Contains(err.Error(), "--docker-root") {
		t.Errorf("says %v", err)
	}
	// What is wrong with a data root that is there is another matter.
	s.root = "/file"
	write(t, s.host(s.root), "")
	if err := s.check(); err == nil || strings.Contains(err.Error(), "start docker once") || !errors.Is(err, syscall.ENOTDIR) {
		t.Errorf("says %v", err)
	}
}

func TestCheckUnused(t *testing.T) {
	other := func(t *testing.T, s store) {
		t.Helper()
		if err := os.MkdirAll(s.host("/mnt/docker"), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for _, tt := range []struct {
		name    string
		comm    string
		cmdline string // with blanks for zero bytes
		prepare func(t *testing.T, s store)
		refused string // a word of the error, "" if the store may be used
	}{
		{"none", "", "", nil, ""},
		{"not a dockerd", "containerd", "dockerd", nil, ""},
		{"default", "dockerd", "dockerd -H fd:// --containerd=/run/x.sock", nil, "process 77"},
		{"ours by option", "dockerd", "dockerd --data-root /var/lib/docker", nil, "process 77"},
		{"ours by another path", "dockerd", "dockerd --data-root=/var/../var/lib/docker/", nil, "process 77"},
		{"another", "dockerd", "dockerd --data-root /mnt/docker", other, ""},
		{"another with =", "dockerd", "dockerd -D --data-root=/mnt/docker", other, ""},
		{"another, old name", "dockerd", "dockerd -g /mnt/docker", other, ""},
		{"another, glued", "dockerd", "dockerd -g/mnt/docker", other, ""},
		{"another by file", "dockerd", "dockerd", func(t *testing.T, s store) {
			other(t, s)
			write(t, s.host(configFile), `{"data-root": "/mnt/docker"}`)
		}, ""},
		{"another by another file", "dockerd", "dockerd --config-file=/etc/d.json", func(t *testing.T, s store) {
			other(t, s)
			write(t, s.host("/etc/d.json"), `{"graph": "/mnt/docker"}`)
		}, ""},
		{"ours by file", "dockerd", "dockerd --config-file /etc/d.json", func(t *testing.T, s store) {
			write(t, s.host("/etc/d.json"), `{"debug": true}`)
		}, "process 77"},
		{"file gone", "dockerd", "dockerd --config-file /etc/d.json", nil, "d.json: no such file"},
		{"file broken", "dockerd", "dockerd", func(t *testing.T, s store) {
			write(t, s.host(configFile), `{`)
		}, "reading /etc/docker/daemon.json"},
		{"root not to be seen", "dockerd", "dockerd --data-root /nowhere", nil, "/nowhere"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s := newStore(t)
			if tt.comm != "" {
				proc := filepath.Join(s.hostRoot, "proc/77")
				write(t, filepath.Join(proc, "comm"), tt.comm+"\n")
				write(t, filepath.Join(proc, "cmdline"), strings.ReplaceAll(tt.cmdline, " ", "\x00")+"\x00")
				if err := os.Symlink(s.hostRoot, filepath.Join(proc, "root")); err != nil {
					t.Fatal(err)
				}
			}
			if tt.prepare != nil {
				tt.prepare(t, s)
			}
			err := s.checkUnused("unix:///x.sock")
			if (err == nil) != (tt.refused == "") || err != nil && !strings.Contains(err.Error(), tt.refused) {
				t.Errorf("says %v, want %q", err, tt.refused)
			}
			// One that has come since is there to be seen.
			uses := tt.refused == "process 77"
			if err := s.checkStill(); (err != nil) != uses || err != nil && !strings.Contains(err.Error(), "process 77, while images were being registered") {
				t.Errorf("checkStill says %v", err)
			}
		})
	}
}

// BenchmarkInject registers 600 layers, all but the mount and the daemon's restart.
func BenchmarkInject(b *testing.B) {
	m := newManifest()
	for i := range 60 {
		addImage(b, m, fmt.Sprintf("%d-", i), 10, fmt.Sprintf("docker.io/library/x:%d", i))
	}
	disks := []*cachedisk.Disk{{Dir: "/cache", ID: cacheID(b, m), Manifest: m}}
	for b.Loop() {
		b.StopTimer()
		r := &Runtime{store: newStore(b), opt: Options{Link: LinkSymlink}}
		b.StartTimer()
		c, err := r.plan(disks, r.checker())
		if err == nil {
			err = errors.Join(r.saveAll(c), r.stage(c, LinkSymlink))
		}
		if err == nil {
			c, err = r.plan(disks, r.checker())
		}
		if err == nil {
			err = r.commit(c)
		}
		if err != nil {
			b.Fatal(err)
		}
	}
}
