//go:build e2e

// Package containerd_test registers cache disks with real containerds: Debian 12's
// 1.6 and the pinned 2.4, each in a machine of its own.
package containerd_test

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/tarball"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/selkies-project/packer-plugin-selkies/e2e/cachedisk"
	"github.com/selkies-project/packer-plugin-selkies/e2e/host"
	"github.com/selkies-project/packer-plugin-selkies/e2e/machine"
	"github.com/selkies-project/packer-plugin-selkies/e2e/registry"
)

// world is what all tests share: a registry with images, and two generations of a
// cache disk, read-only files from here on.
var world struct {
	reg      *registry.Registry
	injector string
	// first and second are disk images. The second has the first's images, the
	// newer application image, and the layers' blobs.
	first, second string
	// added are the digests of the blobs that app2 has and app1 has not.
	added []string
	// dir is removed after the tests.
	dir string
}

// The images, in the registry's repositories of these names.
const (
	sandbox = "test/sandbox:1" // of pod sandboxes
	app1    = "test/app:1"     // five layers, behind an index
	app2    = "test/app:2"     // the same five and one more
	single  = "test/single:1"  // one layer
	stable  = "test/app:stable"
)

func TestMain(m *testing.M) {
	host.Main(func(ctx context.Context, dir string) (status int, err error) {
		world.dir, world.injector = dir, filepath.Join(dir, "selkies-image-injector")
		if err := host.Build(ctx, "./injector", world.injector); err != nil {
			return 1, err
		}
		if world.reg, err = registry.Start(registry.Config{Dir: filepath.Join(dir, "blobs")}); err != nil {
			return 1, err
		}
		defer world.reg.Stop()
		if err := push(ctx, dir); err != nil {
			return 1, fmt.Errorf("pushing images: %w", err)
		}
		if err := buildDisks(ctx, dir); err != nil {
			return 1, fmt.Errorf("building cache disks: %w", err)
		}
		return m.Run(), nil
	})
}

func buildDisks(ctx context.Context, dir string) error {
	m, err := machine.Boot(ctx, machine.Config{Name: "builder"})
	if err != nil {
		return err
	}
	defer m.Close()
	world.first, world.second = filepath.Join(dir, "first"), filepath.Join(dir, "second")
	generation := time.Date(2026, 1, 1, 0, 0, 0, 0, time.UTC)
	firstRefs := []string{ref(sandbox), ref(app1), ref(stable), ref(single)}
	if _, err := cachedisk.Build(ctx, m, cachedisk.Config{Image: world.first, References: firstRefs, Created: generation}); err != nil {
		return err
	}
	_, err = cachedisk.Build(ctx, m, cachedisk.Config{
		Image:      world.second,
		References: append(firstRefs, ref(app2)),
		Created:    generation.AddDate(0, 1, 0),
		Blobs:      true,
	})
	return err
}

// ref is an image's reference in the test registry.
func ref(image string) string { return world.reg.Addr + "/" + image }

// file is one entry of a layer.
type file struct {
	name, body, link string
	typ              byte
	mode             int64
	uid              int
}

func layer(files ...file) (v1.Layer, error) {
	var buf bytes.Buffer
	w := tar.NewWriter(&buf)
	for _, f := range files {
		h := &tar.Header{Name: f.name, Mode: f.mode, Uid: f.uid, Gid: f.uid, Size: int64(len(f.body)), Typeflag: f.typ, Linkname: f.link}
		if h.Typeflag == 0 {
			h.Typeflag = tar.TypeReg
		}
		if h.Mode == 0 {
			h.Mode = 0o755
		}
		if err := w.WriteHeader(h); err != nil {
			return nil, err
		}
		if _, err := io.WriteString(w, f.body); err != nil {
			return nil, err
		}
	}
	if err := w.Close(); err != nil {
		return nil, err
	}
	return tarball.LayerFromOpener(func() (io.ReadCloser, error) {
		return io.NopCloser(bytes.NewReader(buf.Bytes())), nil
	}, tarball.WithMediaType(types.OCILayer))
}

