// Package machine boots Debian machines in systemd-nspawn: real systemd, D-Bus,
// sshd, containerd and dockerd, each machine with its own root, mounts, processes
// and cgroups. The network is the host's, so ports must be unique.
//
// A machine's root is an overlay on one root that is kept in the cache folder. The
// stores of containerd and Docker are plain directories, since their own overlays
// cannot lie on an overlay.
package machine

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/selkies-project/packer-plugin-selkies/e2e/host"
)

// Config says how a machine differs from the plain one. Its zero value boots.
type Config struct {
	// Name is the host name, "machine" by default.
	Name string
	// SSHPort, if not 0, is where sshd listens on 127.0.0.1 for root with SSHKey.
	SSHPort int
	// Files are written into the root before the first boot: path to contents.
	Files map[string]string
	// Binds are directories of the host that the machine sees: its path to the host's.
	Binds map[string]string
	// Packages are installed, nothing else that Debian can do without, instead of what
	// nodes and build machines have, if it is not nil.
	Packages []string
}

// Machine is a machine that has been booted. Its methods that run something fail
// while it is off.
type Machine struct {
	// Dir holds everything of the machine, on a real file system of the host. It is
	// removed by Close.
	Dir string
	// SSHKey is the file of the private key that root may log in with.
	SSHKey string

	id      string            // on this host, also of its cgroups
	lock    *os.File          // held while this process lives
	binds   map[string]string // path in the machine to the host's directory
	console string            // file of what the machine prints

	nspawn *exec.Cmd // nil while the machine is off
	exited chan struct{}
	leader int // process ID of the machine's init on the host, 0 while it is off
}

// stores are the directories that must not be on an overlay.
var stores = []string{"/var/lib/containerd", "/var/lib/docker", "/var/lib/kubelet"}

// bootTimeout is ten times what a boot takes on two slow cores.
const bootTimeout = 2 * time.Minute

// Boot makes a machine and waits until systemd says that it runs.
func Boot(ctx context.Context, config Config) (*Machine, error) {
	if err := host.Check(); err != nil {
		return nil, err
	}
	if err := allowInotify(); err != nil {
		return nil, err
	}
	if config.Packages == nil {
		config.Packages = packages
	}
	base, err := baseRoot(ctx, config.Packages)
	if err != nil {
		return nil, err
	}
	m, err := reserve()
	if err != nil {
		return nil, fmt.Errorf("making a machine: %w", err)
	}
	if err := m.prepare(ctx, base, config); err != nil {
		return nil, errors.Join(fmt.Errorf("making a machine: %w", err), m.Close())
	}
	if err := m.Start(ctx); err != nil {
		return nil, errors.Join(err, m.Close())
	}
	return m, nil
}

// allowInotify raises the kernel's limit of inotify instances, 128 by default, which all
// machines and the host's root share. The systemd of a machine has five and kubelet some
// more; without one, units fail at boot and kubelet ends. kind advises the same.
func allowInotify() error {
	const file, enough = "/proc/sys/fs/inotify/max_user_instances", 1024
	data, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	if now, err := strconv.Atoi(strings.TrimSpace(string(data))); err != nil || now >= enough {
		return err
	}
	return os.WriteFile(file, []byte(strconv.Itoa(enough)), 0)
}

func (m *Machine) prepare(ctx context.Context, base string, config Config) error {
	for _, d := range []string{"root", "upper", "work"} {
		if err := os.Mkdir(filepath.Join(m.Dir, d), 0o755); err != nil {
			return err
		}
	}
	overlay := fmt.Sprintf("lowerdir=%s,upperdir=%s/upper,workdir=%s/work", base, m.Dir, m.Dir)
	if err := unix.Mount("overlay", m.root(), "overlay", 0, overlay); err != nil {
		return fmt.Errorf("mounting overlay on %s: %w", m.root(), err)
	}
	m.binds = maps.Clone(config.Binds)
	if m.binds == nil {
		m.binds = map[string]string{}
	}
	for i, store := range stores {
		m.binds[store] = filepath.Join(m.Dir, "stores", strconv.Itoa(i))
		if err := os.MkdirAll(m.binds[store], 0o711); err != nil {
			return err
		}
	}

	name := config.Name
	if name == "" {
		name = "machine"
	}
	files := map[string]string{
		"/etc/hostname": name + "\n",
		"/etc/hosts":    "127.0.0.1 localhost " + name + "\n",
	}
	if config.SSHPort != 0 {
		m.SSHKey = filepath.Join(m.Dir, "id_ed25519")
		if _, err := host.Output(exec.CommandContext(ctx, "ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", m.SSHKey)); err != nil {
			return err
		}
		key, err := os.ReadFile(m.SSHKey + ".pub")
		if err != nil {
			return err
		}
		files["/root/.ssh/authorized_keys"] = string(key)
		files["/etc/ssh/sshd_config.d/e2e.conf"] = fmt.Sprintf("Port %d\nListenAddress 127.0.0.1\n", config.SSHPort)
		wants := filepath.Join(m.root(), "etc/systemd/system/multi-user.target.wants/ssh.service")
		if err := os.Symlink("/lib/systemd/system/ssh.service", wants); err != nil {
			return err
		}
	}
	maps.Copy(files, config.Files)
	for path, contents := range files {
		if err := m.WriteFile(path, []byte(contents), 0o644); err != nil {
			return err
		}
	}
	return nil
}

