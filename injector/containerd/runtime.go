// Package containerd registers the images of cache disks with a running
// containerd, without a pull and without a restart.
//
// A layer becomes a committed snapshot whose fs directory is a relative symbolic
// link into the anchor: a snapshot of our own on which the cache disk is mounted.
// docs/architecture.md says why. What was registered carries labels that begin
// with selkies.io/image-cache, and only what carries them is ever ejected.
package containerd

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"

	"github.com/selkies-project/packer-plugin-selkies/injector/cachedisk"
)

const (
	// criNamespace is where containerd's CRI plugin keeps its images.
	criNamespace = "k8s.io"

	// snapshotter is the only one whose snapshots are plain directories that
	// overlayfs looks up by path at mount time.
	snapshotter       = "overlayfs"
	snapshotterPlugin = "io.containerd.snapshotter.v1"
	contentPlugin     = "io.containerd.content.v1"
)

// Labels of what is ours.
const (
	// labelCache names the generation, on snapshots, image records and leases.
	labelCache = "selkies.io/image-cache.id"
	// labelTarget is the digest that an image record of ours leads to.
	labelTarget = "selkies.io/image-cache.target"
	// labelCreated is when the anchor's generation was recorded, as RFC 3339.
	labelCreated = "selkies.io/image-cache.created"
	// labelDir is a snapshot's directory below <snapshotter root>/snapshots, which
	// the API gives only while a snapshot is being prepared.
	labelDir = "selkies.io/image-cache.dir"
	// labelAnchor sets the anchor apart from the layers.
	labelAnchor = "selkies.io/image-cache.anchor"
)

// Options say which containerd to register with.
type Options struct {
	// Address is containerd's socket as this process sees it, an absolute path.
	Address string
	// Namespace is k8s.io for the CRI, moby for Docker's containerd image store.
	Namespace string
	// HostRoot is where the host's root is mounted, with what is mounted below it.
	HostRoot string
	Log      *slog.Logger
}

// Runtime is a connection to a containerd that can be registered with.
type Runtime struct {
	opt    Options
	client *client.Client

	snapshots snapshots.Snapshotter
	content   content.Store
	images    images.Store
	leases    leases.Manager

	// root and contentRoot are host paths.
	root        string
	contentRoot string
}

// New connects to containerd and makes sure that its images are kept by the
// overlayfs snapshotter.
func New(ctx context.Context, opt Options) (*Runtime, error) {
	if opt.Log == nil {
		opt.Log = slog.New(slog.DiscardHandler)
	}
	if err := dial(ctx, opt.Address); err != nil {
		return nil, err
	}
	c, err := client.New(opt.Address, client.WithDefaultNamespace(opt.Namespace), client.WithExtraDialOpts(bounded(limit)))
	if err != nil {
		return nil, fmt.Errorf("connecting to containerd at %s: %w", opt.Address, err)
	}
	r := &Runtime{
		opt:       opt,
		client:    c,
		snapshots: c.SnapshotService(snapshotter),
		content:   c.ContentStore(),
		images:    c.ImageService(),
		leases:    c.LeasesService(),
	}
	if err := r.check(r.context(ctx)); err != nil {
		c.Close()
		return nil, err
	}
	return r, nil
}

// Close ends the connection.
func (r *Runtime) Close() error { return r.client.Close() }

// Namespace is the one that images are registered in.
func (r *Runtime) Namespace() string { return r.opt.Namespace }

// name is how reports call this runtime.
func (r *Runtime) name() string { return "containerd/" + r.opt.Namespace }

func (r *Runtime) context(ctx context.Context) context.Context {
	return namespaces.WithNamespace(ctx, r.opt.Namespace)
}

// check finds the stores' directories and refuses a node whose pods would not
// use what is registered.
func (r *Runtime) check(ctx context.Context) error {
	var err error
	if r.root, err = r.pluginRoot(ctx, snapshotterPlugin, snapshotter); err != nil {
		return err
	}
	if r.contentRoot, err = r.pluginRoot(ctx, contentPlugin, "content"); err != nil {
		return err
	}
	if r.opt.Namespace == criNamespace {
		if err := r.checkCRI(ctx); err != nil {
			return err
		}
	}
	dir := r.host(r.root)
	if _, err := os.Stat(dir); err != nil {
		return fmt.Errorf("looking at containerd's directory %s: %w", r.root, cachedisk.Explain(err))
	}
	return nil
}

func (r *Runtime) pluginRoot(ctx context.Context, typ, id string) (string, error) {
	resp, err := r.client.IntrospectionService().Plugins(ctx, fmt.Sprintf("type==%s,id==%s", typ, id))
	if err != nil {
		return "", fmt.Errorf("asking containerd at %s for its plugins: %w", r.opt.Address, r.explain(err))
	}
	for _, p := range resp.Plugins {
		if p.InitErr != nil {
			return "", fmt.Errorf("containerd's plugin %s.%s is not available: %s", typ, id, p.InitErr.Message)
		}
		if root := p.Exports["root"]; filepath.IsAbs(root) {
			return root, nil
		}
	}
	return "", fmt.Errorf("containerd at %s has no plugin %s.%s: enable it in containerd's configuration", r.opt.Address, typ, id)
}

