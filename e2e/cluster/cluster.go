// Package cluster starts Kubernetes clusters: etcd, kube-apiserver, the controller
// manager and the scheduler as processes, and nodes that are machines with
// containerd and kubelet as systemd units. Everything is the real program, with node
// authorization and admission as in production.
//
// It all lives in a network namespace that Isolate makes. The address of the
// service "kubernetes" is one of that namespace's own, on which the API server
// listens, so that pods find it as in any cluster, without kube-proxy. There is no DNS.
package cluster

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/selkies-project/packer-plugin-selkies/e2e/host"
)

// The addresses of the namespace. Node N has nodeIP(N), its pods podSubnet(N).
const (
	controlPlaneIP = "10.97.0.1"
	serviceIP      = "10.96.0.1"
	serviceSubnet  = "10.96.0.0/16"
)

// Config says what differs from cluster to cluster.
type Config struct {
	// Dir keeps the cluster's files. Stop leaves them.
	Dir string
	// Sandbox is the image of pod sandboxes.
	Sandbox string
}

// Cluster is a running control plane.
type Cluster struct {
	// Client may do everything.
	Client *kubernetes.Clientset
	// Kubeconfig is the file by which others may, too.
	Kubeconfig string

	config    Config
	ca        *authority
	programs  string // folder with kubectl and the others
	processes []*process
	nodes     atomic.Int32 // made so far
}

// startTimeout is ten times what a start takes on two slow cores.
const startTimeout = 2 * time.Minute

// Start starts a control plane and waits until it is ready. It needs a network
// namespace made by Isolate.
func Start(ctx context.Context, config Config) (*Cluster, error) {
	c := &Cluster{config: config, Kubeconfig: filepath.Join(config.Dir, "admin.kubeconfig")}
	if err := c.start(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("starting a control plane: %w", err), c.logs(), c.Stop())
	}
	return c, nil
}

func (c *Cluster) start(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	var err error
	if c.programs, err = host.Tool(ctx, "kubernetes"); err != nil {
		return err
	}
	etcd, err := host.Tool(ctx, "etcd")
	if err != nil {
		return err
	}
	if err := c.writeCredentials(); err != nil {
		return err
	}
	// Its contents need not outlive a power cut.
	if err := c.run(filepath.Join(etcd, "server"), "--data-dir="+c.file("etcd"), "--unsafe-no-fsync"); err != nil {
		return err
	}
	err = c.run(filepath.Join(c.programs, "kube-apiserver"),
		"--etcd-servers=http://127.0.0.1:2379",
		"--secure-port=443", "--advertise-address="+controlPlaneIP, "--service-cluster-ip-range="+serviceSubnet,
		"--tls-cert-file="+c.file("apiserver.crt"), "--tls-private-key-file="+c.file("apiserver.key"),
		"--client-ca-file="+c.file("ca.crt"),
		"--kubelet-certificate-authority="+c.file("ca.crt"), "--kubelet-preferred-address-types=InternalIP",
		"--kubelet-client-certificate="+c.file("apiserver-kubelet.crt"), "--kubelet-client-key="+c.file("apiserver-kubelet.key"),
		"--service-account-issuer=https://kubernetes.default.svc",
		"--service-account-key-file="+c.file("accounts.crt"), "--service-account-signing-key-file="+c.file("accounts.key"),
		"--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction",
		"--allow-privileged")
	if err != nil {
		return err
	}
	client, err := clientcmd.BuildConfigFromFlags("", c.Kubeconfig)
	if err != nil {
		return err
	}
	// Tests ask often, and want the answer, not that there was no time left to ask.
	client.QPS = -1
	if c.Client, err = kubernetes.NewForConfig(client); err != nil {
		return err
	}
	if err := c.ready(ctx); err != nil {
		return err
	}
	err = c.run(filepath.Join(c.programs, "kube-controller-manager"),
		"--kubeconfig="+c.file("controller-manager.kubeconfig"), "--leader-elect=false",
		"--use-service-account-credentials", "--service-account-private-key-file="+c.file("accounts.key"),
		"--root-ca-file="+c.file("ca.crt"))
	if err != nil {
		return err
	}
	return c.run(filepath.Join(c.programs, "kube-scheduler"),
		"--kubeconfig="+c.file("scheduler.kubeconfig"), "--leader-elect=false")
}

