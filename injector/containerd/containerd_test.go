package containerd

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/metadata"
	"github.com/containerd/containerd/v2/core/mount"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/distribution/reference"
	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	bolt "go.etcd.io/bbolt"

	"github.com/selkies-project/packer-plugin-selkies/injector/cachedisk"
	"github.com/selkies-project/packer-plugin-selkies/injector/report"
	"github.com/selkies-project/packer-plugin-selkies/manifest"
)

func TestSnapshotDir(t *testing.T) {
	const root = "/var/lib/containerd/io.containerd.snapshotter.v1.overlayfs"
	r := &Runtime{root: root}
	tests := map[string]struct {
		mounts []mount.Mount
		want   string
	}{
		"without a parent": {[]mount.Mount{{Type: "bind", Source: root + "/snapshots/7/fs", Options: []string{"rw", "rbind"}}}, "7"},
		"overlay of 1.6": {[]mount.Mount{{Type: "overlay", Source: "overlay", Options: []string{"index=off",
			"workdir=" + root + "/snapshots/8/work", "upperdir=" + root + "/snapshots/8/fs", "lowerdir=" + root + "/snapshots/7/fs"}}}, "8"},
		"overlay of 2.4": {[]mount.Mount{{Type: "overlay", Source: "overlay", Options: []string{
			"workdir=" + root + "/snapshots/80/work", "upperdir=" + root + "/snapshots/80/fs", "index=off", "lowerdir=" + root + "/snapshots/7/fs"}}}, "80"},
		"another snapshotter": {[]mount.Mount{{Type: "bind", Source: "/var/lib/containerd/io.containerd.snapshotter.v1.native/snapshots/7"}}, ""},
		"read-only":           {[]mount.Mount{{Type: "overlay", Options: []string{"lowerdir=" + root + "/snapshots/7/fs"}}}, ""},
	}
	for name, tt := range tests {
		t.Run(name, func(t *testing.T) {
			got, err := r.snapshotDir(tt.mounts)
			if got != tt.want || (err == nil) != (tt.want != "") {
				t.Errorf("directory %q, error %v, want %q", got, err, tt.want)
			}
		})
	}
}

func TestLookupName(t *testing.T) {
	const hex = "e2627fea89fa82756a60000e2a84cb2a61aaed1c717f0f203c9176b298f8d453"
	for ref, want := range map[string]string{
		"debian":                                 "docker.io/library/debian:latest",
		"debian:12":                              "docker.io/library/debian:12",
		"example.com:5000/a/b":                   "example.com:5000/a/b:latest",
		"debian@sha256:" + hex:                   "docker.io/library/debian@sha256:" + hex,
		"example.com/debian:12@sha256:" + hex:    "example.com/debian@sha256:" + hex,
		"localhost:5000/debian:12@sha256:" + hex: "localhost:5000/debian@sha256:" + hex,
	} {
		named, err := reference.ParseNormalizedNamed(ref)
		if err != nil {
			t.Fatal(err)
		}
		if got := lookupName(named); got != want {
			t.Errorf("%s: %s, want %s", ref, got, want)
		}
	}
}