// checkCRI refuses a CRI whose images are kept by another snapshotter, such as
// image streaming's gcfs. The file system that the CRI reports for images is the
// snapshotter's directory, in every version since 1.0; the configuration that
// its Status gives has moved between versions.
func (r *Runtime) checkCRI(ctx context.Context) error {
	resp, err := cri.NewImageServiceClient(r.conn()).ImageFsInfo(ctx, &cri.ImageFsInfoRequest{})
	if err = errdefsFromGRPC(err); errdefs.IsNotImplemented(err) {
		r.opt.Log.Warn("containerd has no CRI plugin; registering all the same", "address", r.opt.Address)
		return nil
	}
	if err != nil {
		return fmt.Errorf("asking the CRI at %s for its snapshotter: %w", r.opt.Address, r.explain(err))
	}
	// The first entry is the default snapshotter's.
	if len(resp.ImageFilesystems) == 0 || resp.ImageFilesystems[0].FsId == nil {
		return fmt.Errorf("the CRI at %s reports no image file system", r.opt.Address)
	}
	dir := resp.ImageFilesystems[0].FsId.Mountpoint
	if dir != r.root && filepath.Base(dir) != snapshotterPlugin+"."+snapshotter {
		return fmt.Errorf("%w: the node's snapshotter is %s, not %s: pods would not use registered layers; turn image streaming off or choose a node pool with %s",
			ErrSnapshotter, strings.TrimPrefix(filepath.Base(dir), snapshotterPlugin+"."), snapshotter, snapshotter)
	}
	return nil
}

func (r *Runtime) conn() grpc.ClientConnInterface {
	return r.client.Conn().(grpc.ClientConnInterface)
}

// host is where this process reaches a path of the host.
func (r *Runtime) host(path string) string {
	return cachedisk.HostPath(r.opt.HostRoot, path)
}

// ErrSnapshotter is that of a node whose pods would not use what is registered.
var ErrSnapshotter = errors.New("unsupported snapshotter")

// ErrNotRunning is that of a containerd without a socket or behind none.
var ErrNotRunning = errors.New("containerd is not running")

// answerTime bounds the wait for a containerd that may hang: what it is asked takes
// milliseconds.
const answerTime = 10 * time.Second

// Check says why containerd does not answer, within ten seconds, or nil if it does.
func (r *Runtime) Check(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, answerTime)
	defer cancel()
	if _, err := r.client.Version(ctx); err != nil {
		return fmt.Errorf("asking containerd for its version: %w", r.explain(errdefsFromGRPC(err)))
	}
	return nil
}

// ServesCRI says whether a containerd at address has a CRI plugin that answers. A
// containerd without one gives false and no error, one that is stopped
// ErrNotRunning.
func ServesCRI(ctx context.Context, address string) (bool, error) {
	ctx, cancel := context.WithTimeout(ctx, answerTime)
	defer cancel()
	if err := dial(ctx, address); err != nil {
		return false, err
	}
	conn, err := grpc.NewClient("unix://"+address, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		return false, fmt.Errorf("connecting to containerd at %s: %w", address, err)
	}
	defer conn.Close()
	_, err = cri.NewRuntimeServiceClient(conn).Version(ctx, &cri.VersionRequest{})
	if err = errdefsFromGRPC(err); errdefs.IsNotImplemented(err) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("asking containerd at %s for the CRI: %w: restart it, or choose another runtime with --runtime", address, err)
	}
	return true, nil
}

// dial tries the socket: what the operating system says of it is clearer than
// what the RPC library makes of that.
func dial(ctx context.Context, address string) error {
	if !filepath.IsAbs(address) {
		return fmt.Errorf("containerd's address %q is not an absolute path", address)
	}
	conn, err := new(net.Dialer).DialContext(ctx, "unix", address)
	switch {
	case err == nil:
		return conn.Close()
	case errors.Is(err, os.ErrNotExist), errors.Is(err, syscall.ECONNREFUSED):
		return fmt.Errorf("%w at %s: start it, or name its socket with --containerd-address", ErrNotRunning, address)
	case errors.Is(err, os.ErrPermission):
		return fmt.Errorf("containerd's socket %s is not ours to use: run as root, and in a container, where it is reached below /proc/1/root, with CAP_SYS_PTRACE", address)
	}
	return fmt.Errorf("connecting to containerd at %s: %w", address, err)
}

// chainName is the name that a chain's snapshot is committed under.
func chainName(id digest.Digest) string { return id.String() }
