package main

import (
	"errors"
	"fmt"
	"io"

	"github.com/docker/go-units"
	"github.com/spf13/cobra"

	"github.com/selkies-project/packer-plugin-selkies/injector/cachedisk"
	"github.com/selkies-project/packer-plugin-selkies/injector/report"
	"github.com/selkies-project/packer-plugin-selkies/injector/verify"
)

func newVerifyCommand(f *flags) *cobra.Command {
	return &cobra.Command{
		Use:   "verify",
		Short: "Prove the cache disks' layers bit for bit",
		Long: `Rebuild each layer's tar stream from the files on the cache disk and compare its
hash with the diff ID in the image's config, then compare the files' owners, modes,
times, links and extended attributes with the stream's. Reads the whole disk, needs
no runtime and changes nothing. The exit status is 1 if a layer is damaged.`,
		Args: usage(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			disks, err := cachedisk.Find(f.caches, f.hostRoot)
			if len(disks) == 0 {
				return err
			}
			errs := []error{err}
			reports := []*report.Verify{}
			for _, d := range disks {
				r, err := verify.Disk(cmd.Context(), d, func(done, total int, bytes int64) {
					f.log.Info("verified", "disk", d.Dir, "layers", done, "of", total, "bytes", bytes)
				})
				if err != nil {
					errs = append(errs, err)
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
}

func printVerify(w io.Writer, reports []*report.Verify) {
	for _, r := range reports {
		for _, l := range r.Damaged {
			fmt.Fprintf(w, "%s: damaged %s\n", r.Dir, l.Directory)
			for _, p := range l.Problems {
				fmt.Fprintf(w, "  %s\n", report.Line(p, maxLine))
			}
		}
		fmt.Fprintf(w, "%s: cache %s: %d of %d layers are as built, %s in %d ms\n", r.Dir, report.Short(r.CacheID),
			r.Layers-len(r.Damaged), r.Layers, units.HumanSize(float64(r.Bytes)), r.Milliseconds)
	}
}
