package containerd

import (
	"context"
	"fmt"
	"os"
	"time"

	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/errdefs"
	"golang.org/x/sys/unix"
)

// leaseTime bounds how long the leftovers of a killed run live if no other run
// follows. A pull's lease lives as long.
const leaseTime = 24 * time.Hour

// lock makes this the only injector at work on the node's containerd, so that a
// lease of ours can only be a dead run's. It locks the snapshotter's directory,
// which containers with the host's root mounted share; containerd itself does not
// lock it.
func (r *Runtime) lock(ctx context.Context) (unlock func(), err error) {
	dir, err := os.Open(r.host(r.root))
	if err != nil {
		return nil, fmt.Errorf("locking containerd's directory: %w", err)
	}
	if unix.Flock(int(dir.Fd()), unix.LOCK_EX|unix.LOCK_NB) == nil {
		return func() { dir.Close() }, nil
	}
	r.opt.Log.Info("waiting for another injector to end")
	locked := make(chan error, 1)
	go func() {
		for {
			if err := unix.Flock(int(dir.Fd()), unix.LOCK_EX); err != unix.EINTR {
				locked <- err
				return
			}
		}
	}()
	select {
	case err := <-locked:
		if err != nil {
			dir.Close()
			return nil, fmt.Errorf("locking %s: %w", dir.Name(), err)
		}
		return func() { dir.Close() }, nil
	case <-ctx.Done():
		// The process is about to end; the file stays open for the goroutine.
		return nil, fmt.Errorf("waiting for another injector to end: %w", ctx.Err())
	}
}

// lease gives a context under which everything that is made or found is kept until
// release. Leases that dead runs left go first, with all that only they kept.
// The caller holds the lock.
func (r *Runtime) lease(ctx context.Context) (_ context.Context, release func(ok bool) error, err error) {
	stale, err := r.ourLeases(ctx)
	if err != nil {
		return nil, nil, err
	}
	if err := r.deleteLeases(ctx, stale, leases.SynchronousDelete); err != nil {
		return nil, nil, err
	}
	l, err := r.leases.Create(ctx, leases.WithRandomID(), leases.WithExpiration(leaseTime),
		leases.WithLabel(labelCache, "injector"))
	if err != nil {
		return nil, nil, fmt.Errorf("creating a lease: %w", r.explain(err))
	}
	release = func(ok bool) error {
		// Also after an interrupt: else it lives for leaseTime.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
		defer cancel()
		// containerd may have made the lease of a run that was killed only after the
		// look above: its request was still on the way.
		all, err := r.ourLeases(ctx)
		if err != nil {
			return err
		}
		var opts []leases.DeleteOpt
		if !ok || len(all) > 1 {
			opts = append(opts, leases.SynchronousDelete)
		}
		return r.deleteLeases(ctx, all, opts...)
	}
	return leases.WithLease(ctx, l.ID), release, nil
}

// hold adds to the context's lease what may be there already.
func (r *Runtime) hold(ctx context.Context, typ, id string) error {
	lease, ok := leases.FromContext(ctx)
	if !ok {
		return fmt.Errorf("holding %s: no lease in the context", id)
	}
	err := r.leases.AddResource(ctx, leases.Lease{ID: lease}, leases.Resource{ID: id, Type: typ})
	if err != nil {
		return fmt.Errorf("adding %s to lease %s: %w", id, lease, r.explain(err))
	}
	return nil
}

// held fails if the context's lease is gone. By a clock that has jumped containerd takes it
// for expired, and garbage collection removes it along with what only it kept.
func (r *Runtime) held(ctx context.Context) error {
	lease, _ := leases.FromContext(ctx)
	list, err := r.leases.List(ctx, "id=="+lease)
	if err != nil {
		return fmt.Errorf("looking up lease %s: %w", lease, r.explain(err))
	}
	if len(list) == 0 {
		return fmt.Errorf("lease %s has expired (did the clock jump?): run inject again", lease)
	}
	return nil
}

func (r *Runtime) deleteLeases(ctx context.Context, list []leases.Lease, opts ...leases.DeleteOpt) error {
	for _, l := range list {
		if err := r.leases.Delete(ctx, l, opts...); err != nil && !errdefs.IsNotFound(err) {
			return fmt.Errorf("deleting lease %s: %w", l.ID, r.explain(err))
		}
	}
	return nil
}

// ourLeases are those of injectors. To the holder of the lock, all but its own are of
// runs that were killed.
func (r *Runtime) ourLeases(ctx context.Context) ([]leases.Lease, error) {
	all, err := r.leases.List(ctx)
	if err != nil {
		return nil, fmt.Errorf("listing leases: %w", r.explain(err))
	}
	var ours []leases.Lease
	for _, l := range all {
		if l.Labels[labelCache] != "" {
			ours = append(ours, l)
		}
	}
	return ours, nil
}

// collectGarbage removes what nothing refers to, and returns when the directories
// are gone.
func (r *Runtime) collectGarbage(ctx context.Context) error {
	_, release, err := r.lease(ctx)
	if err != nil {
		return err
	}
	return release(false)
}
