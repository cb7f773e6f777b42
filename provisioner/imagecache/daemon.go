package imagecache

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"path"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
)

const (
	lifelineUnit = "selkies-image-cache.service"
	dockerdUnit  = "selkies-image-cache-dockerd.service"

	// runtimeDirectory is the dedicated daemon's directory in /run, which systemd
	// removes with the unit.
	runtimeDirectory = "selkies-image-cache"

	// dockerConfig is where dockerd looks for the certificates of registries, and where
	// up to version 23 it makes a key that identifies it.
	dockerConfig = "/etc/docker"

	// containerdState is where the VM's containerd has its socket, and where the shims of
	// any containerd have theirs.
	containerdState = "/run/containerd"

	// An unmount of a build that was cut off writes back what the VM's memory holds.
	unmountTimeout = 10 * time.Minute
)

// lifeline undoes on the build VM what the build did there, however the build
// ends. Packer does not wait for a provisioner that it cancels, and may be killed,
// so the VM has to notice by itself: a unit reads from the build's connection, and
// when that closes, systemd stops the dedicated daemon and unmounts the disk.
type lifeline struct {
	conn   net.Conn
	dialer *dialer
}

// startLifeline starts the unit. In the end it removes the directories that the build
// is about to make.
func startLifeline(ctx context.Context, r *vm, mountPoint string, made []string) (*lifeline, error) {
	command := []string{
		"systemd-run", "--unit=" + lifelineUnit, "--description=Packer build that fills an image cache",
		"--collect", "--quiet", "--pipe", "--wait",
		"--property=TimeoutStopSec=" + unmountTimeout.String(),
		// Where the daemon's configuration is, before the daemon.
		"--property=RuntimeDirectory=" + runtimeDirectory,
		"--property=ExecStopPost=-/bin/systemctl stop " + dockerdUnit,
		"--property=ExecStopPost=-/bin/umount --recursive " + mountPoint,
	}
	for _, dir := range made {
		command = append(command, "--property=ExecStopPost=-/bin/rmdir "+dir)
	}
	d := &dialer{vm: r, command: append(command, "cat")}
	conn, err := d.dial(ctx, "", "")
	if err != nil {
		return nil, err
	}
	l := &lifeline{conn: conn, dialer: d}
	// What cat echoes shows that it runs and reads from this connection.
	const hello = "ready\n"
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	echo := make([]byte, len(hello))
	_, err = io.WriteString(conn, hello)
	if _, readErr := io.ReadFull(conn, echo); readErr != nil {
		err = readErr
	}
	if err != nil {
		conn.Close()
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		return nil, fmt.Errorf("starting %s on the build VM: %w; see systemctl status %[1]s there", lifelineUnit, err)
	}
	return l, nil
}

// end stops the daemon and unmounts the disk, and returns when that is done.
func (l *lifeline) end(ctx context.Context) error {
	l.conn.Close()
	if !l.dialer.wait(ctx, unmountTimeout) {
		return fmt.Errorf("stopping %s on the build VM: it did not end in time", lifelineUnit)
	}
	return nil
}

// stopLeftovers ends what a build left behind whose connection has not been found
// dead yet, and waits for what is still ending.
func stopLeftovers(ctx context.Context, r *vm, say func(string, ...any)) error {
	for _, unit := range []string{lifelineUnit, dockerdUnit} {
		// A unit that is not there is inactive. One that unmounts the disk is
		// deactivating, which is-active does not tell from that.
		state, err := r.run(ctx, "systemctl", "show", "--property=ActiveState", "--value", unit)
		if exitStatus(err) > 0 {
			return fmt.Errorf("%w; disk { ... } needs a VM that runs systemd", err)
		}
		if err != nil {
			return err
		}
		if strings.TrimSpace(string(state)) == "inactive" {
			continue
		}
		say("stopping %s, which an earlier build left running", unit)
		if _, err := r.run(ctx, "systemctl", "stop", unit); err != nil {
			return fmt.Errorf("stopping what an earlier build left running: %w", err)
		}
	}
	return nil
}

