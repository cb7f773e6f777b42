package main

import (
	"context"
	"log/slog"

	"github.com/spf13/cobra"

	"github.com/selkies-project/packer-plugin-selkies/injector/agent"
	"github.com/selkies-project/packer-plugin-selkies/injector/containerd"
	"github.com/selkies-project/packer-plugin-selkies/injector/docker"
)

func newRunCommand(f *flags) *cobra.Command {
	var c agent.Config
	var verifyRate byteCount
	var ahead readAheadFlags
	cmd := &cobra.Command{
		Use:   "run",
		Short: "Run on a node for good: inject, then open the gate, watch, heal and report",
		Long: `Register every image of the cache disks, open the gate that keeps pods off the
node until then, and stay: put back what a pull, a reboot, or a new containerd took
away, eject everything when a disk is gone for good, and report. The gate opens
at its deadline too, counted from when the node joined the cluster, but not in the
first 20 seconds after the start, so that no node waits for ever: pods then pull.

Disks and the runtime may come later. With containerd an image that someone removes
stays removed until the next start. With Docker, which tells of no changes to its
store, images are registered at start and when a disk comes; a running dockerd is
restarted only as inject would.

What the starts of images read, by the access traces that the disk has, is read ahead
once a boot, the images first that pods wait for.

Logs at level info by default. SIGTERM ends it at once and changes nothing on the
node.`,
		Example: `  selkies-image-injector run --gate-deadline 5m --gone-after 30m
  selkies-image-injector run --kubernetes=false --cache /mnt/disks/images`,
		Args: usage(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if !cmd.Flags().Changed("log-level") {
				f.log = newLogger(slog.LevelInfo)
			}
			c.Caches, c.HostRoot, c.Log = f.caches, f.hostRoot, f.log
			c.Open, c.VerifyRate = opener(f), int64(verifyRate)
			c.ReadAhead, c.ReadAheadBytes, c.ReadAheadRate = ahead.on, int64(ahead.bytes), int64(ahead.rate)
			if err := c.Validate(); err != nil {
				return usageError{err}
			}
			if err := checkRoot(); err != nil {
				return err
			}
			return agent.Run(cmd.Context(), c)
		},
	}
	fs := cmd.Flags()
	fs.BoolVar(&c.Kubernetes, "kubernetes", true, "keep the node's taint, labels and condition, and record events; off without a cluster")
	fs.StringVar(&c.CachePD, "cache-pd", "", "`value` of the label "+agent.LabelCachePD+" (default none)")
	gateFlags(fs, &c)
	fs.BoolVar(&c.RestoreRemoved, "restore-removed", false, "register images again that someone removed")
	fs.DurationVar(&c.GoneAfter, "gone-after", agent.DefaultGoneAfter, "how long a disk may be unreadable before its images are ejected")
	fs.DurationVar(&c.CheckInterval, "check-interval", agent.DefaultCheckInterval, "time from one look at the disks to the next")
	fs.Var(&verifyRate, "verify-rate", "prove the disks' layers in the background, reading as many `bytes` a second, as in 20MB; needs CAP_DAC_READ_SEARCH; 0 proves none")
	ahead.register(fs, true)
	fs.StringVar(&c.MetricsAddress, "metrics-address", agent.DefaultMetricsAddress, "`address` of /metrics, /healthz and /readyz; empty for none")
	return cmd
}

// opener connects to the runtime that the flags ask for, and from then on to that
// kind only: while containerd restarts, a Docker beside it is not what pods use.
func opener(f *flags) func(context.Context) (agent.Runtime, error) {
	fixed := *f
	return func(ctx context.Context) (agent.Runtime, error) {
		rt, err := openRuntime(ctx, &fixed)
		if err != nil {
			return nil, err
		}
		switch rt := rt.(type) {
		case *containerd.Runtime:
			fixed.runtime, fixed.containerdNamespace = runtimeContainerd, rt.Namespace()
		case *docker.Runtime:
			fixed.runtime = runtimeDocker
		}
		return rt, nil
	}
}
