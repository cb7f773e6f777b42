package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/selkies-project/packer-plugin-selkies/e2e/host"
	"github.com/selkies-project/packer-plugin-selkies/e2e/packer"
)

// diskName is the cache disk's name as Compute Engine would show it in a machine.
const diskName = "selkies-image-cache"

// packerBuild runs example/local on the build machine with an empty disk attached.
func (d *demo) packerBuild(ctx context.Context) error {
	if err := d.attachBlank(); err != nil {
		return err
	}
	source, err := host.Source(ctx)
	if err != nil {
		return err
	}
	var refs []string
	for _, i := range d.images {
		refs = append(refs, i.Ref)
	}
	images, err := json.Marshal(refs)
	if err != nil {
		return err
	}
	packer, err := packer.New(ctx, d.plugin(), d.dir)
	if err != nil {
		return err
	}
	d.registry.Reset()
	build := packer.Command(ctx, "build",
		"-var", "images="+string(images),
		"-var", "device=/dev/disk/by-id/google-"+diskName,
		"-var", "ssh_host=127.0.0.1",
		"-var", "ssh_port="+strconv.Itoa(d.sshPort),
		"-var", "ssh_private_key_file="+d.build.SSHKey,
		"example/local")
	build.Dir = source
	if err := show(build); err != nil {
		return fmt.Errorf("filling the cache disk: %w", err)
	}
	fmt.Printf("    the registry served %s\n", size(d.registry.Reset().BlobBytes))
	return nil
}

func (d *demo) image() string { return filepath.Join(d.dir, "cache-disk.img") }

// attachBlank makes the cache disk and attaches it to the build machine.
func (d *demo) attachBlank() error {
	packed := int64(0)
	for _, i := range d.images {
		packed += i.Packed
	}
	// Sparse: what the images leave empty takes no room.
	if err := host.NewDisk(d.image(), 4<<30+6*packed); err != nil {
		return err
	}
	var err error
	if d.disk, err = host.AttachLoop(d.image(), false); err != nil {
		return err
	}
	return d.build.AttachDisk(d.disk.Path, diskName)
}

// attachReadOnly takes the cache disk from the build machine, which has done its
// work, and makes it read-only for the nodes.
func (d *demo) attachReadOnly(context.Context) error {
	err := errors.Join(d.build.Close(), d.disk.Close())
	if err == nil {
		d.disk, err = host.AttachLoop(d.image(), true)
	}
	return err
}

// show runs cmd and prints what it says, indented, as it says it.
func show(cmd *exec.Cmd) error {
	r, w := io.Pipe()
	cmd.Stdout, cmd.Stderr = w, w
	printed := make(chan struct{})
	go func() {
		defer close(printed)
		lines := bufio.NewReader(r)
		for {
			line, err := lines.ReadString('\n')
			if line = strings.TrimRight(line, "\n"); line != "" {
				fmt.Println("    " + line)
			}
			if err != nil {
				return
			}
		}
	}()
	err := cmd.Run()
	w.Close()
	<-printed
	return err
}
