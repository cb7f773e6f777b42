//go:build e2e

package provisioner_test

import (
	"archive/tar"
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/types"

	"github.com/selkies-project/packer-plugin-selkies/e2e/buildvm"
	"github.com/selkies-project/packer-plugin-selkies/e2e/host"
	"github.com/selkies-project/packer-plugin-selkies/e2e/images"
	"github.com/selkies-project/packer-plugin-selkies/e2e/machine"
	"github.com/selkies-project/packer-plugin-selkies/e2e/registry"
)

// TestBadInput gives the build what it cannot use. Each ends with one line that
// names the thing and the remedy, and the VM and the disk as they were.
func TestBadInput(t *testing.T) {
	t.Parallel()
	v := debian(t)
	reg := registry.New(t, registry.Config{})
	good := pushed(t, reg, "app:1", newImage(t, layer(t, map[string]int{"a": 1000})))
	arm := newImage(t, layer(t, map[string]int{"b": 1000}))
	config, err := arm.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	config = config.DeepCopy()
	config.Architecture = "arm64"
	if arm, err = mutate.ConfigFile(arm, config); err != nil {
		t.Fatal(err)
	}
	wrong := pushed(t, reg, "arm:1", arm)
	list := filepath.Join(t.TempDir(), "images.txt")
	if err := os.WriteFile(list, []byte("# comment\n"+good+"\n\nNot_A:Reference!\n"+good+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}

	blank := newDisk(t, v, 64)
	foreign := newDisk(t, v, 64)
	run(t, "mkfs.ext4", "-q", foreign.Device)
	run(t, "debugfs", "-w", "-R", "mkdir notes", foreign.Device)
	swap := newDisk(t, v, 64)
	run(t, "mkswap", swap.Device)
	table := newDisk(t, v, 64)
	writePartitionTable(t, table.Image)
	mounted := newDisk(t, v, 64)
	run(t, "mkfs.ext4", "-q", mounted.Device)
	v.Output(t, "mkdir", "/elsewhere")
	v.Output(t, "mount", mounted.Device, "/elsewhere")
	t.Cleanup(func() {
		if _, err := v.Run(context.Background(), "umount", "/elsewhere"); err != nil {
			t.Error(err)
		}
	})

	device := func(path string) string { return fmt.Sprintf("disk { device = %q }", path) }
	tests := []struct {
		name    string
		options []string
		disk    *buildvm.Disk
		want    string
	}{
		{"no image", nil, nil, "images and image_list_file name no image"},
		{"malformed reference", []string{buildvm.Images(good, "UPPER/case")}, nil, `images[1]: "UPPER/case"`},
		{"list", []string{`image_list_file = "` + list + `"`}, nil, list + ":4: "},
		{"duplicate in list", []string{`image_list_file = "` + list + `"`}, nil, list + ":5: "},
		{"duplicate", []string{buildvm.Images("debian", "docker.io/library/debian:latest")}, nil, `images[1]: "debian:latest" is a duplicate of images[0]`},
		{"no such image", []string{buildvm.Images(reg.Addr + "/none:1"), device(blank.Device)}, blank, "/none:1 (images[0]): the registry has no such image"},
		{"unreachable registry", []string{buildvm.Images("127.0.0.1:1/app:1"), device(blank.Device)}, blank, "the Packer host reads manifests itself"},
		{"wrong platform", []string{buildvm.Images(wrong), device(blank.Device)}, blank, "it is for platform linux/arm64, not linux/amd64"},
		{"no such device", []string{buildvm.Images(good), device("/dev/nothing")}, nil, `disk.device "/dev/nothing": the build VM has no such device`},
		{"no such label", []string{buildvm.Images(good), `disk { label = "nothing" }`}, nil, `disk.label "nothing": no disk of the build VM`},
		{"not a device", []string{buildvm.Images(good), device("/etc/passwd")}, nil, `disk.device "/etc/passwd" is not a block device`},
		{"foreign files", []string{buildvm.Images(good), device(foreign.Device)}, foreign, `files that are no image cache, such as "notes"`},
		{"foreign file system", []string{buildvm.Images(good), device(swap.Device)}, swap, "holds a foreign swap"},
		{"partition table", []string{buildvm.Images(good), device(table.Device)}, table, "holds a dos partition table"},
		{"blank and never", []string{buildvm.Images(good), blank.Block(`format = "never"`)}, blank, `is blank; set disk.format = "if-blank"`},
		{"mounted elsewhere", []string{buildvm.Images(good), device(mounted.Device)}, nil, "is mounted on /elsewhere of the build VM"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			before, sum := v.State(t), ""
			if tt.disk != nil {
				sum = checksum(t, tt.disk)
			}
			out, err := v.Build(t, tt.options...)
			if err == nil {
				t.Fatalf("the build succeeded:\n%s", out)
			}
			// Packer wraps what it has to say of a template.
			said := strings.Join(strings.Fields(out), " ")
			if !strings.Contains(out, "Failed preparing") {
				said = errorLine(t, out)
			}
			if !strings.Contains(said, tt.want) {
				t.Errorf("does not say %q:\n%s", tt.want, out)
			}
			if diff := cmp.Diff(before, v.State(t)); diff != "" {
				t.Errorf("the VM changed: %s", diff)
			}
			if tt.disk != nil && checksum(t, tt.disk) != sum {
				t.Error("the disk changed")
			}
		})
	}
	t.Run("none communicator", func(t *testing.T) {
		out, err := world.packer.Build(t, "\n communicator = \"none\"\n", buildvm.Images(good)).CombinedOutput()
		if err == nil || !strings.Contains(errorLine(t, string(out)), `set a communicator other than "none"`) {
			t.Errorf("packer build: %v\n%s", err, out)
		}
	})
}

