package cluster

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"syscall"

	"github.com/selkies-project/packer-plugin-selkies/e2e/host"
	"github.com/selkies-project/packer-plugin-selkies/e2e/machine"
)

// isolated is the environment variable with the folder of a run, set in its
// network namespace only.
const isolated = "E2E_CLUSTER_DIR"

// Main is for the TestMain of packages whose tests have a cluster, and for the main of
// programs that have one. It calls build, which may use the network, and then starts this
// program again in a network namespace of its own, where run has all ports and addresses to
// itself and pods can have addresses of their own. The process ends with run's status. dir is
// a folder for both, which is removed afterwards, as are machines that run leaves, however it
// ends: by a signal, a panic or a time-out.
func Main(build func(ctx context.Context, dir string) error, run func(ctx context.Context, dir string) (status int, err error)) {
	dir := os.Getenv(isolated)
	if dir == "" {
		host.Main(func(ctx context.Context, dir string) (int, error) {
			ctx, stop := signal.NotifyContext(ctx, syscall.SIGINT, syscall.SIGTERM)
			defer stop()
			if err := prepare(ctx); err != nil {
				return 1, err
			}
			if err := build(ctx, dir); err != nil {
				return 1, err
			}
			return isolate(ctx, dir)
		})
	}
	status, err := 1, setUpNetwork()
	if err == nil {
		status, err = run(context.Background(), dir)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "setting up the cluster's tests:", err)
		status = 1
	}
	os.Exit(status)
}

// prepare makes what a cluster needs and is kept in the cache folder.
func prepare(ctx context.Context) error {
	for _, tool := range []string{"kubernetes", "etcd", "cni", "containerd", "runc"} {
		if _, err := host.Tool(ctx, tool); err != nil {
			return err
		}
	}
	// It has the machines' root made.
	_, err := machine.Busybox(ctx)
	return err
}

// isolate runs this program in a new network namespace.
func isolate(ctx context.Context, dir string) (int, error) {
	// The go command sends SIGQUIT to a test that takes too long.
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGQUIT)
	defer signal.Stop(signals)

	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Args[0] = os.Args[0]
	cmd.Env = append(os.Environ(), isolated+"="+dir)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET, Pdeathsig: syscall.SIGKILL}
	if err := ctx.Err(); err != nil {
		return 1, err // by a signal that came before
	}
	if err := cmd.Start(); err != nil {
		return 1, fmt.Errorf("starting a network namespace: %w", err)
	}
	done := make(chan struct{})
	defer close(done)
	go func() {
		for {
			select {
			case s := <-signals:
				// It may have ended by the same signal, from the terminal.
				_ = cmd.Process.Signal(s)
			case <-done:
				return
			}
		}
	}()
	// The error has no more than the exit status.
	_ = cmd.Wait()
	status := cmd.ProcessState.ExitCode()
	if status < 0 {
		status = 1
	}
	return status, machine.Reap()
}

// setUpNetwork makes an empty network namespace usable. Every address of the
// cluster's machines is one of lo: pods reach them through their own interfaces.
func setUpNetwork() error {
	if _, err := host.Output(exec.Command("ip", "link", "set", "lo", "up")); err != nil {
		return err
	}
	for _, address := range []string{controlPlaneIP, serviceIP} {
		if err := addAddress(address); err != nil {
			return err
		}
	}
	// Machines have /proc/sys read-only, so the CNI plugin cannot do it.
	return os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0)
}

func addAddress(ip string) error {
	_, err := host.Output(exec.Command("ip", "address", "replace", ip+"/32", "dev", "lo"))
	return err
}
