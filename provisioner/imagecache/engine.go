package imagecache

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/docker/docker/api/types/system"
	"github.com/docker/docker/client"

	"github.com/selkies-project/packer-plugin-selkies/manifest"
)

// engine is the Docker Engine API of a daemon on the build VM. Each connection is
// a "docker system dial-stdio" that runs there, reached through the communicator.
type engine struct {
	*client.Client
	info      system.Info
	dialer    *dialer
	transport *http.Transport
}

// connectEngine connects to the daemon at host, or to the default one of the
// docker command for "", and makes sure that it can be used.
func connectEngine(ctx context.Context, r *vm, host string, conns int) (*engine, error) {
	command := []string{"docker", "system", "dial-stdio"}
	if host != "" {
		command = []string{"docker", "--host", host, "system", "dial-stdio"}
	}
	d := &dialer{vm: r, command: command}
	t := &http.Transport{DialContext: d.dial, MaxConnsPerHost: conns, MaxIdleConnsPerHost: conns}
	c, err := client.NewClientWithOpts(
		// It changes the transport that is there.
		client.WithHost("http://build-vm"),
		client.WithHTTPClient(&http.Client{Transport: impatient{t, ofEngine}}),
		client.WithAPIVersionNegotiation(),
	)
	if err != nil {
		return nil, fmt.Errorf("making a Docker client: %w", err)
	}
	e := &engine{Client: c, dialer: d, transport: t}
	answering, cancel := context.WithTimeoutCause(ctx, answerTime, silence(answerTime))
	defer cancel()
	// A dial-stdio that works and one that does not look alike until a request is
	// answered.
	if _, err := c.Ping(answering); err != nil {
		e.close()
		if silent, ok := errors.AsType[silence](context.Cause(answering)); ok {
			return nil, fmt.Errorf("connecting to Docker on the build VM: %w", silent)
		}
		if failed := d.failed.Load(); failed != nil {
			return nil, explainCommand(failed)
		}
		return nil, fmt.Errorf("connecting to Docker on the build VM: %w; is the communicator ssh, with ssh_pty off?", err)
	}
	if e.info, err = c.Info(answering); err != nil {
		e.close()
		return nil, fmt.Errorf("asking Docker on the build VM what it is: %w", err)
	}
	return e, nil
}

// silent is a silence if Docker answers nothing now, nil otherwise.
func (e *engine) silent(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, answerTime, silence(answerTime))
	defer cancel()
	if _, err := e.Ping(ctx); err != nil && errors.Is(context.Cause(ctx), silence(answerTime)) {
		return silence(answerTime)
	}
	return nil
}

// answerTime is how long Docker may take to answer a ping. It may be starting.
const answerTime = 2 * time.Minute

// saveLimit is how long Docker may prepare the archive of an image, which it writes to its
// disk before it sends anything: 60 GB at 60 MB/s, twice.
const saveLimit = 30 * time.Minute

// silence is the error of a daemon that has answered nothing for so long.
type silence time.Duration

func (s silence) Error() string {
	return fmt.Sprintf("nothing has come from Docker on the build VM for %s; does it hang? its log there may say more", time.Duration(s))
}

// Unwrap has the Docker client pass it on as it is.
func (s silence) Unwrap() error { return context.DeadlineExceeded }

// ofEngine is the limit of the Engine API's client.
func ofEngine(req *http.Request) (time.Duration, error) {
	limit := stallLimit
	switch path := req.URL.Path; {
	case strings.HasSuffix(path, "/images/create"), strings.HasSuffix(path, "/wait"):
		limit = 0 // pulls and traced containers have limits of their own
	case strings.HasSuffix(path, "/images/get"):
		limit = saveLimit
	}
	return limit, silence(limit)
}

func explainCommand(e *commandError) error {
	remedy := "start Docker there, or set docker_host"
	switch {
	case e.status == commandNotFound:
		remedy = "install Docker there before this provisioner runs"
	case strings.Contains(strings.ToLower(e.stderr), "permission denied"):
		remedy = "set execute_command to one that may use Docker's socket"
	}
	return fmt.Errorf("connecting to Docker on the build VM: %w; %s", e, remedy)
}

