package main

import (
	"errors"
	"fmt"
	"io"
	"regexp"
	"strings"

	"github.com/opencontainers/go-digest"
	"github.com/spf13/cobra"

	"github.com/selkies-project/packer-plugin-selkies/injector/agent"
	"github.com/selkies-project/packer-plugin-selkies/injector/report"
)

func newEjectCommand(f *flags) *cobra.Command {
	return &cobra.Command{
		Use:   "eject [CACHE-ID...]",
		Short: "Remove what was registered",
		Long: `Remove what inject registered: all of it, or only the generations given by
cache ID, whole or its beginning, as status prints it. Refuses, naming the
container, while a container uses one of the images; then nothing is removed.
Layers that other images on the node were built on stay, and so does the disk
under them. An agent that runs on the node leaves it so until it starts again.`,
		Example: `  selkies-image-injector eject
  selkies-image-injector eject 8b5024e61953`,
		Args: usage(checkCacheIDs),
		RunE: func(cmd *cobra.Command, args []string) error {
			rt, err := openRuntime(cmd.Context(), f)
			if err != nil {
				return err
			}
			defer rt.Close()
			registered, err := rt.Generations(cmd.Context())
			if err != nil {
				return err
			}
			ids, err := cacheIDs(args, registered)
			if err != nil {
				return err
			}
			undo, err := noteEjected(f.hostRoot, ids, registered)
			if err != nil {
				return err
			}
			r, err := rt.Eject(cmd.Context(), report.EjectOptions{Caches: ids})
			if err != nil {
				err = errors.Join(err, undo())
			}
			if errors.Is(err, report.ErrUnknownCache) {
				return usageError{err}
			}
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
				fmt.Fprintf(w, "%s: ejected %d images and %d layers\n", r.Runtime, len(r.Images), r.Layers)
			}))
		},
	}
}

// noteEjected tells an agent that runs on this node what is ejected.
func noteEjected(hostRoot string, ids []digest.Digest, registered []report.Generation) (undo func() error, err error) {
	if len(ids) == 0 {
		for _, g := range registered {
			ids = append(ids, g.CacheID)
		}
	}
	return agent.NoteEjected(hostRoot, ids)
}

// cacheID is a cache ID, or the beginning of one, with or without the algorithm.
var cacheID = regexp.MustCompile(`^(sha256:)?([0-9a-f]{1,64})$`)

// checkCacheIDs is the argument check of cache IDs.
func checkCacheIDs(_ *cobra.Command, args []string) error {
	for _, a := range args {
		if !cacheID.MatchString(a) {
			return fmt.Errorf("cache ID %q: not a SHA-256 digest, or the beginning of one; status prints the cache IDs", a)
		}
	}
	return nil
}

// cacheIDs are the cache IDs that args name, each whole or by a beginning that no other
// registered generation has.
func cacheIDs(args []string, registered []report.Generation) ([]digest.Digest, error) {
	var ids []digest.Digest
	for _, a := range args {
		id := digest.NewDigestFromEncoded(digest.SHA256, cacheID.ReplaceAllString(a, "$2"))
		if id.Validate() == nil {
			// The runtime judges: it also knows what is left of an eject that was killed.
			ids = append(ids, id)
			continue
		}
		var found []string
		for _, g := range registered {
			if strings.HasPrefix(g.CacheID.String(), id.String()) {
				found = append(found, g.CacheID.String())
			}
		}
		switch len(found) {
		case 0:
			return nil, usageError{fmt.Errorf("cache %s: %w", a, report.ErrUnknownCache)}
		case 1:
			ids = append(ids, digest.Digest(found[0]))
		default:
			return nil, usageError{fmt.Errorf("cache ID %q begins those of %s; give more of it", a, strings.Join(found, " and "))}
		}
	}
	return ids, nil
}