// checkDocker finds out whether there is a Docker to start, and its version, before the
// disk changes.
func (d *cacheDisk) checkDocker(ctx context.Context) error {
	var g errgroup.Group
	for _, program := range []string{"docker", "dockerd"} {
		g.Go(func() error {
			out, err := d.vm.run(ctx, program, "--version")
			if exitStatus(err) == commandNotFound {
				return fmt.Errorf("%w; install Docker on the build VM before this provisioner runs", err)
			}
			if program == "dockerd" {
				// Docker version 20.10.24+dfsg1, build 297e128
				_, version, _ := strings.Cut(string(out), " version ")
				d.dockerVersion, _, _ = strings.Cut(version, ",")
			}
			return err
		})
	}
	return g.Wait()
}

// startDaemon starts a Docker daemon of its own on the disk and returns its
// address. It shares nothing with the VM's own daemon but the certificates of
// registries: not its configuration, nor its sockets, network rules or containers.
func (d *cacheDisk) startDaemon(ctx context.Context, c *Config) (host string, err error) {
	run := path.Join("/run", runtimeDirectory)
	host = "unix://" + path.Join(run, "docker.sock")
	config, err := json.Marshal(map[string]any{
		"data-root":      path.Join(d.config.MountPoint, d.config.DockerRoot),
		"exec-root":      path.Join(run, "exec"),
		"pidfile":        path.Join(run, "docker.pid"),
		"hosts":          []string{host},
		"storage-driver": "overlay2",
		// Docker 29 would keep a new store in containerd.
		"features":                 map[string]bool{"containerd-snapshotter": false},
		"bridge":                   "none",
		"iptables":                 false,
		"ip6tables":                false,
		"ip-forward":               false,
		"insecure-registries":      append([]string{}, c.InsecureRegistries...),
		"max-concurrent-downloads": 2 * c.Concurrency,
	})
	if err != nil {
		return "", fmt.Errorf("encoding the daemon's configuration: %w", err)
	}
	if _, err := d.vm.run(ctx, "mkdir", "--parents", run); err != nil {
		return "", err
	}
	configFile := path.Join(run, "daemon.json")
	if err := d.vm.replaceFile(ctx, configFile, bytes.NewReader(config)); err != nil {
		return "", fmt.Errorf("configuring a Docker daemon on the cache disk: %w", err)
	}
	// Type=notify: systemd-run returns when the daemon is ready or has failed.
	_, err = d.vm.run(ctx, "systemd-run", "--unit="+dockerdUnit, "--description=Docker on the image cache disk",
		"--collect", "--quiet", "--service-type=notify",
		"--property=RuntimeDirectory="+runtimeDirectory,
		"--property=TimeoutStartSec=90", "--property=TimeoutStopSec=15",
		// It ends its containerd itself, after the containers, which it could not end
		// without.
		"--property=KillMode=mixed",
		"--property=LimitNOFILE=1048576", "--property=TasksMax=infinity",
		// It has credentials in memory.
		"--property=LimitCORE=0",
		// Where dockerd sees no containerd it starts one of its own below its roots,
		// and the VM's keeps no trace of it.
		"--property=TemporaryFileSystem="+containerdState,
		// That one would make an empty /opt/containerd, and dockerd a key.
		"--property=ReadOnlyPaths=-/opt",
		"--property=TemporaryFileSystem="+dockerConfig,
		"--property=BindReadOnlyPaths=-"+path.Join(dockerConfig, "certs.d"),
		"dockerd", "--config-file="+configFile)
	if err != nil {
		return "", fmt.Errorf("starting a Docker daemon on the cache disk: %w", d.explainDaemon(ctx, err))
	}
	return host, nil
}

// endContainerd ends the containerd that the daemon has started for itself, right before
// the daemon, which would look for its end but once a second. No container is left by then.
func (d *cacheDisk) endContainerd(ctx context.Context) {
	const wait = `p=$(cat "$1") && kill "$p" && while kill -0 "$p" 2>/dev/null; do sleep 0.01; done`
	pidFile := path.Join("/run", runtimeDirectory, "exec", "containerd", "containerd.pid")
	// Without it the daemon does the same, more slowly.
	_, _ = d.vm.run(ctx, "timeout", "5", "sh", "-c", wait, "end", pidFile)
}

// explainDaemon adds the daemon's last words to systemd's "job failed".
func (d *cacheDisk) explainDaemon(ctx context.Context, err error) error {
	if exitStatus(err) < 0 {
		return err
	}
	out, e := d.vm.run(ctx, "journalctl", "--unit="+dockerdUnit, "--lines=3", "--output=cat", "--no-pager", "--quiet")
	if e != nil || len(out) == 0 {
		return err
	}
	return fmt.Errorf("%w: %s", err, oneLine(string(out)))
}