func (m *Machine) root() string { return filepath.Join(m.Dir, "root") }

// Start boots a machine that is off and waits until systemd says that it runs.
func (m *Machine) Start(ctx context.Context) error {
	if m.nspawn != nil {
		return errors.New("the machine is running")
	}
	// Cgroups end with a boot. kubelet would look for the containers of those that are
	// left, several seconds for each, before it is ready.
	if err := removeCgroups(m.id); err != nil {
		return fmt.Errorf("removing the cgroups of the last boot: %w", err)
	}
	cgroups, err := makeCgroups(m.id)
	if err != nil {
		return fmt.Errorf("making the machine's cgroups: %w", err)
	}
	console, err := os.OpenFile(m.console, os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer console.Close()

	// The shell puts itself, and so nspawn, into the cgroups: with --keep-unit two
	// machines in one cgroup would share the systemd tree below it.
	args := []string{"-c", `for g; do [ "$g" != -- ] || break; echo $$ >"$g/cgroup.procs" || exit; done
		while [ "$1" != -- ]; do shift; done; shift; exec "$@"`, "boot"}
	args = append(args, cgroups...)
	args = append(args, "--", "systemd-nspawn", "-D", m.root(), "-b", "-M", m.id, "--register=no", "--keep-unit",
		"--capability=all", "--system-call-filter=@keyring bpf", "--resolv-conf=off", "--timezone=off", "--link-journal=no")
	for path, dir := range m.binds {
		args = append(args, "--bind="+dir+":"+path)
	}
	cmd := exec.Command("sh", args...)
	cmd.Stdout, cmd.Stderr = console, console
	// The terminal's Ctrl-C is for whoever started the machine.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("booting the machine: %w", err)
	}
	m.nspawn, m.exited = cmd, make(chan struct{})
	go func(exited chan struct{}) {
		// The status of a machine that was killed says nothing.
		_ = cmd.Wait()
		close(exited)
	}(m.exited)
	pid := strconv.Itoa(cmd.Process.Pid)
	if err := os.WriteFile(filepath.Join(m.Dir, "pid"), []byte(pid), 0o600); err != nil {
		return err
	}
	return m.waitReady(ctx)
}

// waitReady waits for systemd to have started everything.
func (m *Machine) waitReady(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, bootTimeout)
	defer cancel()
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	said := "no init process"
	for {
		if pid := child(m.nspawn.Process.Pid); pid != 0 {
			m.leader = pid
			out, err := m.Run(ctx, "systemctl", "is-system-running", "--wait")
			switch strings.TrimSpace(out) {
			case "running":
				return nil
			case "degraded":
				failed, _ := m.Run(ctx, "systemctl", "list-units", "--failed", "--plain", "--no-legend")
				return fmt.Errorf("booting the machine: units failed: %s", strings.TrimSpace(failed))
			}
			if err != nil {
				said = err.Error()
			}
		}
		select {
		case <-tick.C:
		case <-m.exited:
			return fmt.Errorf("booting the machine: it ended: %s", m.printed())
		case <-ctx.Done():
			return fmt.Errorf("booting the machine: %w: %s: %s", ctx.Err(), said, m.printed())
		}
	}
}

// printed is the end of what the machine printed.
func (m *Machine) printed() []byte {
	log, _ := os.ReadFile(m.console)
	return log[max(0, len(log)-1000):]
}

// child is the process with ID 1 in a PID namespace that pid made, 0 without one.
func child(pid int) int {
	children, _ := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/children", pid, pid))
	for _, c := range strings.Fields(string(children)) {
		status, _ := os.ReadFile("/proc/" + c + "/status")
		for line := range strings.Lines(string(status)) {
			ids := strings.Fields(line)
			if len(ids) > 2 && ids[0] == "NSpid:" && ids[len(ids)-1] == "1" {
				n, _ := strconv.Atoi(c)
				return n
			}
		}
	}
	return 0
}

// Command is a command in the machine, to be run as root with a plain environment.
// Cancelling ctx kills the command itself, with SIGKILL, not only the way to it.
func (m *Machine) Command(ctx context.Context, name string, args ...string) *exec.Cmd {
	// -r and -w: where nspawn cannot pivot, as in a chroot, the root of the mount
	// namespace is not the root of the machine.
	args = append([]string{"-t", strconv.Itoa(m.leader), "-m", "-p", "-i", "-u", "-C", "-r", "-w", "--", name}, args...)
	cmd := exec.CommandContext(ctx, "nsenter", args...)
	cmd.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin", "HOME=/root", "LANG=C.UTF-8"}
	// nsenter forks to enter the PID namespace; the process group has both.
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	return cmd
}

