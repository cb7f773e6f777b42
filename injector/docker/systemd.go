package docker

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"slices"
	"strings"
	"time"

	"github.com/coreos/go-systemd/v22/dbus"
	godbus "github.com/godbus/dbus/v5"
	"golang.org/x/sys/unix"
)

// units are Docker's, in the order in which they are started. The socket would start
// the service on the next client's connect, so both are stopped.
var units = []string{"docker.socket", "docker.service"}

const (
	// startTimeout bounds the start of a daemon with many containers.
	startTimeout = 5 * time.Minute
	// stopTimeout bounds its stop, for which Debian's unit has no limit. dockerd gives its
	// containers 15 seconds by default.
	stopTimeout = 3 * time.Minute
)

// runDir holds what must not outlive a boot: the lock and the note of stopped units.
func (s store) runDir(elem ...string) string {
	return s.host(append([]string{"/run", "selkies-image-injector"}, elem...)...)
}

// stoppedFile lists the units that a run has stopped and not started yet: if the run
// is killed, the next one starts them.
func (s store) stoppedFile() string { return s.runDir("docker-stopped.json") }

func (s store) stoppedUnits() ([]string, error) {
	b, err := os.ReadFile(s.stoppedFile())
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	var stopped []string
	if err == nil {
		err = json.Unmarshal(b, &stopped)
	}
	if i := slices.IndexFunc(stopped, func(u string) bool { return !slices.Contains(units, u) }); err == nil && i >= 0 {
		err = fmt.Errorf("%.100q is none of docker's", stopped[i])
	}
	if err != nil {
		return nil, fmt.Errorf("reading which units are stopped %s: %w; start docker, then remove it", s.stoppedFile(), err)
	}
	return stopped, nil
}

func (s store) dialSystemd(ctx context.Context) (*dbus.Conn, error) {
	socket := s.host("/run/dbus/system_bus_socket")
	conn, err := dbus.NewConnection(func() (*godbus.Conn, error) {
		c, err := godbus.Dial("unix:path="+socket, godbus.WithContext(ctx))
		if err != nil {
			return nil, err
		}
		if err := c.Auth([]godbus.Auth{godbus.AuthExternal("0")}); err != nil {
			c.Close()
			return nil, err
		}
		if err := c.Hello(); err != nil {
			c.Close()
			return nil, err
		}
		return c, nil
	})
	if err != nil {
		return nil, fmt.Errorf("connecting to systemd by D-Bus at %s: %w", socket, err)
	}
	return conn, nil
}

// checkStoppable refuses to stop a daemon that systemd could not start again or that
// is not the one whose store is written.
func (r *Runtime) checkStoppable(ctx context.Context) error {
	const remedy = "stop it, run inject, and start it again"
	conn, err := r.dialSystemd(ctx)
	if err != nil {
		return fmt.Errorf("docker runs and cannot be restarted: %w; %s", err, remedy)
	}
	defer conn.Close()
	prop, err := conn.GetServicePropertyContext(ctx, "docker.service", "MainPID")
	if err != nil {
		return fmt.Errorf("docker runs and cannot be restarted: asking systemd for docker.service: %w; %s", err, remedy)
	}
	main, _ := prop.Value.Value().(uint32)
	peer, err := r.peer(ctx)
	if err != nil {
		return err
	}
	// Process 1 listens for a daemon that its socket unit activated; 0 is a process
	// outside of this PID namespace.
	if main == 0 || peer > 1 && uint32(peer) != main {
		return fmt.Errorf("docker at %s is not the systemd unit docker.service, so it cannot be restarted; %s", r.cli.DaemonHost(), remedy)
	}
	return nil
}

// peer is the process that listens at the daemon's address, 0 if that is unknown.
func (r *Runtime) peer(ctx context.Context) (int32, error) {
	path, ok := strings.CutPrefix(r.cli.DaemonHost(), "unix://")
	if !ok {
		return 0, nil
	}
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", path)
	if err != nil {
		return 0, fmt.Errorf("connecting to docker: %w", err)
	}
	defer c.Close()
	raw, err := c.(*net.UnixConn).SyscallConn()
	if err != nil {
		return 0, err
	}
	var cred *unix.Ucred
	var credErr error
	if err := raw.Control(func(fd uintptr) {
		cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
	}); err != nil {
		return 0, err
	}
	if credErr != nil {
		return 0, credErr
	}
	return cred.Pid, nil
}

// whileStopped calls f while dockerd does not run, and brings Docker's units back to
// their state before, whatever happens.
func (r *Runtime) whileStopped(ctx context.Context, f func() error) (err error) {
	if err := ctx.Err(); err != nil {
		return err
	}
	stopped, err := r.stoppedUnits()
	if err != nil {
		return err
	}
	if r.info == nil && stopped == nil {
		return f()
	}
	conn, err := r.dialSystemd(context.WithoutCancel(ctx))
	if err != nil {
		return err
	}
	defer conn.Close()
	if r.info != nil {
		if err := r.stop(ctx, conn); err != nil {
			return errors.Join(err, r.start(ctx, conn))
		}
	}
	defer func() { err = errors.Join(err, r.start(ctx, conn)) }()
	if err := ctx.Err(); err != nil {
		return err
	}
	return f()
}

