package imagecache

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/uuid"
	"k8s.io/client-go/tools/leaderelection"
	"k8s.io/client-go/tools/leaderelection/resourcelock"
)

// One run at a time works on a cache: each of two would take the disks of the other,
// which no volume names yet, for what a failed build left, and the slower one would
// bring back the older images. A Lease in every cluster keeps them apart. It ends with
// a run that is killed.
const (
	// leaseDuration is after what time without a sign of it a run counts as dead. This
	// and the next two are what Kubernetes' own components have.
	leaseDuration = 15 * time.Second
	// renewDeadline is after what time without an answer a run gives its lease up.
	renewDeadline = 10 * time.Second
	renewInterval = 2 * time.Second
	// leaseWait bounds the wait for another run: no rollout takes that long.
	leaseWait = time.Hour
	// leaseAttempts is how often in a row a cluster may fail to answer meanwhile.
	leaseAttempts = 3
)

var errLeaseLost = errors.New("the lease of this run was lost: the cluster gave no answer for too long, or someone deleted it; run again")

// lead waits for other runs of the same cache to end, in one cluster after the other,
// in the same order in every run: else two of them could wait for each other.
func (r *run) lead(ctx context.Context) error {
	if !r.touchesClusters() || r.config.DryRun {
		return nil
	}
	var failed []failure
	for _, k := range r.clusters {
		concerned, err := k.concerned(ctx)
		if err == nil && concerned {
			err = k.lead(ctx)
		}
		if err != nil {
			failed = append(failed, failure{k, err})
		}
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
	}
	return r.setAside(failed)
}

// concerned tells whether the run changes something in the cluster. If it has none of
// the zones, there is something to prune at most, of an earlier run, which had a lease.
func (k *cluster) concerned(ctx context.Context) (bool, error) {
	if len(k.zones) > 0 {
		return true, nil
	}
	_, err := k.typed.CoordinationV1().Leases(namespace).Get(ctx, k.run.config.CacheName, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return false, nil
	}
	if err != nil {
		return false, fmt.Errorf("getting lease %s: %w", k.run.config.CacheName, explain(err))
	}
	return true, nil
}

// lead takes the cache's lease in the cluster and keeps it until release.
func (k *cluster) lead(ctx context.Context) error {
	if err := k.applyNamespace(ctx); err != nil {
		return err
	}
	host, err := os.Hostname()
	if err != nil {
		return err
	}
	identity := fmt.Sprintf("%s_%s", host, uuid.NewUUID())
	lock := &watchedLock{
		LeaseLock: &resourcelock.LeaseLock{
			LeaseMeta:  metav1.ObjectMeta{Namespace: namespace, Name: k.run.config.CacheName},
			Client:     k.typed.CoordinationV1(),
			LockConfig: resourcelock.ResourceLockConfig{Identity: identity},
		},
		refused: make(chan error, 1),
	}
	started := make(chan context.Context, 1)
	elector, err := leaderelection.NewLeaderElector(leaderelection.LeaderElectionConfig{
		Name: k.run.config.CacheName, Lock: lock, ReleaseOnCancel: true,
		LeaseDuration: leaseDuration, RenewDeadline: renewDeadline, RetryPeriod: renewInterval,
		Callbacks: leaderelection.LeaderCallbacks{
			OnStartedLeading: func(ctx context.Context) { started <- ctx },
			OnStoppedLeading: func() {},
			OnNewLeader: func(other string) {
				if other != "" && other != identity {
					k.run.say("cluster %s: waiting for another run to end, %s", k, other)
				}
			},
		},
	})
	if err != nil {
		return err
	}
	// It goes on until release: what the lease guards has to end first.
	ctx, cancel := context.WithTimeoutCause(ctx, leaseWait, fmt.Errorf("another run has not ended for %s; see kubectl -n %s get lease %s", leaseWait, namespace, k.run.config.CacheName))
	defer cancel()
	background, stop := context.WithCancel(context.WithoutCancel(ctx))
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		elector.Run(background)
	}()
	k.release = func() { stop(); <-ended }
	select {
	case k.leading = <-started:
		return nil
	case err = <-lock.refused:
	case <-ctx.Done():
		err = context.Cause(ctx)
	}
	k.release()
	return err
}

// whileLeading is a context that ends with the lease, too.
func (k *cluster) whileLeading(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(ctx)
	if k.leading == nil {
		return ctx, func() { cancel(nil) }
	}
	stop := context.AfterFunc(k.leading, func() { cancel(errLeaseLost) })
	if k.lost() { // not a moment later
		cancel(errLeaseLost)
	}
	return ctx, func() { stop(); cancel(nil) }
}

// lost tells whether another run may be at work in the cluster.
func (k *cluster) lost() bool { return k.leading != nil && k.leading.Err() != nil }

// watchedLock tells why a lease cannot be had, which the elector only logs.
type watchedLock struct {
	*resourcelock.LeaseLock
	refused  chan error // one at most is taken
	failures int        // in a row
}

func (l *watchedLock) Get(ctx context.Context) (*resourcelock.LeaderElectionRecord, []byte, error) {
	record, raw, err := l.LeaseLock.Get(ctx)
	return record, raw, l.watch(err)
}

func (l *watchedLock) Create(ctx context.Context, record resourcelock.LeaderElectionRecord) error {
	return l.watch(l.LeaseLock.Create(ctx, record))
}

func (l *watchedLock) Update(ctx context.Context, record resourcelock.LeaderElectionRecord) error {
	return l.watch(l.LeaseLock.Update(ctx, record))
}

func (l *watchedLock) watch(err error) error {
	switch {
	case err == nil, apierrors.IsNotFound(err), apierrors.IsConflict(err), apierrors.IsAlreadyExists(err):
		l.failures = 0
		return err
	case apierrors.IsForbidden(err), apierrors.IsUnauthorized(err):
		l.failures = leaseAttempts
	default:
		l.failures++
	}
	if l.failures >= leaseAttempts {
		select {
		case l.refused <- fmt.Errorf("taking the lease %s: %w", l.LeaseMeta.Name, explain(err)):
		default:
		}
	}
	return err
}
