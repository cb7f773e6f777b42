package cluster

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"

	"golang.org/x/sys/unix"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/selkies-project/packer-plugin-selkies/e2e/host"
	"github.com/selkies-project/packer-plugin-selkies/e2e/machine"
)

// NodeConfig says what a node is. Its zero value is one with the pinned containerd.
type NodeConfig struct {
	// Release of containerd, machine.Upstream by default.
	Release machine.Release
	// Snapshotter of the CRI, "overlayfs" by default.
	Snapshotter string
	// Taints and Labels that kubelet registers the node with.
	Taints []corev1.Taint
	Labels map[string]string
	// Kubelet has settings that take the place of the usual ones, by their names in
	// KubeletConfiguration.
	Kubelet map[string]any
	// Disks are attached before the first boot, see AttachDisk.
	Disks []Disk
	// Files are written into the machine before the first boot: path to contents.
	Files map[string]string
}

// Disk is a disk of a node, as Compute Engine attaches it: its device is
// /dev/disk/by-id/google-NAME.
type Disk struct {
	Name string
	// Image is the file with its contents. It is only read.
	Image string
}

// Device is the disk's path in the node.
func (d Disk) Device() string { return "/dev/disk/by-id/google-" + d.Name }

// Node is a machine with containerd and kubelet.
type Node struct {
	*machine.Machine
	// Name of the Node object.
	Name string
	// IP is the node's address.
	IP string

	cluster *Cluster
	config  NodeConfig
	number  int
	loops   map[string]*host.Loop // of attached disks, by name
}

func nodeIP(n int) string    { return fmt.Sprintf("10.97.1.%d", n) }
func podSubnet(n int) string { return fmt.Sprintf("10.98.%d.0/24", n) }

// podNetwork gives each pod of node n an interface whose other end is in the
// cluster's namespace.
func podNetwork(n int) string {
	return fmt.Sprintf(`{
  "cniVersion": "1.0.0",
  "name": "pods",
  "plugins": [{
    "type": "ptp",
    "ipam": {"type": "host-local", "ranges": [[{"subnet": %q}]], "routes": [{"dst": "0.0.0.0/0"}]}
  }]
}
`, podSubnet(n))
}

const (
	programsDir = "/opt/kubernetes"
	kubeletDir  = "/etc/kubernetes"
	kubeletUnit = `[Unit]
Description=kubelet
After=containerd.service
StartLimitIntervalSec=0

[Service]
# kubelet reads of out-of-memory kills there; a machine has no kernel log.
ExecStartPre=/bin/ln -sf null /dev/kmsg
# kubelet sets what it does not find set, which is the host's and read-only here.
ExecStartPre=/bin/sh -c 'cd ` + sysctlDir + `; for f in */*; do mountpoint -q /proc/sys/$$f || mount --bind $$f /proc/sys/$$f; done'
ExecStart=` + programsDir + `/kubelet --config=` + kubeletDir + `/kubelet.json --kubeconfig=` + kubeletDir + `/kubelet.kubeconfig \
	--hostname-override=%s --node-ip=%s --node-labels=%s
Restart=always
RestartSec=1

[Install]
WantedBy=multi-user.target
`
	sysctlDir = kubeletDir + "/sysctl"
	disksFile = "/etc/tmpfiles.d/disks.conf"
)

// kubeletConfig is for a kubelet that shares its host, which may lack what kubelet
// wants: cgroups of version 2, room on the disk.
func (n *Node) kubeletConfig() map[string]any {
	config := map[string]any{
		"apiVersion":               "kubelet.config.k8s.io/v1beta1",
		"kind":                     "KubeletConfiguration",
		"address":                  n.IP,
		"healthzPort":              0,
		"authentication":           map[string]any{"x509": map[string]any{"clientCAFile": kubeletDir + "/ca.crt"}, "anonymous": map[string]any{"enabled": false}},
		"tlsCertFile":              kubeletDir + "/kubelet.crt",
		"tlsPrivateKeyFile":        kubeletDir + "/kubelet.key",
		"containerRuntimeEndpoint": "unix://" + machine.Socket,
		"resolvConf":               "",
		"failSwapOn":               false,
		"failCgroupV1":             false,
		"cgroupDriver":             "cgroupfs",
		"cgroupsPerQOS":            false,
		"enforceNodeAllocatable":   []string{},
		"evictionHard":             map[string]string{},
		// How full this machine's disk is says nothing of the nodes'. 100 is never.
		"imageGCHighThresholdPercent": 100,
		// How soon it is seen that a node is ready after a reboot; the other says how often
		// a node is heard of without news, and is its default.
		"nodeStatusUpdateFrequency": "1s",
		"nodeStatusReportFrequency": "5m",
		// It only logs that /proc/sys is read-only.
		"featureGates":       map[string]bool{"KubeletInUserNamespace": true},
		"registerWithTaints": n.config.Taints,
	}
	maps.Copy(config, n.config.Kubelet)
	return config
}