// dialIfStopped connects to systemd if a run has stopped units and not started them;
// else the connection is nil.
func (r *Runtime) dialIfStopped(ctx context.Context) (*dbus.Conn, error) {
	stopped, err := r.stoppedUnits()
	if err != nil || stopped == nil {
		return nil, err
	}
	return r.dialSystemd(ctx)
}

// settle waits for what systemd still does for a run that was killed as it stopped or
// started docker: systemd goes on without it. If docker runs then, the note of stopped
// units is out of date, and goes.
func (r *Runtime) settle(ctx context.Context) error {
	conn, err := r.dialIfStopped(ctx)
	if err != nil || conn == nil {
		return err
	}
	defer conn.Close()
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		// Both at once: a unit whose stop is queued is still active.
		props, err := conn.GetUnitPropertiesContext(ctx, "docker.service")
		if err != nil {
			return fmt.Errorf("asking systemd for docker.service: %w", err)
		}
		if job, ok := props["Job"].([]any); !ok || len(job) == 0 || job[0] == uint32(0) {
			if props["ActiveState"] == "active" {
				return removeIfThere(r.stoppedFile())
			}
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("waiting for systemd to stop or start docker.service: %w", ctx.Err())
		}
	}
}

// resume starts what a killed run has stopped, if anything.
func (r *Runtime) resume(ctx context.Context) error {
	conn, err := r.dialIfStopped(ctx)
	if err != nil || conn == nil {
		return err
	}
	defer conn.Close()
	return r.start(ctx, conn)
}

// stop stops the units that are active, and notes them before.
func (r *Runtime) stop(ctx context.Context, conn *dbus.Conn) error {
	var active []string
	for _, u := range units {
		prop, err := conn.GetUnitPropertyContext(ctx, u, "ActiveState")
		if err != nil {
			return fmt.Errorf("asking systemd for %s: %w", u, err)
		}
		state, _ := prop.Value.Value().(string)
		if state == "active" || state == "activating" || state == "reloading" {
			active = append(active, u)
		}
	}
	b, err := json.Marshal(active)
	if err != nil {
		return err
	}
	if err := os.MkdirAll(r.runDir(), 0o700); err != nil {
		return fmt.Errorf("noting stopped units: %w", err)
	}
	if err := writeDurable(r.stoppedFile(), b, 0o600); err != nil {
		return fmt.Errorf("noting stopped units: %w", err)
	}
	ctx, cancel := context.WithTimeoutCause(ctx, stopTimeout, fmt.Errorf("it has not ended after %s; look at journalctl -u docker", stopTimeout))
	defer cancel()
	for _, u := range active {
		r.opt.Log.Info("stopping", "unit", u)
		if err := job(ctx, u, conn.StopUnitContext); err != nil {
			return fmt.Errorf("stopping %s: %w", u, err)
		}
	}
	return nil
}

// start starts the noted units, also when ctx has been cancelled, and waits until
// the daemon answers.
func (r *Runtime) start(ctx context.Context, conn *dbus.Conn) error {
	ctx, cancel := context.WithTimeoutCause(context.WithoutCancel(ctx), startTimeout, fmt.Errorf("it has not started after %s", startTimeout))
	defer cancel()
	stopped, err := r.stoppedUnits()
	if err != nil {
		return err
	}
	for _, u := range stopped {
		r.opt.Log.Info("starting", "unit", u)
		// docker.service may start three times a minute; our restarts do not count. A
		// unit that is not loaded, since it is inactive and unused, cannot be reset.
		_ = conn.ResetFailedUnitContext(ctx, u)
		if err := job(ctx, u, conn.StartUnitContext); err != nil {
			return fmt.Errorf("starting %s: %w; look at journalctl -u docker, then systemctl start docker", u, err)
		}
	}
	if slices.Contains(stopped, "docker.service") {
		if err := r.ready(ctx); err != nil {
			return err
		}
	}
	return removeIfThere(r.stoppedFile())
}

// ready waits for the daemon to answer: systemd's job is done when it says so itself,
// but not every docker.service is of Type=notify.
func (r *Runtime) ready(ctx context.Context) error {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		_, err := r.cli.Ping(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("waiting for docker to answer: %w", err)
		}
	}
}

// job runs one systemd job to its end.
func job(ctx context.Context, unit string, run func(context.Context, string, string, chan<- string) (int, error)) error {
	done := make(chan string, 1)
	if _, err := run(ctx, unit, "replace", done); err != nil {
		return err
	}
	select {
	case result := <-done:
		if result != "done" {
			return fmt.Errorf("systemd says %q", result)
		}
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
