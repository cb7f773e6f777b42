// Package pods runs pods by the CRI, as kubelet does, each with one container that
// waits.
package pods

import (
	"context"
	"fmt"
	"strings"

	"google.golang.org/grpc"
	cri "k8s.io/cri-api/pkg/apis/runtime/v1"
)

// Pod is a pod that runs, or of which that much runs.
type Pod struct {
	// Sandbox and Container are their IDs.
	Sandbox, Container string

	runtime cri.RuntimeServiceClient
}

// Run starts a container of the image, which needs a /bin/busybox, in a pod of its own.
// A nil for options is the host's network. What runs of a pod that fails is removed.
func Run(ctx context.Context, conn grpc.ClientConnInterface, name, reference string, options *cri.NamespaceOption) (*Pod, error) {
	if options == nil {
		options = &cri.NamespaceOption{Network: cri.NamespaceMode_NODE}
	}
	config := &cri.PodSandboxConfig{
		Metadata:     &cri.PodSandboxMetadata{Name: name, Namespace: "test", Uid: name, Attempt: 0},
		LogDirectory: "/tmp",
		Labels: map[string]string{
			"io.kubernetes.pod.name": name, "io.kubernetes.pod.namespace": "test", "io.kubernetes.pod.uid": name,
		},
		Linux: &cri.LinuxPodSandboxConfig{SecurityContext: &cri.LinuxSandboxSecurityContext{NamespaceOptions: options}},
	}
	p := &Pod{runtime: cri.NewRuntimeServiceClient(conn)}
	s, err := p.runtime.RunPodSandbox(ctx, &cri.RunPodSandboxRequest{Config: config})
	if err != nil {
		return nil, err
	}
	p.Sandbox = s.PodSandboxId
	c, err := p.runtime.CreateContainer(ctx, &cri.CreateContainerRequest{
		PodSandboxId:  s.PodSandboxId,
		SandboxConfig: config,
		Config: &cri.ContainerConfig{
			Metadata: &cri.ContainerMetadata{Name: "main"},
			Image:    &cri.ImageSpec{Image: reference},
			Command:  []string{"/bin/busybox", "sleep", "86398"},
			LogPath:  name + ".log",
			Labels: map[string]string{
				"io.kubernetes.container.name": "main", "io.kubernetes.pod.name": name, "io.kubernetes.pod.namespace": "test",
			},
			Linux: &cri.LinuxContainerConfig{SecurityContext: &cri.LinuxContainerSecurityContext{NamespaceOptions: options}},
		},
	})
	if err == nil {
		p.Container = c.ContainerId
		_, err = p.runtime.StartContainer(ctx, &cri.StartContainerRequest{ContainerId: c.ContainerId})
	}
	if err != nil {
		if e := p.Remove(ctx); e != nil {
			return nil, fmt.Errorf("%w; %w", err, e)
		}
		return nil, err
	}
	return p, nil
}

// Shell runs a shell command in the container.
func (p *Pod) Shell(ctx context.Context, command string) (string, error) {
	resp, err := p.runtime.ExecSync(ctx, &cri.ExecSyncRequest{
		ContainerId: p.Container, Cmd: []string{"/bin/busybox", "sh", "-c", command}, Timeout: 20,
	})
	if err != nil {
		return "", fmt.Errorf("%s: %w", command, err)
	}
	if resp.ExitCode != 0 {
		return "", fmt.Errorf("%s: exit status %d: %s", command, resp.ExitCode, resp.Stderr)
	}
	return strings.TrimSpace(string(resp.Stdout)), nil
}

// Remove stops and removes the pod.
func (p *Pod) Remove(ctx context.Context) error {
	if _, err := p.runtime.StopPodSandbox(ctx, &cri.StopPodSandboxRequest{PodSandboxId: p.Sandbox}); err != nil {
		return fmt.Errorf("stopping pod: %w", err)
	}
	if _, err := p.runtime.RemovePodSandbox(ctx, &cri.RemovePodSandboxRequest{PodSandboxId: p.Sandbox}); err != nil {
		return fmt.Errorf("removing pod: %w", err)
	}
	return nil
}
