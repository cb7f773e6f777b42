package main

import (
	"errors"
	"fmt"
	"io"

	"github.com/opencontainers/go-digest"
	"github.com/spf13/cobra"

	"github.com/selkies-project/packer-plugin-selkies/injector/report"
)

func newEjectCommand(f *flags) *cobra.Command {
	return &cobra.Command{
		Use:   "eject [CACHE-ID...]",
		Short: "Take back what was registered",
		Long: `Take back what inject registered: all of it, or only the generations given by
cache ID, as status prints it. Refuses, naming the container, while a container
uses one of the images; then nothing is removed. Layers that other images on the
node were built on stay, and so does the disk under them.`,
		RunE: func(cmd *cobra.Command, args []string) error {
			ids, err := cacheIDs(args)
			if err != nil {
				return err
			}
			rt, err := openRuntime(cmd.Context(), f)
			if err != nil {
				return err
			}
			defer rt.Close()
			r, err := rt.Eject(cmd.Context(), report.EjectOptions{Caches: ids})
			if r == nil {
				return err
			}
			return errors.Join(err, f.print(cmd.OutOrStdout(), r, func(w io.Writer) {
				for _, name := range r.Images {
					fmt.Fprintf(w, "removed %s\n", name)
				}
				for _, kept := range r.Kept {
					fmt.Fprintf(w, "kept %s\n", kept)
				}
				fmt.Fprintf(w, "%s: took back %d images and %d layers\n", r.Runtime, len(r.Images), r.Layers)
			}))
		},
	}
}

func cacheIDs(args []string) ([]digest.Digest, error) {
	var ids []digest.Digest
	for _, a := range args {
		id, err := digest.Parse(a)
		if err != nil {
			return nil, usageError{fmt.Errorf("cache ID %q: %w; status prints the cache IDs with --output json", a, err)}
		}
		ids = append(ids, id)
	}
	return ids, nil
}
