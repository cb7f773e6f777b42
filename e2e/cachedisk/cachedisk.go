// Package cachedisk makes cache disks for tests: a machine's Docker pulls images
// into a store on a disk image, and the layer manifest is recorded. It does what
// the provisioner does, without Packer, so that tests of the injector need none.
package cachedisk

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/distribution/reference"
	"github.com/docker/docker/api/types/image"
	"github.com/docker/docker/client"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"

	"github.com/selkies-project/packer-plugin-selkies/e2e/host"
	"github.com/selkies-project/packer-plugin-selkies/e2e/machine"
	"github.com/selkies-project/packer-plugin-selkies/manifest"
)

// Config says what is on a cache disk.
type Config struct {
	// Image is the file that becomes the disk.
	Image string
	// Size of the disk in bytes, 1 GiB by default. It is sparse.
	Size int64
	// References are pulled, by tag or digest. They need a registry on loopback.
	References []string
	// Blobs keeps the compressed layers on the disk too.
	Blobs bool
	// Release of the Docker that writes the store, Debian by default.
	Release machine.Release
	// Created is the generation's time, now if zero.
	Created time.Time
}

const (
	mountPoint = "/mnt/cache"
	storeRoot  = "docker"
	diskSize   = 1 << 30
)

// Build makes a cache disk with the Docker of m, which it starts and stops.
func Build(ctx context.Context, m *machine.Machine, c Config) (_ *manifest.Manifest, err error) {
	if c.Size == 0 {
		c.Size = diskSize
	}
	if err := host.NewDisk(c.Image, c.Size); err != nil {
		return nil, err
	}
	if _, err := host.Output(exec.CommandContext(ctx, "mkfs.ext4", "-q", "-F", c.Image)); err != nil {
		return nil, err
	}
	loop, err := host.AttachLoop(c.Image, false)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, loop.Close()) }()
	if err := m.AttachDisk(loop.Path, "cache"); err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, m.DetachDisk(loop.Path, "cache")) }()
	if _, err := m.Run(ctx, "mkdir", "-p", mountPoint); err != nil {
		return nil, err
	}
	if _, err := m.Run(ctx, "mount", loop.Path, mountPoint); err != nil {
		return nil, err
	}
	defer func() {
		_, stop := m.Run(context.WithoutCancel(ctx), "systemctl", "stop", "docker.service", "docker.socket")
		_, unmount := m.Run(context.WithoutCancel(ctx), "umount", mountPoint)
		err = errors.Join(err, stop, unmount)
	}()
	if c.Release == "" {
		c.Release = machine.Debian
	}
	if err := m.StartContainerd(ctx, machine.Containerd{Release: c.Release}); err != nil {
		return nil, err
	}
	err = m.StartDocker(ctx, machine.Docker{
		Release: c.Release,
		Config:  map[string]any{"data-root": mountPoint + "/" + storeRoot},
	})
	if err != nil {
		return nil, err
	}
	return record(ctx, m, c)
}

func record(ctx context.Context, m *machine.Machine, c Config) (*manifest.Manifest, error) {
	docker, err := client.NewClientWithOpts(client.WithHost("unix://"+m.Path("/run/docker.sock")), client.WithAPIVersionNegotiation())
	if err != nil {
		return nil, err
	}
	defer docker.Close()
	version, err := docker.ServerVersion(ctx)
	if err != nil {
		return nil, err
	}
	if c.Created.IsZero() {
		c.Created = time.Now()
	}
	out := &manifest.Manifest{
		SchemaVersion: manifest.SchemaVersion,
		Platform:      ocispec.Platform{OS: version.Os, Architecture: version.Arch},
		Created:       c.Created,
		Tool:          "e2e/cachedisk",
		Store: manifest.Store{
			Driver:        manifest.DriverOverlay2,
			Root:          storeRoot,
			EngineVersion: version.Version,
			Blobs:         c.Blobs,
		},
	}
	for _, ref := range c.References {
		if err := add(ctx, docker, m, out, ref); err != nil {
			return nil, fmt.Errorf("caching %s: %w", ref, err)
		}
	}
	return out, WriteManifest(m.Path(mountPoint), out)
}

// WriteManifest makes m the layer manifest of the disk at dir.
func WriteManifest(dir string, m *manifest.Manifest) error {
	data, err := m.Encode()
	if err != nil {
		return err
	}
	name := filepath.Join(dir, manifest.Path)
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		return err
	}
	return os.WriteFile(name, data, 0o644)
}

