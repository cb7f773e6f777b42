// Package docker registers the images of a cache disk in the store of Docker's
// overlay2 graph driver.
//
// dockerd reads its store only at start. So everything is prepared while it runs,
// then it is stopped, the prepared entries are renamed into place, and it is
// started again: its pause is that of a restart, and there is none if nothing is
// missing. A daemon that does not run is not started.
//
// A layer becomes a directory of its own in the store, whose diff alone is a
// symbolic link (or, on request, a bind mount) to the layer's files on the cache
// disk, which is mounted below [StateDir]. What belongs to us can be told from the
// objects themselves, so that it goes when dockerd removes them: a layer's
// directory name follows from its chain ID, and an image has a file
// selkies-image-cache among its metadata. Names and distribution metadata, which
// cannot be told apart, are listed in a record per generation, in the directory
// image/overlay2/selkies-image-cache of Docker's data root.
//
// Mounts do not survive a reboot. Until the disk is mounted again, by the system or
// by an inject before docker.service, containers fail to start; then they start
// without a restart of dockerd.
//
// Bind mounts ([LinkBind]) are for set-ups that rely on them, and not safe: dockerd
// takes them down whenever it stops, and a container whose layer's mount is gone starts
// all the same, with that layer silently empty. With them inject must be run after each
// boot and each stop of dockerd, before dockerd starts.
package docker

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"time"

	"github.com/docker/docker/api/types/system"
	"github.com/docker/docker/client"

	"github.com/selkies-project/packer-plugin-selkies/injector/cachedisk"
)

const (
	// DefaultRoot is Docker's data root if neither an option nor a daemon says.
	DefaultRoot = "/var/lib/docker"

	// StateDir is where the cache disks are mounted on the node, each in a
	// directory named after its cache ID.
	StateDir = "/var/lib/selkies-image-cache"

	// ContainerdNamespace is where Docker's containerd image store keeps its images.
	ContainerdNamespace = "moby"
)

// The values of Options.Link.
const (
	LinkSymlink = "symlink"
	LinkBind    = "bind"
)

// What Kind returns for the two stores that images can be registered in; for
// others it returns the storage driver's name.
const (
	KindOverlay2   = "overlay2"
	KindContainerd = "containerd"
)

// Options say which Docker to serve and how.
type Options struct {
	// Root is Docker's data root on the host; empty means the running daemon's,
	// or DefaultRoot.
	Root string
	// Host is the daemon's address; empty means client.DefaultDockerHost.
	Host string
	// HostRoot is where the host's root file system is mounted; empty means "/".
	HostRoot string
	// Link is how a layer is reached: LinkSymlink (also if empty) or LinkBind.
	Link string
	// RestartRunning allows the restart of a daemon that runs containers without
	// live-restore, which ends them.
	RestartRunning bool
	Log            *slog.Logger
}

// Runtime is one Docker whose overlay2 store images are registered in.
type Runtime struct {
	opt  Options
	cli  *client.Client
	info *system.Info // nil if the daemon does not run
	store
}

// Kind says which kind of store the daemon at host has. The error is for a daemon
// that does not answer.
func Kind(ctx context.Context, host string) (string, error) {
	cli, err := connect(host)
	if err != nil {
		return "", err
	}
	defer cli.Close()
	info, err := daemonInfo(ctx, cli)
	if err != nil {
		return "", err
	}
	return kind(info), nil
}

// kind knows the containerd image store by the driver type, which Docker reports
// since that store exists.
func kind(info *system.Info) string {
	for _, s := range info.DriverStatus {
		if s[0] == "driver-type" && strings.HasPrefix(s[1], "io.containerd.snapshotter.") {
			return KindContainerd
		}
	}
	return info.Driver
}

// New finds the Docker that opt names and refuses one whose store it cannot
// serve. It starts nothing and writes nothing.
func New(ctx context.Context, opt Options) (*Runtime, error) {
	if os.Geteuid() != 0 {
		return nil, errors.New("not root: Docker's store is root's; run with sudo, or as a privileged container")
	}
	if opt.HostRoot == "" {
		opt.HostRoot = "/"
	}
	if opt.Link == "" {
		opt.Link = LinkSymlink
	}
	if opt.Log == nil {
		opt.Log = slog.New(slog.DiscardHandler)
	}
	cli, err := connect(opt.Host)
	if err != nil {
		return nil, err
	}
	r := &Runtime{opt: opt, cli: cli}
	if err := r.open(ctx); err != nil {
		cli.Close()
		return nil, err
	}
	return r, nil
}

