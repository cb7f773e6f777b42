// Command selkies-image-injector makes the container images of a cache disk known
// to a node's container runtime: no pull, no copy, and on containerd no restart.
//
//	selkies-image-injector run              the node agent: inject, then gate, watch, heal, report
//	selkies-image-injector gate             open the node's gate at its deadline where run cannot start
//	selkies-image-injector inject           register everything on the cache disks
//	selkies-image-injector plan [REF...]    change nothing; say what inject would do, and why
//	selkies-image-injector status           what is registered, and whether its disk is readable
//	selkies-image-injector verify           prove the disks' layers bit for bit
//	selkies-image-injector report           draw what a cache disk holds, as one HTML page
//	selkies-image-injector trace IMAGE      record what a start of an image reads, on the build VM
//	selkies-image-injector eject [ID...]    remove what was registered
//	selkies-image-injector version
//
// A cache disk is a directory with a selkies-image-cache/manifest.json, the layer
// manifest, that the Packer provisioner selkies-image-cache wrote. Without
// --cache it is looked for in /cache and in every directory below
// /mnt/disks/gke-secondary-disks. The disk is only read.
//
// It needs root on the node. In a container it needs CAP_SYS_ADMIN, CAP_SYS_CHROOT,
// CAP_SYS_PTRACE and the host's /proc: as proc below --host-root, or its own in the
// host's PID namespace. The runtime's socket is then below proc/1/root as well.
// The node's own mounts are the only thing it leaves running: none of its
// processes is needed once it has ended.
//
// Every flag is an environment variable too: SELKIES_HOST_ROOT for --host-root, and
// SELKIES_CACHE separates directories by colons. The command line wins.
//
// SIGINT or SIGTERM end it in order, a second one at once; the next run completes what
// was begun.
//
// Exit status: 0 done; 1 failed, with nothing half-visible; 2 wrong usage. Each
// error is one line on stderr that names the thing and the remedy.
package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"reflect"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/selkies-project/packer-plugin-selkies/internal/coredump"
	"github.com/selkies-project/packer-plugin-selkies/internal/printable"
	"github.com/selkies-project/packer-plugin-selkies/version"
)

func main() {
	// The agent's memory holds the token of its service account.
	if err := coredump.Forbid(); err != nil {
		os.Exit(exitStatus(err))
	}
	os.Exit(exitStatus(newCommand().ExecuteContext(interruptible())))
}

// interruptible is cancelled by SIGINT or SIGTERM. A second one does what it does to any
// program: a device that hangs may keep the first one waiting.
func interruptible() context.Context {
	ctx, cancel := context.WithCancel(context.Background())
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	go func() {
		<-signals
		signal.Stop(signals)
		cancel()
	}()
	return ctx
}

func newCommand() *cobra.Command {
	var f flags
	var showVersion bool
	root := &cobra.Command{
		Use:   "selkies-image-injector",
		Short: "Make the images of a cache disk known to this node's container runtime",
		Long: `Make the container images of a cache disk known to this node's container
runtime. The layers stay on the disk, which is only read: no pull, no copy, and
on containerd no restart.

Every flag is an environment variable too, SELKIES_HOST_ROOT for --host-root, and
SELKIES_CACHE separates directories by colons. The command line wins.`,
		Example: `  selkies-image-injector plan
  selkies-image-injector inject --cache /mnt/disks/images
  selkies-image-injector plan registry.example.com/desktop:1.4
  selkies-image-injector eject`,
		SilenceUsage:  true,
		SilenceErrors: true,
		Args:          usage(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if showVersion {
				fmt.Fprintln(cmd.OutOrStdout(), version.String())
				return nil
			}
			return cmd.Help()
		},
		PersistentPreRunE: func(cmd *cobra.Command, _ []string) error {
			if err := environment(cmd.Flags()); err != nil {
				return err
			}
			return f.validate()
		},
	}
	root.SetFlagErrorFunc(func(cmd *cobra.Command, err error) error {
		return usageError{fmt.Errorf("%w; see %s --help", err, cmd.CommandPath())}
	})
	// Cobra's own flag takes a template for this, and templates have the linker keep every
	// method of the program.
	root.Flags().BoolVarP(&showVersion, "version", "v", false, "version for "+root.Name())
	root.CompletionOptions.HiddenDefaultCmd = true
	f.register(root.PersistentFlags())
	root.AddCommand(
		newRunCommand(&f),
		newGateCommand(&f),
		newInjectCommand(&f),
		newPlanCommand(&f),
		newStatusCommand(&f),
		newVerifyCommand(&f),
		newReportCommand(&f),
		newTraceCommand(&f),
		newEjectCommand(&f),
		newVersionCommand(&f),
	)
	return root
}

// usageError is what the caller wrote wrong on the command line.
type usageError struct{ error }

func (e usageError) Unwrap() error { return e.error }

// usage makes the errors of an argument check usage errors.
func usage(check cobra.PositionalArgs) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		if err := check(cmd, args); err != nil {
			return usageError{fmt.Errorf("%w; see %s --help", err, cmd.CommandPath())}
		}
		return nil
	}
}

// maxLine bounds one error, in bytes: it may name hundreds of images or containers.
const maxLine = 16 << 10

// exitStatus prints err, a line for each error in it, and gives the status.
func exitStatus(err error) int {
	if err == nil {
		return 0
	}
	for _, e := range flatten(err) {
		fmt.Fprintf(os.Stderr, "selkies-image-injector: %s\n", printable.Line(e.Error(), maxLine))
	}
	if errors.As(err, new(usageError)) {
		return 2
	}
	return 1
}

// joined is the type of what errors.Join returns. fmt.Errorf with several %w unwraps to
// several errors too, but is one.
var joined = reflect.TypeOf(errors.Join(errors.ErrUnsupported))

// flatten is the errors that errors.Join put together.
func flatten(err error) []error {
	if reflect.TypeOf(err) != joined {
		return []error{err}
	}
	var all []error
	for _, e := range err.(interface{ Unwrap() []error }).Unwrap() {
		all = append(all, flatten(e)...)
	}
	return all
}

func newLogger(level slog.Level) *slog.Logger {
	return slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: level}))
}