// add pulls one image and records it.
func add(ctx context.Context, docker *client.Client, m *machine.Machine, out *manifest.Manifest, ref string) error {
	named, err := reference.ParseNormalizedNamed(ref)
	if err != nil {
		return err
	}
	progress, err := docker.ImagePull(ctx, named.String(), image.PullOptions{})
	if err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, progress)
	progress.Close()
	if err != nil {
		return err
	}
	inspect, err := docker.ImageInspect(ctx, named.String())
	if err != nil {
		return err
	}
	img, layers, err := resolve(ctx, named.String(), out.Platform)
	if err != nil {
		return err
	}
	img.Names = []string{named.Name() + "@" + img.Target().Digest.String()}
	if tagged, ok := named.(reference.NamedTagged); ok {
		img.Names = append(img.Names, named.Name()+":"+tagged.Tag())
	}
	if err := addLayers(m, out, inspect.GraphDriver.Data, inspect.RootFS.Layers); err != nil {
		return err
	}
	if out.Store.Blobs {
		if err := keepBlobs(m, layers); err != nil {
			return err
		}
	}
	// Two tags of one image are one image with more names.
	for i := range out.Images {
		if out.Images[i].Target().Digest == img.Target().Digest {
			for _, n := range img.Names {
				if !slices.Contains(out.Images[i].Names, n) {
					out.Images[i].Names = append(out.Images[i].Names, n)
				}
			}
			return nil
		}
	}
	out.Images = append(out.Images, img)
	return nil
}

// resolve reads index, manifest and config from the registry.
func resolve(ctx context.Context, ref string, platform ocispec.Platform) (manifest.Image, []v1.Layer, error) {
	var out manifest.Image
	r, err := name.ParseReference(ref)
	if err != nil {
		return out, nil, err
	}
	desc, err := remote.Get(r, remote.WithContext(ctx), remote.WithPlatform(v1.Platform{OS: platform.OS, Architecture: platform.Architecture}))
	if err != nil {
		return out, nil, err
	}
	if desc.MediaType.IsIndex() {
		index := descriptor(string(desc.MediaType), desc.Manifest)
		out.Index = &index
	}
	img, err := desc.Image()
	if err != nil {
		return out, nil, err
	}
	raw, err := img.RawManifest()
	if err != nil {
		return out, nil, err
	}
	mediaType, err := img.MediaType()
	if err != nil {
		return out, nil, err
	}
	parsed, err := img.Manifest()
	if err != nil {
		return out, nil, err
	}
	config, err := img.RawConfigFile()
	if err != nil {
		return out, nil, err
	}
	out.Manifest = descriptor(string(mediaType), raw)
	out.Config = descriptor(string(parsed.Config.MediaType), config)
	layers, err := img.Layers()
	return out, layers, err
}

func descriptor(mediaType string, data []byte) ocispec.Descriptor {
	return ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(data), Size: int64(len(data)), Data: data}
}

// addLayers records the store's directories: UpperDir is the top layer's, LowerDir
// has the others, top to bottom.
func addLayers(m *machine.Machine, out *manifest.Manifest, graph map[string]string, diffIDs []string) error {
	dirs := []string{graph["UpperDir"]}
	if graph["LowerDir"] != "" {
		dirs = append(dirs, strings.Split(graph["LowerDir"], ":")...)
	}
	slices.Reverse(dirs)
	if len(dirs) != len(diffIDs) {
		return fmt.Errorf("docker has %d directories for %d layers", len(dirs), len(diffIDs))
	}
	var chain []digest.Digest
	for i, id := range diffIDs {
		chain = append(chain, digest.Digest(id))
		l := manifest.Layer{
			DiffID:    digest.Digest(id),
			ChainID:   identity.ChainID(slices.Clone(chain)),
			Directory: filepath.Base(filepath.Dir(dirs[i])),
		}
		if i > 0 {
			l.Parent = identity.ChainID(slices.Clone(chain[:i]))
		}
		if slices.ContainsFunc(out.Layers, func(o manifest.Layer) bool { return o.ChainID == l.ChainID }) {
			continue
		}
		var err error
		if l.Size, err = layerSize(m, l.ChainID); err != nil {
			return err
		}
		out.Layers = append(out.Layers, l)
	}
	return nil
}

// layerSize is what Docker's own image history adds up.
func layerSize(m *machine.Machine, chain digest.Digest) (int64, error) {
	b, err := os.ReadFile(m.Path(filepath.Join(mountPoint, storeRoot, "image/overlay2/layerdb/sha256", chain.Encoded(), "size")))
	if err != nil {
		return 0, err
	}
	return strconv.ParseInt(string(b), 10, 64)
}

func keepBlobs(m *machine.Machine, layers []v1.Layer) error {
	for _, l := range layers {
		h, err := l.Digest()
		if err != nil {
			return err
		}
		rc, err := l.Compressed()
		if err != nil {
			return err
		}
		defer rc.Close()
		file := m.Path(filepath.Join(mountPoint, manifest.BlobsDir, h.Algorithm, h.Hex))
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			return err
		}
		f, err := os.Create(file)
		if err != nil {
			return err
		}
		_, err = io.Copy(f, rc)
		if err := errors.Join(err, f.Close()); err != nil {
			return err
		}
	}
	return nil
}
