package main

import (
	"fmt"
	"io"

	"github.com/distribution/reference"
	"github.com/spf13/cobra"

	"github.com/selkies-project/packer-plugin-selkies/injector/cachedisk"
	"github.com/selkies-project/packer-plugin-selkies/injector/report"
)

func newPlanCommand(f *flags) *cobra.Command {
	return &cobra.Command{
		Use:   "plan [REF...]",
		Short: "Change nothing; say what inject would do, or why an image is or is not served",
		Long: `Change nothing. Without references, say what inject would do. With references,
as a pod names them (tag, digest or tag@digest), say for each whether the cache
and the node have it:

  hit      a container starts without a pull
  partial  a pull would find some layers
  miss     no layer is known to be there`,
		Example: `  selkies-image-injector plan
  selkies-image-injector plan debian:12 registry.example.com/desktop:1.4`,
		Args: usage(checkReferences),
		RunE: func(cmd *cobra.Command, refs []string) error {
			if len(refs) == 0 {
				return inject(cmd, f, true, readAheadFlags{})
			}
			return plan(cmd, f, refs)
		},
	}
}

// checkReferences is the argument check of references as a pod names images.
func checkReferences(_ *cobra.Command, refs []string) error {
	for _, ref := range refs {
		if _, err := reference.ParseNormalizedNamed(ref); err != nil {
			return fmt.Errorf("reference %q: %w", ref, err)
		}
	}
	return nil
}

func plan(cmd *cobra.Command, f *flags, refs []string) error {
	return withDisks(cmd.Context(), f, func(rt runtime, disks []*cachedisk.Disk) error {
		rs, err := rt.Plan(cmd.Context(), disks, refs)
		if err != nil {
			return err
		}
		return f.print(cmd.OutOrStdout(), rs, func(w io.Writer) { printReferences(w, rs) })
	})
}

func printReferences(w io.Writer, rs []report.Reference) {
	t := table(w)
	defer t.Flush()
	fmt.Fprintln(t, "REFERENCE\tANSWER\tLAYERS\tCACHED\tWHY")
	for _, r := range rs {
		fmt.Fprintf(t, "%s\t%s\t%d\t%d\t%s\n", r.Reference, r.Cover, r.Layers, r.Cached, r.Reason)
	}
}
