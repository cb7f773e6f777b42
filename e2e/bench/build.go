package main

import (
	"context"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	"github.com/selkies-project/packer-plugin-selkies/e2e/host"
	"github.com/selkies-project/packer-plugin-selkies/e2e/images"
	"github.com/selkies-project/packer-plugin-selkies/e2e/machine"
	"github.com/selkies-project/packer-plugin-selkies/e2e/packer"
)

// build fills a cache disk by packer build, then again with one layer changed; and the
// same machine's dockerd pulls the same images to an equal disk.
type build struct {
	s      *session
	images int

	vm     *machine.Machine
	port   int
	packer *packer.Packer
	// refs are the images; changed are the same with one in another version.
	refs, changed []string

	pull, provision, whole, rebuild series
}

func newBuild(s *session, images int) benchmark { return &build{s: s, images: images} }

//go:embed build.pkr.hcl
var template []byte

const buildDisk = 8 << 30 // sparse

func (b *build) prepare(ctx context.Context) error {
	c, err := b.s.chains()
	if err != nil {
		return err
	}
	b.refs = c.refs[:b.images]
	newer, err := images.NewerChain(c.busybox, depth)
	if err != nil {
		return err
	}
	pushed, err := images.Push(ctx, c.registry.Addr, []images.Image{newer})
	if err != nil {
		return err
	}
	b.changed = append(slices.Clone(pushed), b.refs[1:]...)

	plugin := filepath.Join(b.s.dir, "packer-plugin-selkies")
	if err := host.Build(ctx, ".", plugin); err != nil {
		return err
	}
	if b.packer, err = packer.New(ctx, plugin, b.s.dir); err != nil {
		return err
	}
	if err := os.WriteFile(b.path("build.pkr.hcl"), template, 0o644); err != nil {
		return err
	}
	if b.port, err = machine.FreePort(); err != nil {
		return err
	}
	if b.vm, err = machine.Boot(ctx, machine.Config{Name: "build-vm", SSHPort: b.port}); err != nil {
		return err
	}
	b.s.cleanup = append(b.s.cleanup, b.vm.Close)
	return b.vm.StartDocker(ctx, machine.Docker{Release: machine.Debian})
}

func (b *build) path(name string) string { return filepath.Join(b.s.dir, name) }

func (b *build) round(ctx context.Context) error {
	if err := b.onDisk(ctx, b.plainPull); err != nil {
		return err
	}
	return b.onDisk(ctx, func(ctx context.Context, device string) error {
		took, whole, err := b.build(ctx, device, b.refs)
		if err != nil {
			return err
		}
		again, _, err := b.build(ctx, device, b.changed)
		b.provision.took(took)
		b.whole.took(whole)
		b.rebuild.took(again)
		return err
	})
}

// onDisk calls f with an empty disk that is attached to the machine.
func (b *build) onDisk(ctx context.Context, f func(ctx context.Context, device string) error) (err error) {
	file := b.path("build.img")
	if err := host.NewDisk(file, buildDisk); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.Remove(file)) }()
	loop, err := host.AttachLoop(file, false)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, loop.Close()) }()
	if err := b.vm.AttachDisk(loop.Path, "build"); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, b.vm.DetachDisk(loop.Path, "build")) }()
	if err := host.DropCaches(); err != nil {
		return err
	}
	return f(ctx, loop.Path)
}

// plainPull is what one would do without the provisioner: docker pull of each image, by
// a dockerd whose data root is on the disk, and a sync. Formatting the disk and starting
// dockerd is not counted.
func (b *build) plainPull(ctx context.Context, device string) error {
	const dir = "/mnt/plain"
	run := func(args ...string) error {
		_, err := b.vm.Run(ctx, args...)
		return err
	}
	err := run("sh", "-ec", `mkfs.ext4 -q "$1"; mkdir -p "$2"; mount "$1" "$2"`, "format", device, dir)
	if err != nil {
		return err
	}
	if err := b.vm.StartDocker(ctx, machine.Docker{Release: machine.Debian, Config: map[string]any{"data-root": dir}}); err != nil {
		return err
	}
	began := time.Now()
	err = run(append([]string{"sh", "-ec", `for ref; do docker pull -q "$ref" >/dev/null; done; sync -f ` + dir, "pull"}, b.refs...)...)
	if err != nil {
		return err
	}
	b.pull.took(time.Since(began))
	if err := b.vm.StartDocker(ctx, machine.Docker{Release: machine.Debian}); err != nil {
		return err
	}
	return run("umount", dir)
}

// build runs packer build and takes the time of the provisioner, and of all of it.
func (b *build) build(ctx context.Context, device string, refs []string) (provision, whole time.Duration, err error) {
	list, err := json.Marshal(refs)
	if err != nil {
		return 0, 0, err
	}
	cmd := b.packer.Command(ctx, "build", "-var", "images="+string(list), "-var", "device="+device,
		"-var", "ssh_port="+strconv.Itoa(b.port), "-var", "ssh_private_key_file="+b.vm.SSHKey,
		"-var", "stamps="+b.path("stamps"), b.path("build.pkr.hcl"))
	began := time.Now()
	if _, err := host.Output(cmd); err != nil {
		return 0, 0, err
	}
	whole = time.Since(began)
	provision, err = b.stamps()
	return provision, whole, err
}

// stamps is the time between the two that the template notes.
func (b *build) stamps() (time.Duration, error) {
	data, err := os.ReadFile(b.path("stamps"))
	if err != nil {
		return 0, err
	}
	var at [2]float64
	if _, err := fmt.Sscan(string(data), &at[0], &at[1]); err != nil {
		return 0, fmt.Errorf("reading the times that the build noted, %q: %w", data, err)
	}
	return time.Duration((at[1] - at[0]) * float64(time.Second)), nil
}

func (b *build) figures() []figure {
	of := fmt.Sprintf("%d layers", layersOf(b.images))
	return []figure{
		{name: "docker pull, " + of, unit: seconds, runs: b.pull},
		{name: "packer build's provisioning", unit: seconds, runs: b.provision,
			ratios: []ratio{{"docker pull", 1.05, b.provision.over(b.pull)}}},
		{name: "all of packer build", unit: seconds, runs: b.whole, ratios: []ratio{{"docker pull", 0, b.whole.over(b.pull)}}},
		{name: "provisioning again, 1 layer changed", unit: seconds, runs: b.rebuild,
			ratios: []ratio{{"the first", 0.1, b.rebuild.over(b.provision)}}},
	}
}