// NewNode boots a machine that joins the cluster. It does not wait for it to be ready.
// Stop it with Close.
func (c *Cluster) NewNode(ctx context.Context, config NodeConfig) (*Node, error) {
	if config.Release == "" {
		config.Release = machine.Upstream
	}
	number := int(c.nodes.Add(1))
	n := &Node{
		Name: fmt.Sprintf("node-%d", number), IP: nodeIP(number),
		cluster: c, config: config, number: number, loops: map[string]*host.Loop{},
	}
	if err := n.boot(ctx); err != nil {
		return nil, errors.Join(fmt.Errorf("making %s: %w", n.Name, err), n.Close(ctx))
	}
	return n, nil
}

func (n *Node) boot(ctx context.Context) error {
	if err := addAddress(n.IP); err != nil {
		return err
	}
	cni, err := host.Tool(ctx, "cni")
	if err != nil {
		return err
	}
	files, err := n.files()
	if err != nil {
		return err
	}
	for _, d := range n.config.Disks {
		if err := n.attachLoop(d); err != nil {
			return err
		}
	}
	files[disksFile] = n.disksConf()
	maps.Copy(files, n.config.Files)
	n.Machine, err = machine.Boot(ctx, machine.Config{
		Name:  n.Name,
		Files: files,
		Binds: map[string]string{programsDir: n.cluster.programs, "/opt/cni/bin": cni},
	})
	if err != nil {
		return err
	}
	if err := n.startContainerd(ctx); err != nil {
		return err
	}
	_, err = n.Run(ctx, "systemctl", "-q", "enable", "--now", "kubelet.service")
	return err
}

// files is what makes a machine a node.
func (n *Node) files() (map[string]string, error) {
	kubeconfig, err := n.cluster.ca.kubeconfig("system:node:"+n.Name, "system:nodes")
	if err != nil {
		return nil, err
	}
	server, err := n.cluster.ca.issue(subject{user: "kubelet", ips: []string{n.IP}})
	if err != nil {
		return nil, err
	}
	config, err := json.MarshalIndent(n.kubeletConfig(), "", "  ")
	if err != nil {
		return nil, err
	}
	var labels []string
	for _, key := range slices.Sorted(maps.Keys(n.config.Labels)) {
		labels = append(labels, key+"="+n.config.Labels[key])
	}
	return map[string]string{
		"/etc/cni/net.d/10-pods.conflist":     podNetwork(n.number),
		"/etc/systemd/system/kubelet.service": fmt.Sprintf(kubeletUnit, n.Name, n.IP, strings.Join(labels, ",")),
		kubeletDir + "/kubelet.json":          string(config),
		kubeletDir + "/kubelet.kubeconfig":    string(kubeconfig),
		sysctlDir + "/vm/overcommit_memory":   "1\n",
		sysctlDir + "/kernel/panic":           "10\n",
		sysctlDir + "/kernel/panic_on_oops":   "1\n",
		kubeletDir + "/ca.crt":                string(n.cluster.ca.pem),
		kubeletDir + "/kubelet.crt":           string(server.cert),
		kubeletDir + "/kubelet.key":           string(server.key),
	}, nil
}

func (n *Node) startContainerd(ctx context.Context) error {
	return n.StartContainerd(ctx, machine.Containerd{
		Release: n.config.Release, Snapshotter: n.config.Snapshotter, Sandbox: n.cluster.config.Sandbox,
	})
}

// attachLoop makes the disk's device on the host.
func (n *Node) attachLoop(d Disk) error {
	loop, err := host.AttachLoop(d.Image, true)
	if err == nil {
		n.loops[d.Name] = loop
	}
	return err
}