func push(ctx context.Context, tmp string) error {
	path, err := machine.Busybox(ctx)
	if err != nil {
		return err
	}
	busybox, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	program := filepath.Join(tmp, "euid")
	if err := host.Build(ctx, "./e2e/containerd/testdata/euid", program); err != nil {
		return err
	}
	euid, err := os.ReadFile(program)
	if err != nil {
		return err
	}
	dir := func(name string) file { return file{name: name, typ: tar.TypeDir} }
	contents := [][]file{
		{
			dir("bin/"), dir("etc/"), dir("tmp/"), dir("proc/"), dir("sys/"), dir("dev/"),
			{name: "bin/busybox", body: string(busybox)},
			{name: "bin/sh", typ: tar.TypeSymlink, link: "busybox"},
			{name: "bin/euid", body: string(euid), mode: 0o4755},
			{name: "etc/passwd", body: "root:x:0:0::/:/bin/sh\nuser:x:1000:1000::/:/bin/sh\n", mode: 0o644},
		},
		{dir("data/"), {name: "data/owned", body: "owned", uid: 1000, mode: 0o644}, {name: "data/gone", body: "gone", mode: 0o644}},
		{dir("data/"), {name: "data/.wh.gone", mode: 0o644}, dir("opaque/"), {name: "opaque/old", body: "old", mode: 0o644}},
		{dir("opaque/"), {name: "opaque/.wh..wh..opq", mode: 0o644}, {name: "opaque/new", body: "new", mode: 0o644}},
		{{name: "version", body: "1", mode: 0o644}},
		{{name: "version", body: "2", mode: 0o644}},
	}
	var layers []mutate.Addendum
	for _, files := range contents {
		l, err := layer(files...)
		if err != nil {
			return err
		}
		layers = append(layers, mutate.Addendum{Layer: l, MediaType: types.OCILayer})
	}
	image := func(n int, cmd ...string) (v1.Image, error) {
		img := mutate.MediaType(mutate.ConfigMediaType(empty.Image, types.OCIConfigJSON), types.OCIManifestSchema1)
		img, err := mutate.Append(img, layers[:n]...)
		if err != nil {
			return nil, err
		}
		return mutate.ConfigFile(img, configFile(img, cmd))
	}
	one, err := image(1, "/bin/busybox", "sleep", "86400")
	if err != nil {
		return err
	}
	five, err := image(5, "/bin/busybox", "sleep", "86399")
	if err != nil {
		return err
	}
	six, err := image(6, "/bin/busybox", "sleep", "86399")
	if err != nil {
		return err
	}
	if world.added, err = blobs(six, layers[5].Layer); err != nil {
		return err
	}
	bare, err := image(1, "/bin/busybox", "true")
	if err != nil {
		return err
	}
	for target, img := range map[string]v1.Image{sandbox: one, app2: six, single: bare} {
		r, err := name.ParseReference(ref(target))
		if err != nil {
			return err
		}
		if err := remote.Write(r, img, remote.WithContext(ctx)); err != nil {
			return err
		}
	}
	// An index with a manifest for another platform, that nobody has.
	foreign, err := mutate.ConfigFile(five, &v1.ConfigFile{Architecture: "s390x", OS: "linux", RootFS: configFile(five, nil).RootFS})
	if err != nil {
		return err
	}
	index := mutate.AppendManifests(mutate.IndexMediaType(empty.Index, types.OCIImageIndex),
		mutate.IndexAddendum{Add: foreign, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: "s390x"}}},
		mutate.IndexAddendum{Add: five, Descriptor: v1.Descriptor{Platform: &v1.Platform{OS: "linux", Architecture: "amd64"}}},
	)
	for _, target := range []string{app1, stable} {
		r, err := name.ParseReference(ref(target))
		if err != nil {
			return err
		}
		if err := remote.WriteIndex(r, index, remote.WithContext(ctx)); err != nil {
			return err
		}
	}
	return nil
}

// blobs are the digests of the image's config and of the layer.
func blobs(img v1.Image, l v1.Layer) ([]string, error) {
	config, err := img.ConfigName()
	if err != nil {
		return nil, err
	}
	digest, err := l.Digest()
	return []string{config.String(), digest.String()}, err
}

func configFile(img v1.Image, cmd []string) *v1.ConfigFile {
	c, err := img.ConfigFile()
	if err != nil {
		panic(err) // of an image in memory
	}
	c = c.DeepCopy()
	c.OS, c.Architecture = "linux", "amd64"
	c.Config.Cmd = cmd
	c.Config.Env = []string{"PATH=/bin"}
	return c
}