// writeCredentials writes the certificates of the control plane, and kubeconfigs
// with the users that Kubernetes has roles for.
func (c *Cluster) writeCredentials() error {
	var err error
	if c.ca, err = newAuthority(); err != nil {
		return err
	}
	if err := os.WriteFile(c.file("ca.crt"), c.ca.pem, 0o600); err != nil {
		return err
	}
	for name, s := range map[string]subject{
		"apiserver": {user: "kube-apiserver", ips: []string{controlPlaneIP, serviceIP},
			names: []string{"kubernetes", "kubernetes.default", "kubernetes.default.svc"}},
		"apiserver-kubelet": {user: "kube-apiserver-kubelet-client", groups: []string{"system:masters"}},
		// Service accounts' tokens are signed with its key.
		"accounts": {user: "service-accounts"},
	} {
		if err := c.ca.issueFiles(c.config.Dir, name, s); err != nil {
			return err
		}
	}
	for name, s := range map[string]subject{
		"admin":              {user: "admin", groups: []string{"system:masters"}},
		"controller-manager": {user: "system:kube-controller-manager"},
		"scheduler":          {user: "system:kube-scheduler"},
	} {
		data, err := c.ca.kubeconfig(s.user, s.groups...)
		if err != nil {
			return err
		}
		if err := os.WriteFile(c.file(name+".kubeconfig"), data, 0o600); err != nil {
			return err
		}
	}
	return nil
}

func (c *Cluster) file(name string) string { return filepath.Join(c.config.Dir, name) }

// ready waits for the API server.
func (c *Cluster) ready(ctx context.Context) error {
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		err := c.Client.Discovery().RESTClient().Get().AbsPath("/readyz").Do(ctx).Error()
		if err == nil {
			return nil
		}
		for _, p := range c.processes {
			select {
			case <-p.exited:
				return fmt.Errorf("%s ended: %s", p.name, p.state())
			default:
			}
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return fmt.Errorf("waiting for the API server: %w", err)
		}
	}
}

// Stop ends the control plane. Nodes go on without it.
func (c *Cluster) Stop() error {
	var errs []error
	for _, p := range c.processes {
		errs = append(errs, p.kill())
	}
	c.processes = nil
	return errors.Join(errs...)
}

// Kubectl runs kubectl as the administrator and returns its standard output.
func (c *Cluster) Kubectl(ctx context.Context, args ...string) (string, error) {
	cmd := exec.CommandContext(ctx, filepath.Join(c.programs, "kubectl"), append([]string{"--kubeconfig", c.Kubeconfig}, args...)...)
	return host.Output(cmd)
}

// process is a program of the control plane. It ends with this process at the latest.
type process struct {
	name   string
	log    string
	cmd    *exec.Cmd
	exited chan struct{}
}

// run starts a program, with its output in a file of its name.
func (c *Cluster) run(program string, args ...string) error {
	p := &process{name: filepath.Base(program), cmd: exec.Command(program, args...), exited: make(chan struct{})}
	p.log = c.file(p.name + ".log")
	log, err := os.Create(p.log)
	if err != nil {
		return err
	}
	defer log.Close()
	p.cmd.Stdout, p.cmd.Stderr = log, log
	// The terminal's Ctrl-C is for whoever started it.
	p.cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if err := p.cmd.Start(); err != nil {
		return fmt.Errorf("starting %s: %w", p.name, err)
	}
	go func() {
		// Its state has the rest.
		_ = p.cmd.Wait()
		close(p.exited)
	}()
	c.processes = append(c.processes, p)
	return nil
}

func (p *process) kill() error {
	if err := p.cmd.Process.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
		return fmt.Errorf("ending %s: %w", p.name, err)
	}
	<-p.exited
	return nil
}

// state is what a process that ended has to say.
func (p *process) state() string {
	return fmt.Sprintf("%s: %s", p.cmd.ProcessState, p.tail())
}

// tail is the end of the process's log.
func (p *process) tail() string {
	data, _ := os.ReadFile(p.log)
	return strings.TrimSpace(string(data[max(0, len(data)-2000):]))
}

// logs is an error that has the end of every process's log.
func (c *Cluster) logs() error {
	var errs []error
	for _, p := range c.processes {
		errs = append(errs, fmt.Errorf("log of %s: %s", p.name, p.tail()))
	}
	return errors.Join(errs...)
}
