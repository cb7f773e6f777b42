package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"runtime/debug"
	"sync"

	"github.com/selkies-project/packer-plugin-selkies/injector/cachedisk"
	"github.com/selkies-project/packer-plugin-selkies/injector/containerd"
	"github.com/selkies-project/packer-plugin-selkies/injector/docker"
	"github.com/selkies-project/packer-plugin-selkies/injector/report"
)

// runtime registers images with the node's container runtime.
type runtime interface {
	Inject(ctx context.Context, disks []*cachedisk.Disk, opt report.InjectOptions) (*report.Inject, error)
	Plan(ctx context.Context, disks []*cachedisk.Disk, refs []string) ([]report.Reference, error)
	Status(ctx context.Context) ([]report.Registration, error)
	Generations(ctx context.Context) ([]report.Generation, error)
	Eject(ctx context.Context, opt report.EjectOptions) (*report.Eject, error)
	Close() error
}

// withDisks calls do with the cache disks and the runtime. One broken disk does not
// hide another: do gets those that can be read, and the error names the others.
func withDisks(ctx context.Context, f *flags, do func(runtime, []*cachedisk.Disk) error) error {
	if err := checkRoot(); err != nil {
		return err
	}
	collectLess()
	opening, giveUp := context.WithCancel(ctx)
	defer giveUp()
	var rt runtime
	var err error
	var opened sync.WaitGroup
	opened.Go(func() { rt, err = openRuntime(opening, f) })
	disks, diskErr := cachedisk.Find(f.caches, f.hostRoot)
	disks, foreign := cachedisk.Runnable(disks)
	diskErr = errors.Join(diskErr, foreign)
	if len(disks) == 0 {
		giveUp()
	}
	opened.Wait()
	if err == nil {
		defer rt.Close()
	}
	switch {
	case len(disks) == 0:
		return diskErr
	case err != nil:
		return errors.Join(err, diskErr)
	}
	return errors.Join(do(rt, disks), diskErr)
}

// collectLess has the garbage collector run seldom, since the program is about to end:
// it takes a tenth of the time. Much memory is collected as ever.
func collectLess() {
	debug.SetGCPercent(400)
	debug.SetMemoryLimit(256 << 20)
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
	return openAuto(ctx, f)
}

// openAuto takes a runtime only if it answers. Docker brings a containerd of its
// own, so only one with a CRI plugin serves pods; but if that one is in trouble,
// registering with a Docker beside it would not help them.
func openAuto(ctx context.Context, f *flags) (runtime, error) {
	noContainerd := errors.New("--link=bind rules out containerd")
	if f.link != docker.LinkBind {
		cri, err := containerd.ServesCRI(ctx, f.containerdAddress)
		switch {
		case cri:
			return openContainerd(ctx, f, f.containerdNamespace)
		case err == nil:
			err = fmt.Errorf("containerd at %s has no CRI plugin: enable it", f.containerdAddress)
		case !errors.Is(err, containerd.ErrNotRunning):
			return nil, err
		}
		noContainerd = err
	}
	if _, err := docker.Kind(ctx, f.dockerHost); err != nil {
		return nil, fmt.Errorf("no container runtime: %w; %w; start one of them, or use --runtime docker for a stopped Docker",
			noContainerd, err)
	}
	return openDocker(ctx, f)
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
		if f.link == docker.LinkBind {
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
