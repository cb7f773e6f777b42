package main

import (
	"errors"
	"fmt"
	"io"
	"strconv"

	"github.com/spf13/cobra"

	"github.com/selkies-project/packer-plugin-selkies/injector/agent"
	"github.com/selkies-project/packer-plugin-selkies/injector/cachedisk"
	"github.com/selkies-project/packer-plugin-selkies/injector/report"
)

func newInjectCommand(f *flags) *cobra.Command {
	var ahead readAheadFlags
	cmd := &cobra.Command{
		Use:   "inject",
		Short: "Register everything on the cache disks, once",
		Long: `Register every image of the cache disks with the node's container runtime.

containerd is served while it runs. Docker's graph driver reads its store only at
start: a running dockerd is stopped and started through systemd, and only if
something is missing. What the node has wins: an image that is there under the
same name is left alone and reported.

A second run changes nothing. A run that was killed is completed by the next.

With --read-ahead it reads meanwhile what the starts of the images are going to read, by
the access traces that the disk has, and ends when that has been read too.`,
		Example: `  selkies-image-injector inject --cache /mnt/disks/images
  selkies-image-injector inject --runtime containerd --containerd-namespace moby
  selkies-image-injector inject --read-ahead --read-ahead-rate 50MB`,
		Args: usage(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return inject(cmd, f, false, ahead)
		},
	}
	ahead.register(cmd.Flags(), false)
	return cmd
}

// inject registers the disks, or with dryRun says what that would do, and reads ahead
// meanwhile.
func inject(cmd *cobra.Command, f *flags, dryRun bool, ahead readAheadFlags) error {
	return withDisks(cmd.Context(), f, func(rt runtime, disks []*cachedisk.Disk) (err error) {
		read := make(chan error, 1)
		go func() { read <- ahead.read(cmd.Context(), f, disks) }()
		defer func() { err = errors.Join(err, <-read) }()
		if !dryRun {
			for _, d := range disks {
				if err := agent.ForgetEjected(f.hostRoot, d.ID); err != nil {
					return err
				}
			}
		}
		r, err := rt.Inject(cmd.Context(), disks, report.InjectOptions{DryRun: dryRun})
		if r == nil {
			return err
		}
		return errors.Join(err, f.print(cmd.OutOrStdout(), r, func(w io.Writer) { printInject(w, r, dryRun) }))
	})
}

func printInject(w io.Writer, r *report.Inject, dryRun bool) {
	registered := "REGISTERED"
	if dryRun {
		registered = "MISSING"
	}
	for _, d := range r.Disks {
		fmt.Fprintf(w, "%s: cache %s of %s\n", d.Dir, report.Short(d.CacheID), d.Created.Format("2006-01-02 15:04 MST"))
		t := table(w)
		fmt.Fprintf(t, "IMAGE\tSTATE\tLAYERS\t%s\tPRESENT\tMS\tNOTE\n", registered)
		for _, img := range d.Images {
			state := string(img.State)
			if dryRun && img.State == report.Registered {
				state = "to register"
			}
			ms := ""
			if img.Milliseconds > 0 {
				ms = strconv.FormatInt(img.Milliseconds, 10)
			}
			fmt.Fprintf(t, "%s\t%s\t%d\t%d\t%d\t%s\t%s\n", title(img.Names), state, img.Layers,
				img.Registered, img.Present, ms, img.Reason)
		}
		t.Flush()
	}
	verb := "registered"
	if dryRun {
		verb = "would register"
	}
	var layers, present, images int
	for _, d := range r.Disks {
		layers += d.Registered
		present += d.Present
		for _, img := range d.Images {
			if img.State == report.Registered {
				images++
			}
		}
	}
	restart := ""
	switch {
	case r.Restart && dryRun:
		restart = "; docker would be restarted"
	case r.Restart:
		restart = "; docker was restarted"
	}
	fmt.Fprintf(w, "%s: %s %d images and %d layers, %d layers already there, in %d ms%s\n",
		r.Runtime, verb, images, layers, present, r.Milliseconds, restart)
	if r.Refusal != "" {
		fmt.Fprintf(w, "%s: inject would refuse: %s\n", r.Runtime, r.Refusal)
	}
}

// title is an image's best name, and how many more it has.
func title(names []string) string {
	if len(names) < 2 {
		return report.Title(names)
	}
	return fmt.Sprintf("%s (+%d)", report.Title(names), len(names)-1)
}
