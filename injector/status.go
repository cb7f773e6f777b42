package main

import (
	"errors"
	"fmt"
	"io"

	"github.com/spf13/cobra"

	"github.com/selkies-project/packer-plugin-selkies/injector/report"
)

func newStatusCommand(f *flags) *cobra.Command {
	return &cobra.Command{
		Use:   "status",
		Short: "What is registered, from which generation, and whether its disk is readable",
		Long: `List the images that were registered from cache disks, the generation of each,
and whether its disk can be read on this node now. The exit status is 1 if a
registered image's disk cannot be read.`,
		Example: `  selkies-image-injector status
  selkies-image-injector status --output json`,
		Args: usage(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			rt, err := openRuntime(cmd.Context(), f)
			if err != nil {
				return err
			}
			defer rt.Close()
			rs, err := rt.Status(cmd.Context())
			if err != nil {
				return err
			}
			err = f.print(cmd.OutOrStdout(), rs, func(w io.Writer) { printStatus(w, rs) })
			return errors.Join(err, unreadable(rs))
		},
	}
}

func printStatus(w io.Writer, rs []report.Registration) {
	if len(rs) == 0 {
		fmt.Fprintln(w, "nothing is registered from a cache disk")
		return
	}
	t := table(w)
	defer t.Flush()
	fmt.Fprintln(t, "IMAGE\tCACHE\tLAYERS\tREADABLE\tDISK\tNOTE")
	for _, r := range rs {
		readable := "yes"
		if !r.Readable {
			readable = "no"
		}
		fmt.Fprintf(t, "%s\t%s\t%d\t%s\t%s\t%s\n", title(r.Names), report.Short(r.CacheID), r.Layers, readable, r.Disk, r.Problem)
	}
}

// unreadable is an error for each generation whose disk cannot be read.
func unreadable(rs []report.Registration) error {
	var errs []error
	seen := map[string]bool{}
	for _, r := range rs {
		if r.Readable || seen[r.CacheID.String()] {
			continue
		}
		seen[r.CacheID.String()] = true
		errs = append(errs, fmt.Errorf("cache %s: disk not readable: %s; attach the disk and run inject, or remove its images with eject %s",
			report.Short(r.CacheID), r.Problem, r.CacheID))
	}
	return errors.Join(errs...)
}