// Run runs a command in the machine and returns its standard output. The error has
// its standard error.
func (m *Machine) Run(ctx context.Context, args ...string) (string, error) {
	cmd := m.Command(ctx, args[0], args[1:]...)
	out, err := host.Output(cmd)
	if err != nil {
		// The line of nsenter is noise to the reader.
		msg := strings.Replace(err.Error(), strings.Join(cmd.Args, " "), strings.Join(args, " "), 1)
		return out, &runError{msg: msg, err: err}
	}
	return out, nil
}

type runError struct {
	msg string
	err error
}

func (e *runError) Error() string { return e.msg }
func (e *runError) Unwrap() error { return e.err }

// Path is the host's path of a file of the machine. While the machine runs it goes
// through its mounts, /dev, /run and all; while it is off, to its root and its binds. Absolute symbolic links on the way lead into the host: name their target.
func (m *Machine) Path(path string) string {
	if m.leader != 0 {
		return filepath.Join("/proc", strconv.Itoa(m.leader), "root", path)
	}
	for bind, dir := range m.binds {
		if rest, ok := strings.CutPrefix(path, bind); ok && (rest == "" || rest[0] == '/') {
			return filepath.Join(dir, rest)
		}
	}
	return filepath.Join(m.root(), path)
}

// WriteFile writes a file of the machine, with the directories above it.
func (m *Machine) WriteFile(path string, data []byte, mode os.FileMode) error {
	file := m.Path(path)
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		return err
	}
	return os.WriteFile(file, data, mode)
}

// Install copies a program of the host to path in the machine, executable.
func (m *Machine) Install(file, path string) error {
	data, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	// A running program's file cannot be written, but it can be replaced.
	if err := os.Remove(m.Path(path)); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	return m.WriteFile(path, data, 0o755)
}

// AttachDisk makes a block device of the host appear in the machine, by the
// device's own path and as /dev/disk/by-id/google-NAME, as Compute Engine names an
// attached disk. A reboot detaches it, as if it had been pulled.
func (m *Machine) AttachDisk(device, name string) error {
	var st unix.Stat_t
	if err := unix.Stat(device, &st); err != nil {
		return fmt.Errorf("attaching %s: %w", device, err)
	}
	if err := unix.Mknod(m.Path(device), unix.S_IFBLK|0o660, int(st.Rdev)); err != nil {
		return fmt.Errorf("attaching %s: %w", device, err)
	}
	link := m.Path("/dev/disk/by-id/google-" + name)
	if err := os.MkdirAll(filepath.Dir(link), 0o755); err != nil {
		return err
	}
	return os.Symlink(device, link)
}

// DetachDisk takes away what AttachDisk made. What is mounted stays mounted.
func (m *Machine) DetachDisk(device, name string) error {
	return errors.Join(os.Remove(m.Path("/dev/disk/by-id/google-"+name)), os.Remove(m.Path(device)))
}

// Reboot reboots the machine in order and waits until it runs again.
func (m *Machine) Reboot(ctx context.Context) error {
	// With --keep-unit nspawn leaves it to its caller to boot again.
	if err := m.shutDown(ctx, "reboot"); err != nil {
		return err
	}
	return m.Start(ctx)
}

// Poweroff shuts the machine down in order. Start boots it again.
func (m *Machine) Poweroff(ctx context.Context) error {
	if m.nspawn == nil {
		return nil
	}
	return m.shutDown(ctx, "poweroff")
}

func (m *Machine) shutDown(ctx context.Context, verb string) error {
	if _, err := m.Run(ctx, "systemctl", verb); err != nil && ctx.Err() != nil {
		return err // otherwise the end was quicker than systemctl
	}
	select {
	case <-m.exited:
		m.nspawn, m.leader = nil, 0
		return nil
	case <-ctx.Done():
		return fmt.Errorf("shutting the machine down: %w", ctx.Err())
	}
}

// Kill ends every process of the machine at once. Start boots it again. What was
// written survives without fsync, unlike after a power loss: the kernel lives on.
func (m *Machine) Kill() error {
	if m.nspawn == nil {
		return nil
	}
	if err := kill(m.nspawn.Process.Pid); err != nil {
		return fmt.Errorf("killing the machine: %w", err)
	}
	<-m.exited
	m.nspawn, m.leader = nil, 0
	return nil
}

// Close kills the machine and removes everything of it. Closing it again does
// nothing.
func (m *Machine) Close() error {
	if m.lock == nil {
		return nil
	}
	if err := m.Kill(); err != nil {
		return err
	}
	// Another process that boots looks for the locks of machines, and would make that of
	// this one anew in the middle of its removal.
	all, err := host.Lock(filepath.Join(filepath.Dir(m.Dir), ".lock"))
	if err != nil {
		return err
	}
	defer all.Close()
	if err := remove(m.Dir, m.id); err != nil {
		return fmt.Errorf("removing the machine: %w", err)
	}
	err = m.lock.Close()
	m.lock = nil
	return err
}

// FreePort is a TCP port of 127.0.0.1 on which nothing listens.
func FreePort() (int, error) {
	l, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		return 0, fmt.Errorf("finding a free port: %w", err)
	}
	defer l.Close()
	return l.Addr().(*net.TCPAddr).Port, nil
}