// TestSomeFail has two images among forty that cannot be had.
func TestSomeFail(t *testing.T) {
	t.Parallel()
	v := debian(t)
	blobs := t.TempDir()
	reg := registry.New(t, registry.Config{Dir: blobs})
	var images []v1.Image
	var good []string
	for i := range 38 {
		image := newImage(t, layer(t, map[string]int{fmt.Sprint("file", i): 1000}))
		images = append(images, image)
		good = append(good, pushed(t, reg, fmt.Sprintf("app-%d:1", i), image))
	}
	// The manifest of broken can be had but its layer cannot.
	image := newImage(t, layer(t, map[string]int{"broken": 1000}))
	broken := pushed(t, reg, "broken:1", image)
	blob := layerDescriptor(t, image, 0).Digest
	if err := os.Remove(filepath.Join(blobs, blob.Algorithm, blob.Hex)); err != nil {
		t.Fatal(err)
	}
	d := newDisk(t, v, 256)
	v.MustBuild(t, buildvm.Images(good[0]), d.Block())
	_, manifest := d.Manifest(t)
	before := v.State(t)

	all := slices.Insert(slices.Clone(good), 20, reg.Addr+"/none:1", broken)
	out, err := v.Build(t, buildvm.Images(all...), d.Block(), "max_pull_attempts = 2")
	if err == nil {
		t.Fatalf("the build succeeded:\n%s", out)
	}
	line := errorLine(t, out)
	for _, want := range []string{"2 of 40 references failed: ", "/none:1 (images[20]): the registry has no such image", "/broken:1 (images[21]): "} {
		if !strings.Contains(line, want) {
			t.Errorf("does not say %q: %s", want, line)
		}
	}
	if diff := cmp.Diff(before, v.State(t)); diff != "" {
		t.Errorf("the VM changed: %s", diff)
	}
	if _, after := d.Manifest(t); !bytes.Equal(after, manifest) {
		t.Error("the layer manifest changed")
	}

	// The next try finds what succeeded.
	reg.Reset()
	v.MustBuild(t, buildvm.Images(good...), d.Block())
	for i, image := range images {
		if blobs := layerBlobs(t, reg, image); len(blobs) > 0 {
			t.Errorf("fetched %s again", good[i])
		}
	}
	d.CheckStore(t, len(good))
}