func TestDistributionSource(t *testing.T) {
	got, err := distributionSource([]string{
		"docker.io/library/debian:12", "example.com:5000/b:1", "example.com:5000/a:1", "example.com:5000/a:2",
	})
	if err != nil {
		t.Fatal(err)
	}
	want := map[string]string{
		"containerd.io/distribution.source.docker.io":   "library/debian",
		"containerd.io/distribution.source.example.com": "a,b",
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
	var many []string
	for i := range 1000 {
		many = append(many, fmt.Sprintf("example.com/repository-%d:1", i))
	}
	if got, err := distributionSource(many); err != nil || len(got) != 0 {
		t.Errorf("a label that is too long: %v, %v", got, err)
	}
}

func loadManifest(t *testing.T) *manifest.Manifest {
	t.Helper()
	data, err := os.ReadFile("../../manifest/testdata/manifest.json")
	if err != nil {
		t.Fatal(err)
	}
	m, err := manifest.Decode(data)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

// TestPullBetween has a pull lead a name elsewhere after the run has looked at it: only its
// labels were to be put right.
func TestPullBetween(t *testing.T) {
	db, err := bolt.Open(filepath.Join(t.TempDir(), "meta.db"), 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close()
	ctx := namespaces.WithNamespace(t.Context(), "k8s.io")
	store := metadata.NewImageStore(metadata.NewDB(db, nil, nil))
	j := &job{disk: &cachedisk.Disk{ID: digest.FromString("this")}, image: loadManifest(t).Images[0]}
	name := j.image.Names[0]
	seen := j.record(name)
	seen.Labels = nil // as a pull of the same image leaves it
	if seen, err = store.Create(ctx, seen); err != nil {
		t.Fatal(err)
	}
	pulled := seen
	pulled.Target.Digest = digest.FromString("newer image")
	if _, err := store.Update(ctx, pulled, "target"); err != nil {
		t.Fatal(err)
	}
	n := (&Runtime{images: store}).newRun(&survey{images: map[string]images.Image{name: seen}}, report.InjectOptions{})
	if left, err := n.name(ctx, j, name); left != name+" was pulled meanwhile" || err != nil {
		t.Fatal(left, err)
	}
	if got, err := store.Get(ctx, name); err != nil || got.Target.Digest != pulled.Target.Digest || len(got.Labels) != 0 {
		t.Errorf("the name is %+v, %v", got, err)
	}
}

// TestNames is who wins a name: the node over us, a newer generation over an older.
func TestNames(t *testing.T) {
	m := loadManifest(t)
	img := m.Images[0]
	name := img.Names[0]
	disk := &cachedisk.Disk{ID: digest.FromString("this"), Manifest: m}
	target, other := img.Target(), ocispec.Descriptor{Digest: digest.FromString("other image")}
	ours := func(cache string, target ocispec.Descriptor, pin string) *images.Image {
		return &images.Image{Name: name, Target: target, Labels: map[string]string{
			labelCache: digest.FromString(cache).String(), labelTarget: target.Digest.String(), labelPinned: pin,
		}}
	}
	alive := func() error { return nil }
	dead := func() error { return errors.New("no such device") }
	tests := map[string]struct {
		record  *images.Image
		anchors map[string]*anchor
		onOurs  bool
		write   bool
		left    string
	}{
		"no record":                {write: true},
		"ours":                     {record: ours("this", target, pinned)},
		"ours, pin lost":           {record: ours("this", target, ""), write: true},
		"ours, led elsewhere":      {record: &images.Image{Name: name, Target: other, Labels: ours("this", target, pinned).Labels}, left: "on this node"},
		"node's, the same":         {record: &images.Image{Name: name, Target: target}},
		"node's pull of ours":      {record: &images.Image{Name: name, Target: target}, onOurs: true, write: true},
		"node's, another":          {record: &images.Image{Name: name, Target: other}, left: "on this node"},
		"node's, another, on ours": {record: &images.Image{Name: name, Target: other}, onOurs: true, left: "on this node"},
		"older": {record: ours("a", other, pinned), write: true,
			anchors: map[string]*anchor{"a": {created: m.Created.Add(-time.Hour), alive: alive}}},
		"newer": {record: ours("a", other, pinned), left: "the newer cache",
			anchors: map[string]*anchor{"a": {created: m.Created.Add(time.Hour), alive: alive}}},
		"newer, the same": {record: ours("a", target, pinned),
			anchors: map[string]*anchor{"a": {created: m.Created.Add(time.Hour), alive: alive}}},
		"newer, disk gone": {record: ours("a", other, pinned), write: true,
			anchors: map[string]*anchor{"a": {created: m.Created.Add(time.Hour), alive: dead}}},
		"without an anchor": {record: ours("a", other, pinned), write: true},
	}
	for what, tt := range tests {
		t.Run(what, func(t *testing.T) {
			chain, err := img.ChainIDs()
			if err != nil {
				t.Fatal(err)
			}
			s := &survey{images: map[string]images.Image{}, anchors: map[digest.Digest]*anchor{}, snapshots: map[string]snapshots.Info{}}
			if tt.record != nil {
				s.images[name] = *tt.record
			}
			for id, a := range tt.anchors {
				s.anchors[digest.FromString(id)] = a
			}
			if tt.onOurs {
				top := chainName(chain[len(chain)-1])
				s.snapshots[top] = snapshots.Info{Name: top, Kind: snapshots.KindCommitted,
					Labels: map[string]string{labelCache: disk.ID.String(), labelDir: "1"}}
			}
			j := &job{disk: disk, image: img, chain: chain}
			j.compareName(s, name)
			if (len(j.write) == 1) != tt.write {
				t.Errorf("write %v, want %v", j.write, tt.write)
			}
			if left := strings.Join(j.left, ""); !strings.Contains(left, tt.left) || (left != "") != (tt.left != "") {
				t.Errorf("left %q, want %q", left, tt.left)
			}
		})
	}
}

func TestNotRunning(t *testing.T) {
	for address, want := range map[string]string{
		filepath.Join(t.TempDir(), "none.sock"): "containerd is not running at ",
		"relative.sock":                         "not an absolute path",
	} {
		if _, err := New(context.Background(), Options{Address: address, Namespace: criNamespace, HostRoot: "/"}); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("New with %s: %v", address, err)
		}
		if cri, err := ServesCRI(context.Background(), address); cri || err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("ServesCRI with %s: %v, %v", address, cri, err)
		}
	}
}

func TestOrder(t *testing.T) {
	id := func(s string) digest.Digest { return digest.FromString(s) }
	newJob := func(name string, chain ...string) *job {
		j := &job{image: manifest.Image{Names: []string{"example.com/" + name + ":1", "example.com/" + name + "@" + id(name).String()}}}
		for _, c := range chain {
			j.chain = append(j.chain, id(c))
		}
		return j
	}
	jobs := []*job{newJob("alone", "x"), newJob("some", "a", "c"), newJob("most", "a", "b", "d"), newJob("more", "a", "b")}
	for name, c := range map[string]struct {
		first []string
		want  []int
	}{
		"most shared":      {nil, []int{2, 3, 1, 0}},
		"wanted":           {[]string{"example.com/alone:1", "example.com/some:1"}, []int{0, 1, 2, 3}},
		"wanted by digest": {[]string{"example.com/some:9@" + id("some").String()}, []int{1, 2, 3, 0}},
		"twice":            {[]string{"example.com/alone:1", "example.com/some:1", "example.com/alone:1"}, []int{0, 1, 2, 3}},
		"not on the disk":  {[]string{"debian", "sha256:no", "example.com/more"}, []int{2, 3, 1, 0}},
	} {
		t.Run(name, func(t *testing.T) {
			if diff := cmp.Diff(c.want, order(jobs, c.first)); diff != "" {
				t.Error(diff)
			}
		})
	}
}

func TestChangeTo(t *testing.T) {
	ours := map[string]string{labelPinned: pinned, labelCache: "sha256:x"}
	for name, c := range map[string]struct {
		image  string
		labels map[string]string
		want   bool
	}{
		"ours":        {"example.com/a:1", ours, false},
		"pulled":      {"example.com/a:1", nil, true},
		"pinned only": {"example.com/a:1", map[string]string{labelPinned: pinned}, true},
		"not pinned":  {"example.com/a:1", map[string]string{labelCache: "sha256:x"}, true},
		"an image ID": {digest.FromString("a").String(), nil, false},
	} {
		t.Run(name, func(t *testing.T) {
			if got := changeTo(c.image, c.labels); (got != nil) != c.want {
				t.Errorf("change %v, want one: %v", got, c.want)
			}
		})
	}
}
