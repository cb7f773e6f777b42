//go:build e2e

package provisioner_test

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-containerregistry/pkg/v1/mutate"

	"github.com/selkies-project/packer-plugin-selkies/e2e/host"
	"github.com/selkies-project/packer-plugin-selkies/e2e/machine"
	"github.com/selkies-project/packer-plugin-selkies/e2e/registry"
)

// TestBadInput gives the build what it cannot use. Each ends with one line that
// names the thing and the remedy, and the VM and the disk as they were.
func TestBadInput(t *testing.T) {
	v := world.debian
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
	run(t, "mkfs.ext4", "-q", foreign.device)
	run(t, "debugfs", "-w", "-R", "mkdir notes", foreign.device)
	swap := newDisk(t, v, 64)
	run(t, "mkswap", swap.device)
	table := newDisk(t, v, 64)
	writePartitionTable(t, table.image)
	mounted := newDisk(t, v, 64)
	run(t, "mkfs.ext4", "-q", mounted.device)
	v.Output(t, "mkdir", "/elsewhere")
	v.Output(t, "mount", mounted.device, "/elsewhere")
	t.Cleanup(func() {
		if _, err := v.Run(context.Background(), "umount", "/elsewhere"); err != nil {
			t.Error(err)
		}
	})

	device := func(path string) string { return fmt.Sprintf("disk { device = %q }", path) }
	tests := []struct {
		name    string
		options []string
		disk    *disk
		want    string
	}{
		{"no image", nil, nil, "images and image_list_file name no image"},
		{"malformed reference", []string{imagesOption(good, "UPPER/case")}, nil, `images[1]: "UPPER/case"`},
		{"list", []string{`image_list_file = "` + list + `"`}, nil, list + ":4: "},
		{"duplicate in list", []string{`image_list_file = "` + list + `"`}, nil, list + ":5: "},
		{"duplicate", []string{imagesOption("debian", "docker.io/library/debian:latest")}, nil, `images[1]: "debian:latest" is a duplicate of images[0]`},
		{"no such image", []string{imagesOption(reg.Addr + "/none:1"), device(blank.device)}, blank, "/none:1 (images[0]): the registry has no such image"},
		{"unreachable registry", []string{imagesOption("127.0.0.1:1/app:1"), device(blank.device)}, blank, "the Packer host reads manifests itself"},
		{"wrong platform", []string{imagesOption(wrong), device(blank.device)}, blank, "it is for platform linux/arm64, not linux/amd64"},
		{"no such device", []string{imagesOption(good), device("/dev/nothing")}, nil, `disk.device "/dev/nothing": the build VM has no such device`},
		{"no such label", []string{imagesOption(good), `disk { label = "nothing" }`}, nil, `disk.label "nothing": no disk of the build VM`},
		{"not a device", []string{imagesOption(good), device("/etc/passwd")}, nil, `disk.device "/etc/passwd" is not a block device`},
		{"foreign files", []string{imagesOption(good), device(foreign.device)}, foreign, `files that are no image cache, such as "notes"`},
		{"foreign file system", []string{imagesOption(good), device(swap.device)}, swap, "holds a foreign swap"},
		{"partition table", []string{imagesOption(good), device(table.device)}, table, "holds a dos partition table"},
		{"blank and never", []string{imagesOption(good), blank.block(`format = "never"`)}, blank, `is blank; set disk.format = "if-blank"`},
		{"mounted elsewhere", []string{imagesOption(good), device(mounted.device)}, nil, "is mounted on /elsewhere of the build VM"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			before, sum := v.state(t), ""
			if tt.disk != nil {
				sum = checksum(t, tt.disk)
			}
			out, err := v.build(t, tt.options...)
			if err == nil {
				t.Fatalf("the build succeeded:\n%s", out)
			}
			if !strings.Contains(strings.Join(strings.Fields(out), " "), tt.want) {
				t.Errorf("does not say %q:\n%s", tt.want, out)
			}
			if diff := cmp.Diff(before, v.state(t)); diff != "" {
				t.Errorf("the VM changed: %s", diff)
			}
			if tt.disk != nil && checksum(t, tt.disk) != sum {
				t.Error("the disk changed")
			}
		})
	}
	t.Run("none communicator", func(t *testing.T) {
		out, err := packerBuild(t, "\n communicator = \"none\"\n", imagesOption(good)).CombinedOutput()
		if err == nil || !strings.Contains(string(out), `set a communicator other than "none"`) {
			t.Errorf("packer build: %v\n%s", err, out)
		}
	})
}

