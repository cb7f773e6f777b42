package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"strings"
	"time"

	"k8s.io/apimachinery/pkg/util/validation"

	"github.com/selkies-project/packer-plugin-selkies/injector/cachedisk"
	"github.com/selkies-project/packer-plugin-selkies/injector/report"
)

// Defaults of the configuration.
const (
	DefaultGateDeadline   = 2 * time.Minute
	DefaultStartupTaint   = "startup-taint.cluster-autoscaler.kubernetes.io/selkies-image-cache"
	DefaultMetricsAddress = ":9797"
	DefaultGoneAfter      = 10 * time.Minute
	DefaultCheckInterval  = time.Minute
)

// Config is everything that the agent is told.
type Config struct {
	// Caches are the directories of the cache disks; without any they are looked for.
	Caches []string
	// HostRoot is where the host's root file system is mounted.
	HostRoot string
	// Open connects to the node's container runtime.
	Open func(context.Context) (Runtime, error)

	// Kubernetes is whether the node is known to a cluster. If not, nothing below up
	// to CachePD matters.
	Kubernetes bool
	// Kubeconfig is a file that says how to reach the API server; empty means as a pod.
	Kubeconfig string
	NodeName   string
	// StartupTaint is the key of the taint that keeps pods away until the gate opens.
	StartupTaint string
	// CachePD is the value of LabelCachePD; empty leaves that label out.
	CachePD string

	// GateDeadline is when the gate opens though images are not registered: so long after
	// the node joined the cluster, or after the start without one. An agent that starts
	// late has firstPass all the same.
	GateDeadline time.Duration
	// RestoreRemoved registers images again that someone removed.
	RestoreRemoved bool
	// GoneAfter is how long a disk may be unreadable before what was registered from
	// it is ejected.
	GoneAfter time.Duration
	// CheckInterval is the time from one look at the disks to the next.
	CheckInterval time.Duration
	// VerifyRate is how many bytes a second are read to prove the disks' layers, in the
	// background; 0 proves none.
	VerifyRate int64
	// ReadAhead reads the access traces of the disks' images ahead: of one disk no more than
	// ReadAheadBytes, 0 for what readahead.DefaultBytes says, and ReadAheadRate bytes a
	// second, 0 for no limit.
	ReadAhead      bool
	ReadAheadBytes int64
	ReadAheadRate  int64
	// MetricsAddress is where /healthz, /readyz and /metrics are served; empty is nowhere.
	MetricsAddress string

	Log *slog.Logger
}

// Runtime registers images with the node's container runtime.
type Runtime interface {
	Inject(ctx context.Context, disks []*cachedisk.Disk, opt report.InjectOptions) (*report.Inject, error)
	Generations(ctx context.Context) ([]report.Generation, error)
	Eject(ctx context.Context, opt report.EjectOptions) (*report.Eject, error)
	Close() error
}

// watcher is a Runtime that tells of changes to images, and can be asked whether it still
// answers. Another one is asked when there is something to do, and not kept open.
type watcher interface {
	Watch(ctx context.Context) (follow func(changed func(report.Change)) error)
	Check(ctx context.Context) error
}

// Validate names what is wrong by flag.
func (c *Config) Validate() error {
	errs := []error{atLeast("gone-after", c.GoneAfter), atLeast("check-interval", c.CheckInterval)}
	if c.MetricsAddress != "" {
		if _, _, err := net.SplitHostPort(c.MetricsAddress); err != nil {
			errs = append(errs, fmt.Errorf("--metrics-address is %q; give HOST:PORT, :PORT, or nothing to serve none", c.MetricsAddress))
		}
	}
	if c.Kubernetes {
		if problems := validation.IsValidLabelValue(c.CachePD); len(problems) > 0 {
			errs = append(errs, fmt.Errorf("--cache-pd is %q; %s", c.CachePD, strings.Join(problems, "; ")))
		}
		errs = append(errs, c.validateNode())
	}
	return errors.Join(append(errs, atLeast("gate-deadline", c.GateDeadline))...)
}

// ValidateGate is Validate for KeepGate.
func (c *Config) ValidateGate() error {
	return errors.Join(atLeast("gate-deadline", c.GateDeadline), c.validateNode())
}

func (c *Config) validateNode() error {
	var errs []error
	if c.NodeName == "" {
		errs = append(errs, errors.New("no node name: give --node-name or NODE_NAME (spec.nodeName by the downward API), or run --kubernetes=false"))
	}
	if problems := validation.IsQualifiedName(c.StartupTaint); len(problems) > 0 {
		errs = append(errs, fmt.Errorf("--startup-taint is %q; %s", c.StartupTaint, strings.Join(problems, "; ")))
	}
	return errors.Join(errs...)
}

func atLeast(flag string, value time.Duration) error {
	if value < time.Second {
		return fmt.Errorf("--%s is %v; give %v or more", flag, value, time.Second)
	}
	return nil
}
