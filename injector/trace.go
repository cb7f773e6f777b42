package main

import (
	"context"
	"errors"
	"fmt"
	"io"

	"github.com/distribution/reference"
	"github.com/spf13/cobra"

	"github.com/selkies-project/packer-plugin-selkies/injector/cachedisk"
	"github.com/selkies-project/packer-plugin-selkies/injector/tracer"
	"github.com/selkies-project/packer-plugin-selkies/manifest"
)

func newTraceCommand(f *flags) *cobra.Command {
	return &cobra.Command{
		Use:   "trace IMAGE",
		Short: "Record which parts of an image's files a start reads, while a cache disk is built",
		Long: `Record which parts of an image's files are read, and in which order: the access trace
that inject --read-ahead and run read ahead. The provisioner runs this on the build VM.

It empties the page cache of the image's files and prints the line "ready". Start a
container of the image then. When standard input ends, so does the recording, and the
trace follows on standard output. It changes nothing on the disk.`,
		Example: `  selkies-image-injector trace --cache /mnt/selkies-image-cache debian:12 >trace.json`,
		Args: usage(func(cmd *cobra.Command, args []string) error {
			return errors.Join(cobra.ExactArgs(1)(cmd, args), checkReferences(cmd, args))
		}),
		RunE: func(cmd *cobra.Command, args []string) error {
			if err := checkRoot(); err != nil {
				return err
			}
			disks, err := cachedisk.Find(f.caches, f.hostRoot)
			if err != nil {
				return err
			}
			d, img := imageOf(disks, args[0])
			if d == nil {
				return fmt.Errorf("no cache disk has %s; plan lists their images", args[0])
			}
			return record(cmd, d, img)
		},
	}
}

// imageOf finds an image on the disks by its name, as a pod names it.
func imageOf(disks []*cachedisk.Disk, ref string) (*cachedisk.Disk, manifest.Image) {
	named, err := reference.ParseDockerRef(ref)
	if err != nil {
		return nil, manifest.Image{}
	}
	for _, d := range disks {
		for _, img := range d.Manifest.Images {
			for _, name := range img.Names {
				if name == named.String() {
					return d, img
				}
			}
		}
	}
	return nil, manifest.Image{}
}

func record(cmd *cobra.Command, d *cachedisk.Disk, img manifest.Image) (err error) {
	t, err := tracer.New(d, img)
	if err != nil {
		return err
	}
	done, err := t.Exact()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, done()) }()
	if err := t.Cold(); err != nil {
		return err
	}
	ctx, stop := context.WithCancel(cmd.Context())
	defer stop()
	go func() {
		_, _ = io.Copy(io.Discard, cmd.InOrStdin())
		stop()
	}()
	fmt.Fprintln(cmd.OutOrStdout(), "ready")
	if err := t.Record(ctx.Done()); err != nil {
		return err
	}
	if err := cmd.Context().Err(); err != nil {
		return err
	}
	data, err := t.Trace().Encode()
	if err != nil {
		return err
	}
	_, err = cmd.OutOrStdout().Write(data)
	return err
}