// usable says in one line why the daemon's store cannot be a cache.
func (e *engine) usable() error {
	for _, kv := range e.info.DriverStatus {
		if kv[0] == "driver-type" && strings.HasPrefix(kv[1], "io.containerd.snapshotter") {
			return errors.New(`docker on the build VM keeps its images in containerd; set disk { ... } to use a daemon of its own, or "features": {"containerd-snapshotter": false} in its daemon.json`)
		}
	}
	if e.info.Driver != manifest.DriverOverlay2 {
		return fmt.Errorf(`docker on the build VM uses the storage driver %q, a cache needs %q; set disk { ... } to use a daemon of its own, or "storage-driver": "overlay2" in its daemon.json`, e.info.Driver, manifest.DriverOverlay2)
	}
	for _, option := range []string{"userns", "rootless"} {
		if slices.ContainsFunc(e.info.SecurityOptions, func(s string) bool { return s == "name="+option || strings.HasPrefix(s, "name="+option+",") }) {
			return fmt.Errorf("docker on the build VM runs with %s, so that files in its store have other owners than on a node; use a daemon without, or set disk { ... }", option)
		}
	}
	return nil
}

// close ends all connections.
func (e *engine) close() {
	e.Client.Close()
	e.hangUp(context.Background())
}

// hangUp ends the connections that are idle, and waits a little for the commands on the
// VM to end with them.
func (e *engine) hangUp(ctx context.Context) {
	e.transport.CloseIdleConnections()
	e.dialer.wait(ctx, 5*time.Second)
}

// dialer makes connections out of commands on the build VM.
type dialer struct {
	vm      *vm
	command []string
	running sync.WaitGroup
	// failed is the last command that failed: the Docker client says no more than
	// that it cannot connect.
	failed atomic.Pointer[commandError]
}

// dial starts a command and returns its standard input and output as a connection.
func (d *dialer) dial(ctx context.Context, _, _ string) (net.Conn, error) {
	stdinR, stdinW := io.Pipe()
	stdoutR, stdoutW := io.Pipe()
	c := &stdioConn{stdin: stdinW, stdout: stdoutR}
	var stderr buffer
	started := make(chan error, 1)
	d.running.Add(1)
	go func() {
		defer d.running.Done()
		cmd, err := d.vm.start(context.WithoutCancel(ctx), stdinR, drain{stdoutW}, &stderr, d.command)
		started <- err
		if err == nil {
			if status := cmd.Wait(); status == 0 {
				err = io.EOF
			} else {
				failed := &commandError{args: d.command, status: status, stderr: oneLine(stderr.String())}
				d.failed.Store(failed)
				err = failed
			}
		}
		stdoutW.CloseWithError(err)
		stdinR.CloseWithError(err)
	}()
	select {
	case err := <-started:
		if err != nil {
			return nil, fmt.Errorf("starting %s on the build VM: %w", d.command[0], err)
		}
		return c, nil
	case <-ctx.Done():
		c.Close()
		return nil, ctx.Err()
	}
}

// wait reports whether all commands ended before ctx did and within the limit.
func (d *dialer) wait(ctx context.Context, limit time.Duration) bool {
	done := make(chan struct{})
	go func() {
		d.running.Wait()
		close(done)
	}()
	timer := time.NewTimer(limit)
	defer timer.Stop()
	select {
	case <-done:
		return true
	case <-ctx.Done():
	case <-timer.C:
	}
	return false
}

// stdioConn is a net.Conn over a remote command's standard input and output.
type stdioConn struct {
	stdin  *io.PipeWriter
	stdout *io.PipeReader
}

func (c *stdioConn) Read(p []byte) (int, error)  { return c.stdout.Read(p) }
func (c *stdioConn) Write(p []byte) (int, error) { return c.stdin.Write(p) }

// CloseWrite ends the daemon's input and lets it answer.
func (c *stdioConn) CloseWrite() error { return c.stdin.Close() }

// Close ends the remote command, which ends when its input does; cancelling a
// context would not end it.
func (c *stdioConn) Close() error {
	c.stdin.Close()
	return c.stdout.CloseWithError(net.ErrClosed)
}

func (c *stdioConn) LocalAddr() net.Addr  { return stdioAddr{} }
func (c *stdioConn) RemoteAddr() net.Addr { return stdioAddr{} }

// The HTTP client cancels by closing.
func (c *stdioConn) SetDeadline(time.Time) error      { return nil }
func (c *stdioConn) SetReadDeadline(time.Time) error  { return nil }
func (c *stdioConn) SetWriteDeadline(time.Time) error { return nil }

type stdioAddr struct{}

func (stdioAddr) Network() string { return "stdio" }
func (stdioAddr) String() string  { return "build-vm" }

// drain goes on taking a command's output after nobody reads it any more. An error
// would leave the communicator's multiplexer with a stream that blocks for minutes.
type drain struct{ w *io.PipeWriter }

func (d drain) Write(p []byte) (int, error) {
	_, _ = d.w.Write(p)
	return len(p), nil
}