// disksConf has tmpfiles.d make the devices at every boot, before any service starts.
func (n *Node) disksConf() string {
	var b strings.Builder
	for _, name := range slices.Sorted(maps.Keys(n.loops)) {
		device := n.loops[name].Path
		var st unix.Stat_t
		// A device that is gone has nothing that could be opened.
		if err := unix.Stat(device, &st); err != nil {
			continue
		}
		fmt.Fprintf(&b, "b %s 0660 root disk - %d:%d\n", device, unix.Major(st.Rdev), unix.Minor(st.Rdev))
		fmt.Fprintf(&b, "L %s - - - - %s\n", Disk{Name: name}.Device(), device)
	}
	return b.String()
}

// AttachDisk attaches a disk, read-only. It stays attached when the node reboots.
func (n *Node) AttachDisk(d Disk) error {
	if err := n.attachLoop(d); err != nil {
		return err
	}
	if err := n.Machine.AttachDisk(n.loops[d.Name].Path, d.Name); err != nil {
		return err
	}
	return n.WriteFile(disksFile, []byte(n.disksConf()), 0o644)
}

// DetachDisk detaches a disk. What is mounted goes on working.
func (n *Node) DetachDisk(d Disk) error {
	loop := n.loops[d.Name]
	if err := n.Machine.DetachDisk(loop.Path, d.Name); err != nil {
		return err
	}
	delete(n.loops, d.Name)
	if err := n.WriteFile(disksFile, []byte(n.disksConf()), 0o644); err != nil {
		return err
	}
	return loop.Close()
}

// DiskPressure has kubelet find too little room on the disk, however much there is: it
// removes every image that no container uses and that is not pinned, and evicts one
// pod after another.
func DiskPressure() map[string]any {
	return map[string]any{
		"evictionHard":      map[string]string{"nodefs.available": "99.9%", "imagefs.available": "99.9%"},
		"imageMinimumGCAge": "1ns",
		// How long the condition and its taint outlast the pressure.
		"evictionPressureTransitionPeriod": "1s",
	}
}

// SetKubelet changes settings of kubelet, by their names in KubeletConfiguration,
// and restarts it.
func (n *Node) SetKubelet(ctx context.Context, settings map[string]any) error {
	n.config.Kubelet = maps.Clone(n.config.Kubelet)
	if n.config.Kubelet == nil {
		n.config.Kubelet = map[string]any{}
	}
	maps.Copy(n.config.Kubelet, settings)
	data, err := json.MarshalIndent(n.kubeletConfig(), "", "  ")
	if err != nil {
		return err
	}
	if err := n.WriteFile(kubeletDir+"/kubelet.json", data, 0o644); err != nil {
		return err
	}
	_, err = n.Run(ctx, "systemctl", "restart", "kubelet.service")
	return err
}

// KillContainerd ends containerd by SIGKILL. Containers go on, and systemd starts it
// again.
func (n *Node) KillContainerd(ctx context.Context) error {
	_, err := n.Run(ctx, "systemctl", "kill", "--kill-who=main", "-s", "KILL", "containerd.service")
	return err
}

// Journal is the end of what the node's units logged since its last boot.
func (n *Node) Journal(ctx context.Context, lines int, units ...string) string {
	args := []string{"journalctl", "-q", "--no-pager", "-o", "short-precise", "-n", fmt.Sprint(lines)}
	for _, u := range units {
		args = append(args, "-u", u)
	}
	out, err := n.Run(ctx, args...)
	if err != nil {
		return err.Error()
	}
	return out
}

// Close ends the machine and removes the node from the cluster, with its pods.
// Closing it again does nothing.
func (n *Node) Close(ctx context.Context) error {
	// The end of a test ends its context.
	ctx = context.WithoutCancel(ctx)
	var errs []error
	if n.Machine != nil {
		errs = append(errs, n.Machine.Close())
	}
	for _, loop := range n.loops {
		errs = append(errs, loop.Close())
	}
	if err := n.cluster.Client.CoreV1().Nodes().Delete(ctx, n.Name, metav1.DeleteOptions{}); !apierrors.IsNotFound(err) {
		errs = append(errs, err)
	}
	// Nobody is left who would confirm their end.
	pods, err := n.cluster.Client.CoreV1().Pods("").List(ctx, metav1.ListOptions{FieldSelector: "spec.nodeName=" + n.Name})
	if err != nil {
		return errors.Join(append(errs, err)...)
	}
	for _, p := range pods.Items {
		err := n.cluster.Client.CoreV1().Pods(p.Namespace).Delete(ctx, p.Name, metav1.DeleteOptions{GracePeriodSeconds: new(int64)})
		if !apierrors.IsNotFound(err) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}