// TestSomeFail has an image among others that cannot be had.
func TestSomeFail(t *testing.T) {
	v := world.debian
	blobs := t.TempDir()
	reg := registry.New(t, registry.Config{Dir: blobs})
	a := pushed(t, reg, "a:1", newImage(t, layer(t, map[string]int{"a": 1 << 20})))
	b := pushed(t, reg, "b:1", newImage(t, layer(t, map[string]int{"b": 1 << 20})))
	broken := newImage(t, layer(t, map[string]int{"c": 1000}))
	c := pushed(t, reg, "c:1", broken)
	d := newDisk(t, v, 256)
	// The manifest of c can be had but its layer cannot.
	layers, err := broken.Layers()
	if err != nil {
		t.Fatal(err)
	}
	blob, err := layers[0].Digest()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(blobs, blob.Algorithm, blob.Hex)); err != nil {
		t.Fatal(err)
	}
	out, err := v.build(t, imagesOption(a, reg.Addr+"/none:1", c, b), d.block(), "max_pull_attempts = 2")
	text := strings.Join(strings.Fields(out), " ")
	if err == nil || !strings.Contains(text, "2 of 4 references failed: ") || !strings.Contains(text, "none:1 (images[1])") || !strings.Contains(text, "c:1 (images[2])") {
		t.Fatalf("packer build: %v\n%s", err, out)
	}
	// The next try finds what succeeded.
	reg.Reset()
	out = v.mustBuild(t, imagesOption(a, b), d.block())
	if n := reg.Count().BlobGets; n > 2 { // the configs, read by the Packer host
		t.Errorf("fetched %d blobs again:\n%s", n, out)
	}
}

// TestDiskFull has more to pull than the disk can hold.
func TestDiskFull(t *testing.T) {
	v := world.debian
	reg := registry.New(t, registry.Config{})
	ref := pushed(t, reg, "app:1", newImage(t, layer(t, map[string]int{"large": 100 << 20})))
	d := newDisk(t, v, 64)
	before := v.state(t)
	out, err := v.build(t, imagesOption(ref), d.block())
	if err == nil || !strings.Contains(out, "the disk is full; use a larger one") {
		t.Errorf("packer build: %v\n%s", err, out)
	}
	if diff := cmp.Diff(before, v.state(t)); diff != "" {
		t.Errorf("the VM changed: %s", diff)
	}
}

// TestUnusableDocker has a VM without a Docker that can be used.
func TestUnusableDocker(t *testing.T) {
	port, err := machine.FreePort()
	if err != nil {
		t.Fatal(err)
	}
	m := machine.New(t, machine.Config{Name: "build-vm", SSHPort: port})
	v := &vm{Machine: m, port: port}
	reg := registry.New(t, registry.Config{})
	ref := pushed(t, reg, "app:1", newImage(t, layer(t, map[string]int{"a": 1000})))
	d := newDisk(t, v, 64)
	fails := func(want string, options ...string) {
		t.Helper()
		out, err := v.build(t, append(options, imagesOption(ref))...)
		if err == nil || !strings.Contains(strings.Join(strings.Fields(out), " "), want) {
			t.Errorf("does not say %q: %v\n%s", want, err, out)
		}
	}
	fails("start Docker there, or set docker_host")
	if err := m.StartContainerd(t.Context(), machine.Containerd{Release: machine.Debian}); err != nil {
		t.Fatal(err)
	}
	if err := m.StartDocker(t.Context(), machine.Docker{Release: machine.Debian, Config: map[string]any{"storage-driver": "vfs"}}); err != nil {
		t.Fatal(err)
	}
	fails(`uses the storage driver "vfs", a cache needs "overlay2"`)
	if err := m.StartDocker(t.Context(), machine.Docker{Release: machine.Debian, Config: map[string]any{"userns-remap": "default"}}); err != nil {
		t.Fatal(err)
	}
	fails("docker on the build VM runs with userns")
	m.Output(t, "mv", "/usr/bin/docker", "/usr/bin/docker-away")
	fails("install Docker there before this provisioner runs")
	m.Output(t, "mv", "/usr/sbin/dockerd", "/usr/sbin/dockerd-away")
	fails("install Docker on the build VM before this provisioner runs", d.block())
}

func run(t *testing.T, args ...string) {
	t.Helper()
	if _, err := host.Output(exec.CommandContext(t.Context(), args[0], args[1:]...)); err != nil {
		t.Fatal(err)
	}
}

func checksum(t *testing.T, d *disk) string {
	t.Helper()
	out, err := host.Output(exec.CommandContext(t.Context(), "sha256sum", d.device))
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