// TestZstd has layers that Debian's Docker cannot unpack: of one image the registry says
// so, and of another it does not.
func TestZstd(t *testing.T) {
	t.Parallel()
	v := debian(t)
	reg := registry.New(t, registry.Config{})
	stream := layer(t, map[string]int{"a": 1000})
	zstd, err := images.New(images.Zstd, stream)
	if err != nil {
		t.Fatal(err)
	}
	refused, good := pushed(t, reg, "zstd:1", zstd), pushed(t, reg, "good:1", newImage(t, layer(t, map[string]int{"b": 1000})))
	layers, err := zstd.Layers()
	if err != nil {
		t.Fatal(err)
	}
	config, err := zstd.ConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	wrong, err := mutate.Append(empty.Image, mutate.Addendum{Layer: layers[0], MediaType: types.DockerLayer})
	if err != nil {
		t.Fatal(err)
	}
	if wrong, err = mutate.ConfigFile(wrong, config); err != nil {
		t.Fatal(err)
	}
	mistyped := pushed(t, reg, "mistyped:1", wrong)
	d := newDisk(t, v, 64)
	before, sum := v.State(t), checksum(t, d)
	version := strings.TrimSuffix(strings.Fields(v.Output(t, "dockerd", "--version"))[2], ",")
	why := ": its layers are zstd, which Docker " + version + " cannot unpack; install Docker 23 or newer on the build VM"
	fails := func(want string, options ...string) {
		t.Helper()
		reg.Reset()
		out, err := v.Build(t, append(options, d.Block())...)
		if err == nil || !strings.Contains(errorLine(t, out), want) || strings.Contains(out, "trying again") {
			t.Errorf("packer build: %v\n%s", err, out)
		}
		if diff := cmp.Diff(before, v.State(t)); diff != "" {
			t.Errorf("the VM changed: %s", diff)
		}
	}
	// With nothing else to pull, and in a dry run, the disk stays as it is.
	fails("1 of 1 references failed: "+refused+" (images[0])"+why, buildvm.Images(refused))
	fails("1 of 2 references failed: "+refused+" (images[0])"+why, buildvm.Images(refused, good), "dry_run = true")
	if checksum(t, d) != sum {
		t.Error("the disk changed")
	}
	fails("1 of 2 references failed: "+refused+" (images[0])"+why, buildvm.Images(refused, good))
	if blobs := layerBlobs(t, reg, zstd); len(blobs) > 0 {
		t.Errorf("fetched layers %v", blobs)
	}
	fails("1 of 2 references failed: "+mistyped+" (images[1]): failed to register layer", buildvm.Images(good, mistyped))
}

// TestDiskFull has a layer of zeros, which only its contents show to be too large.
func TestDiskFull(t *testing.T) {
	t.Parallel()
	v := debian(t)
	reg := registry.New(t, registry.Config{})
	small := pushed(t, reg, "small:1", newImage(t, layer(t, map[string]int{"small": 1000})))
	large := pushed(t, reg, "large:1", newImage(t, zeros(t, 100<<20)))
	d := newDisk(t, v, 64)
	v.MustBuild(t, buildvm.Images(small), d.Block())
	_, manifest := d.Manifest(t)
	before := v.State(t)
	out, err := v.Build(t, buildvm.Images(small, large), d.Block())
	if err == nil || !strings.Contains(errorLine(t, out), "/large:1 (images[1]): the disk is full; use a larger one") {
		t.Errorf("packer build: %v\n%s", err, out)
	}
	if diff := cmp.Diff(before, v.State(t)); diff != "" {
		t.Errorf("the VM changed: %s", diff)
	}
	if _, after := d.Manifest(t); !bytes.Equal(after, manifest) {
		t.Error("the layer manifest changed")
	}
	v.MustBuild(t, buildvm.Images(small), d.Block())
	d.CheckStore(t, 1)
}