// open asks the daemon, if there is one, and finds its store.
func (r *Runtime) open(ctx context.Context) error {
	root := r.opt.Root
	r.info = nil
	info, err := daemonInfo(ctx, r.cli)
	switch {
	case err == nil:
		if err := servable(info); err != nil {
			return err
		}
		if root != "" && filepath.Clean(root) != filepath.Clean(info.DockerRootDir) {
			return fmt.Errorf("docker at %s has its data root at %s, not at %s; leave --docker-root out, or name that daemon with --docker-host",
				r.cli.DaemonHost(), info.DockerRootDir, root)
		}
		r.info, root = info, info.DockerRootDir
	case !client.IsErrConnectionFailed(err):
		return err
	}
	if root == "" {
		root = DefaultRoot
	}
	r.store = store{hostRoot: r.opt.HostRoot, root: filepath.Clean(root)}
	err = r.store.check()
	if r.info != nil && errors.Is(err, errNoStore) {
		// The daemon has one; this process looks for it in another place.
		return fmt.Errorf("docker data root %s is not to be found: %w", r.root, cachedisk.Explain(syscall.ENOENT))
	}
	return err
}

// Close closes the connection to the daemon.
func (r *Runtime) Close() error { return r.cli.Close() }

func connect(host string) (*client.Client, error) {
	opts := []client.Opt{client.WithAPIVersionNegotiation(), client.WithTimeout(callTime)}
	if host != "" {
		opts = append(opts, client.WithHost(host))
	}
	cli, err := client.NewClientWithOpts(opts...)
	if err != nil {
		return nil, fmt.Errorf("connecting to docker at %q: %w", host, err)
	}
	return cli, nil
}

func daemonInfo(ctx context.Context, cli *client.Client) (*system.Info, error) {
	ctx, cancel := context.WithTimeout(ctx, infoTime)
	defer cancel()
	info, err := cli.Info(ctx)
	if err != nil {
		return nil, fmt.Errorf("asking docker at %s: %w", cli.DaemonHost(), explain(err))
	}
	return &info, nil
}

const (
	// infoTime bounds the first call to dockerd, which tells whether it answers at all.
	infoTime = 30 * time.Second
	// callTime bounds every call to dockerd, so that one that hangs ends the run and frees
	// the lock. What is asked takes milliseconds, but the removal of a large image that the
	// node has pulled itself can take many seconds.
	callTime = 3 * time.Minute
)

// explain says what to do about a daemon that hangs.
func explain(err error) error {
	if errors.Is(err, context.DeadlineExceeded) {
		return fmt.Errorf("it does not answer: %w; look at journalctl -u docker, and restart it", err)
	}
	return err
}

// servable refuses daemons whose store would not take linked layers as they are.
func servable(info *system.Info) error {
	switch k := kind(info); k {
	case KindOverlay2:
	case KindContainerd:
		return fmt.Errorf("docker has the containerd image store; use --runtime containerd --containerd-namespace %s", ContainerdNamespace)
	default:
		return fmt.Errorf("docker's storage driver is %s; only overlay2 can take layers from a cache disk, set \"storage-driver\": \"overlay2\" in daemon.json", k)
	}
	for _, o := range info.SecurityOptions {
		switch {
		case strings.HasPrefix(o, "name=userns"):
			return errors.New("docker runs with userns-remap, whose layers have shifted owners; remove userns-remap from daemon.json to use a cache disk")
		case strings.HasPrefix(o, "name=rootless"):
			return errors.New("docker runs rootless, where layers belong to another user; use a cache disk with a rootful docker")
		}
	}
	return nil
}

// remapped is the name of the data root's sub-directory that a daemon with
// userns-remap uses: the first uid and gid of its range.
var remapped = regexp.MustCompile(`^[0-9]+\.[0-9]+$`)
