package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/opencontainers/go-digest"

	"github.com/selkies-project/packer-plugin-selkies/injector/cachedisk"
	"github.com/selkies-project/packer-plugin-selkies/injector/containerd"
	"github.com/selkies-project/packer-plugin-selkies/injector/docker"
	"github.com/selkies-project/packer-plugin-selkies/injector/report"
)

// runtime registers images with the node's container runtime.
type runtime interface {
	Inject(ctx context.Context, disks []*cachedisk.Disk, dryRun bool) (*report.Inject, error)
	Plan(ctx context.Context, disks []*cachedisk.Disk, refs []string) ([]report.Reference, error)
	Status(ctx context.Context) ([]report.Registration, error)
	Eject(ctx context.Context, ids []digest.Digest) (*report.Eject, error)
	Close() error
}

// openRuntime connects to the runtime that the flags ask for.
func openRuntime(ctx context.Context, f *flags) (runtime, error) {
	if err := checkRoot(); err != nil {
		return nil, err
	}
	switch f.runtime {
	case runtimeContainerd:
		return openContainerd(ctx, f, f.containerdNamespace)
	case runtimeDocker:
		return openDocker(ctx, f)
	}
	if f.link == linkBind {
		return openDocker(ctx, f)
	}
	// Docker brings a containerd of its own, so a socket alone says nothing: only a
	// containerd whose CRI plugin answers is one that serves pods.
	cri, err := containerd.ServesCRI(ctx, f.containerdAddress)
	if cri {
		return openContainerd(ctx, f, f.containerdNamespace)
	}
	if kind, dockerErr := docker.Kind(ctx, f.dockerHost); dockerErr == nil && kind != "" {
		return openDocker(ctx, f)
	}
	if root := f.dockerRoot; root != "" || exists(filepath.Join(f.hostRoot, "/var/lib/docker/image")) {
		return openDocker(ctx, f)
	}
	return nil, fmt.Errorf("no runtime: containerd at %s does not serve the CRI (%v) and no Docker answers at %s; start one, or name it with --containerd-address or --docker-host",
		f.containerdAddress, err, f.dockerHost)
}

func checkRoot() error {
	if os.Geteuid() != 0 {
		return errors.New("not root: the cache disk and the runtime's store are root's; run with sudo, or as a privileged container")
	}
	return nil
}

func openContainerd(ctx context.Context, f *flags, namespace string) (runtime, error) {
	return containerd.New(ctx, containerd.Options{
		Address:   f.containerdAddress,
		Namespace: namespace,
		HostRoot:  f.hostRoot,
		Log:       f.log,
	})
}

// openDocker serves Docker's overlay2 graph driver; a Docker with the containerd
// image store is containerd in namespace moby.
func openDocker(ctx context.Context, f *flags) (runtime, error) {
	if kind, err := docker.Kind(ctx, f.dockerHost); err == nil && kind == docker.KindContainerd {
		if f.link == linkBind {
			return nil, usageError{errors.New("--link=bind is for Docker's overlay2 graph driver; this Docker has the containerd image store")}
		}
		f.log.Info("docker has the containerd image store; registering with containerd", "namespace", docker.ContainerdNamespace)
		return openContainerd(ctx, f, docker.ContainerdNamespace)
	}
	return docker.New(ctx, docker.Options{
		Root:           f.dockerRoot,
		Host:           f.dockerHost,
		HostRoot:       f.hostRoot,
		Link:           f.link,
		RestartRunning: f.dockerRestart,
		Log:            f.log,
	})
}

func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}
