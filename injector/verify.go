package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"

	"github.com/docker/go-units"
	"github.com/spf13/cobra"

	"github.com/selkies-project/packer-plugin-selkies/injector/cachedisk"
	"github.com/selkies-project/packer-plugin-selkies/injector/report"
	"github.com/selkies-project/packer-plugin-selkies/injector/verify"
	"github.com/selkies-project/packer-plugin-selkies/internal/printable"
)

func newVerifyCommand(f *flags) *cobra.Command {
	var opt verify.Options
	var limit byteCount
	cmd := &cobra.Command{
		Use:   "verify",
		Short: "Prove the cache disks' layers bit for bit",
		Long: `Rebuild each layer's tar stream from the files on the cache disk and compare its
hash with the diff ID in the image's config, then compare the files' owners, modes,
times, links and extended attributes with the stream's. Compressed layers that the disk
keeps must hash to their digests. Reads the whole disk, needs no runtime and changes
nothing. The exit status is 1 if a layer is damaged; each damaged file is named.

With --resume FILE an interrupted run is continued: FILE notes the layers that are
proved, and is removed in the end. The log, at level info by default, tells how far
it is.`,
		Example: `  selkies-image-injector verify --cache /mnt/disks/images
  selkies-image-injector verify --rate 50MB --resume /var/tmp/proved`,
		Args: usage(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if !cmd.Flags().Changed("log-level") {
				f.log = newLogger(slog.LevelInfo)
			}
			opt.Rate = int64(limit)
			disks, err := cachedisk.FindAll(f.caches, f.hostRoot)
			if len(disks) == 0 {
				return err
			}
			if opt.Resume != "" && len(disks) > 1 {
				return usageError{fmt.Errorf("--resume notes the layers of one disk, there are %d; choose one with --cache", len(disks))}
			}
			errs := []error{err}
			reports := []*report.Verify{}
			for _, d := range disks {
				r, err := f.verify(cmd.Context(), d, opt)
				errs = append(errs, err)
				if r == nil {
					continue
				}
				reports = append(reports, r)
				for _, l := range r.Damaged {
					errs = append(errs, fmt.Errorf("cache disk %s: layer %s in %s is damaged: %s; build the disk again",
						d.Dir, report.Short(l.DiffID), l.Directory, l.Problems[0]))
				}
			}
			errs = append(errs, f.print(cmd.OutOrStdout(), reports, func(w io.Writer) { printVerify(w, reports) }))
			return errors.Join(errs...)
		},
	}
	cmd.Flags().StringVar(&opt.Resume, "resume", "", "`file` that notes what is proved, for an interrupted run to go on from")
	cmd.Flags().Var(&limit, "rate", "most that is read, in `bytes` a second, as in 50MB; 0 is as fast as the disk allows")
	return cmd
}

// verify verifies one disk.
func (f *flags) verify(ctx context.Context, d *cachedisk.Disk, opt verify.Options) (*report.Verify, error) {
	opt.Progress = func(p verify.Progress) {
		f.log.Info("verified", "disk", d.Dir, "layers", p.Layers, "of", p.Of,
			"bytes", units.HumanSize(float64(p.Bytes)), "total", units.HumanSize(float64(p.Total)))
	}
	r, err := verify.Disk(ctx, d, opt)
	if err == nil && opt.Resume != "" {
		err = os.Remove(opt.Resume)
	}
	return r, err
}

// byteCount is a flag for bytes, or bytes a second.
type byteCount int64

func (b *byteCount) String() string { return units.HumanSize(float64(*b)) }
func (b *byteCount) Type() string   { return "bytes" }

// Set takes a number with a unit or without.
func (b *byteCount) Set(s string) error {
	n, err := units.FromHumanSize(s)
	if err == nil && n < 0 {
		err = errors.New("it is negative")
	}
	*b = byteCount(n)
	return err
}

func printVerify(w io.Writer, reports []*report.Verify) {
	for _, r := range reports {
		for _, l := range r.Damaged {
			fmt.Fprintf(w, "%s: damaged %s\n", r.Dir, l.Directory)
			for _, p := range l.Problems {
				fmt.Fprintf(w, "  %s\n", printable.Line(p, maxLine))
			}
		}
		fmt.Fprintf(w, "%s: cache %s: %d of %d layers are as built, %s in %d ms\n", r.Dir, report.Short(r.CacheID),
			r.Layers-len(r.Damaged), r.Layers, units.HumanSize(float64(r.Bytes)), r.Milliseconds)
		if r.Resumed > 0 {
			fmt.Fprintf(w, "%s: %d of them were proved by the run before\n", r.Dir, r.Resumed)
		}
	}
}