// TestUnusableDocker has a VM without a Docker that can be used.
func TestUnusableDocker(t *testing.T) {
	t.Parallel()
	bare, err := buildvm.BootBare(t.Context(), world.packer)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { bare.Close() })
	v := &vm{bare}
	reg := registry.New(t, registry.Config{})
	ref := pushed(t, reg, "app:1", newImage(t, layer(t, map[string]int{"a": 1000})))
	d := newDisk(t, v, 64)
	fails := func(want string, options ...string) {
		t.Helper()
		before, sum := v.State(t), checksum(t, d)
		out, err := v.Build(t, append(options, buildvm.Images(ref))...)
		if err == nil || !strings.Contains(errorLine(t, out), want) {
			t.Errorf("does not say %q: %v\n%s", want, err, out)
		}
		if diff := cmp.Diff(before, v.State(t)); diff != "" {
			t.Errorf("the VM changed: %s", diff)
		}
		if checksum(t, d) != sum {
			t.Error("the disk changed")
		}
	}
	fails("start Docker there, or set docker_host")
	// The daemon on the disk needs only the programs, and makes nothing that the VM's own
	// would make at its first start.
	v.Output(t, "rmdir", "/etc/docker")
	before := v.State(t)
	other := newDisk(t, v, 64)
	v.MustBuild(t, buildvm.Images(ref), other.Block())
	if diff := cmp.Diff(before, v.State(t)); diff != "" {
		t.Errorf("the VM changed: %s", diff)
	}
	if err := v.StartContainerd(t.Context(), machine.Containerd{Release: machine.Debian}); err != nil {
		t.Fatal(err)
	}
	if err := v.StartDocker(t.Context(), machine.Docker{Release: machine.Debian, Config: map[string]any{"storage-driver": "vfs"}}); err != nil {
		t.Fatal(err)
	}
	fails(`uses the storage driver "vfs", a cache needs "overlay2"`)
	if err := v.StartDocker(t.Context(), machine.Docker{Release: machine.Debian, Config: map[string]any{"userns-remap": "default"}}); err != nil {
		t.Fatal(err)
	}
	fails("docker on the build VM runs with userns")
	v.Output(t, "mv", "/usr/bin/docker", "/usr/bin/docker-away")
	fails("install Docker there before this provisioner runs")
	v.Output(t, "mv", "/usr/sbin/dockerd", "/usr/sbin/dockerd-away")
	fails("install Docker on the build VM before this provisioner runs", d.Block())
}

// zeros is a tar stream of one file that compresses to nearly nothing.
func zeros(t *testing.T, size int) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	err := w.WriteHeader(&tar.Header{Name: "zeros", Mode: 0o644, Size: int64(size)})
	if err == nil {
		_, err = w.Write(make([]byte, size))
	}
	if err == nil {
		err = w.Close()
	}
	if err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func run(t *testing.T, args ...string) {
	t.Helper()
	if _, err := host.Output(exec.CommandContext(t.Context(), args[0], args[1:]...)); err != nil {
		t.Fatal(err)
	}
}

func checksum(t *testing.T, d *buildvm.Disk) string {
	t.Helper()
	out, err := host.Output(exec.CommandContext(t.Context(), "sha256sum", d.Device))
	if err != nil {
		t.Fatal(err)
	}
	return out
}

// writePartitionTable writes an MBR with one Linux partition.
func writePartitionTable(t *testing.T, image string) {
	t.Helper()
	sector := make([]byte, 512)
	sector[446+4] = 0x83
	sector[446+9] = 8     // first sector 2048
	sector[446+13] = 0x10 // 4096 sectors
	sector[510], sector[511] = 0x55, 0xaa
	f, err := os.OpenFile(image, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt(sector, 0); err != nil {
		t.Fatal(err)
	}
}
