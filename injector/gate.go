package main

import (
	"log/slog"
	"os"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/selkies-project/packer-plugin-selkies/injector/agent"
)

func newGateCommand(f *flags) *cobra.Command {
	var c agent.Config
	cmd := &cobra.Command{
		Use:   "gate",
		Short: "Open a node's gate at its deadline, also where run cannot start",
		Long: `Remove the startup taint of a node 30 seconds after the deadline, unless run has done
so before, and from then on whenever it comes back. The deadline counts from when the
node joined the cluster. Kubelet does not start a pod whose volume claim cannot be
attached: on such a node run never starts, and without this the taint would keep pods
away for ever, as it would where run ends again and again. It needs the API server and
nothing of the node, no root and no capability, and registers nothing.`,
		Example: `  selkies-image-injector gate --node-name node-1 --kubeconfig kubeconfig --gate-deadline 5m`,
		Args:    usage(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if !cmd.Flags().Changed("log-level") {
				f.log = newLogger(slog.LevelInfo)
			}
			c.Log = f.log
			if err := c.ValidateGate(); err != nil {
				return usageError{err}
			}
			return agent.KeepGate(cmd.Context(), c)
		},
	}
	gateFlags(cmd.Flags(), &c)
	return cmd
}

// gateFlags are those of the commands that open the gate.
func gateFlags(fs *pflag.FlagSet, c *agent.Config) {
	fs.StringVar(&c.Kubeconfig, "kubeconfig", "", "`file` that says how to reach the API server (default as a pod)")
	fs.StringVar(&c.NodeName, "node-name", os.Getenv("NODE_NAME"), "the node's `name` in the cluster; NODE_NAME says it as well")
	fs.StringVar(&c.StartupTaint, "startup-taint", agent.DefaultStartupTaint, "`key` of the taint that the gate removes")
	fs.DurationVar(&c.GateDeadline, "gate-deadline", agent.DefaultGateDeadline, "how long after the node joined the cluster the gate opens though images are not registered")
}
