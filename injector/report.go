package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/moby/sys/atomicwriter"
	"github.com/opencontainers/go-digest"
	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/selkies-project/packer-plugin-selkies/htmlreport"
	"github.com/selkies-project/packer-plugin-selkies/injector/cachedisk"
	"github.com/selkies-project/packer-plugin-selkies/injector/report"
	"github.com/selkies-project/packer-plugin-selkies/manifest"
)

func newReportCommand(f *flags) *cobra.Command {
	var file, since string
	cmd := &cobra.Command{
		Use:   "report --html FILE [MANIFEST]",
		Short: "Draw what a cache disk holds, as one HTML page",
		Long: `Write a page that shows what a cache disk holds: its images, the layers that they
share as a picture, sizes, what has changed since another generation, and what still
fits. It is one file that asks no network for anything.

It is drawn from the layer manifest: that of the cache disk or, of a disk that is
elsewhere, the file MANIFEST, such as the provisioner's manifest_output writes; then
how full the disk is remains unknown. Needs no runtime and changes nothing on the node.`,
		Example: `  selkies-image-injector report --html cache.html --cache /mnt/disks/images
  selkies-image-injector report --html cache.html --since last.json manifest.json`,
		Args: usage(cobra.MaximumNArgs(1)),
		RunE: func(cmd *cobra.Command, args []string) error {
			if file == "" {
				return usageError{errors.New("--html is missing; name the file to write, or - for standard output")}
			}
			r, err := f.gather(args, since)
			if err != nil {
				return err
			}
			return f.writeReport(cmd.OutOrStdout(), r, file)
		},
	}
	cmd.Flags().StringVar(&file, "html", "", "`file` to write; - is standard output")
	cmd.Flags().StringVar(&since, "since", "", "`file` with the layer manifest of the generation to compare with")
	return cmd
}

// gather reads what the page is drawn from.
func (f *flags) gather(args []string, since string) (*htmlreport.Report, error) {
	r := &htmlreport.Report{
		NoSince: "No other generation was given to compare with: --since takes its layer manifest.",
		NoDisk:  "The layer manifest alone does not tell how large its disk is: run the report where the disk is, with --cache.",
		NoPulls: "The layer manifest does not tell how long each image took to build: the provisioner's own report does.",
	}
	var err error
	if len(args) > 0 {
		r.Manifest, err = readManifest(args[0])
	} else {
		r.Manifest, r.Disk, err = f.readDisk()
	}
	if err == nil && since != "" {
		r.Since, err = readManifest(since)
	}
	return r, err
}

func readManifest(name string) (*manifest.Manifest, error) {
	data, err := os.ReadFile(name)
	if err != nil {
		return nil, fmt.Errorf("reading layer manifest: %w", err)
	}
	m, err := manifest.Decode(data)
	if err != nil {
		return nil, fmt.Errorf("reading layer manifest %s: %w", name, err)
	}
	return m, nil
}

func (f *flags) readDisk() (*manifest.Manifest, *htmlreport.Disk, error) {
	disks, err := cachedisk.Find(f.caches, f.hostRoot)
	if err != nil {
		return nil, nil, err
	}
	if len(disks) > 1 {
		return nil, nil, usageError{fmt.Errorf("a report is of one disk, there are %d; choose one with --cache", len(disks))}
	}
	var fs unix.Statfs_t
	if err := unix.Statfs(disks[0].Dir, &fs); err != nil {
		return nil, nil, fmt.Errorf("asking for the free space of %s: %w", disks[0].Dir, err)
	}
	return disks[0].Manifest, &htmlreport.Disk{Size: int64(fs.Blocks) * fs.Bsize, Free: int64(fs.Bfree) * fs.Bsize}, nil
}

// written is what is said of a page.
type written struct {
	File    string        `json:"file"`
	CacheID digest.Digest `json:"cacheID"`
	Images  int           `json:"images"`
	Layers  int           `json:"layers"`
}

func (f *flags) writeReport(stdout io.Writer, r *htmlreport.Report, file string) error {
	var b bytes.Buffer
	if err := r.Write(&b); err != nil {
		return fmt.Errorf("drawing the report: %w", err)
	}
	if file == "-" {
		_, err := b.WriteTo(stdout)
		return err
	}
	if err := atomicwriter.WriteFile(file, b.Bytes(), 0o644); err != nil {
		return fmt.Errorf("writing the report: %w", err)
	}
	id, err := r.Manifest.ID()
	if err != nil {
		return err
	}
	w := written{file, id, len(r.Manifest.Images), len(r.Manifest.Layers)}
	return f.print(stdout, w, func(out io.Writer) {
		fmt.Fprintf(out, "%s: cache %s: %d images with %d layers\n", w.File, report.Short(w.CacheID), w.Images, w.Layers)
	})
}
