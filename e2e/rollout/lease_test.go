//go:build e2e

package rollout_test

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"

	"github.com/selkies-project/packer-plugin-selkies/e2e/cluster"
	"github.com/selkies-project/packer-plugin-selkies/e2e/gcp"
)

// overlap starts a run, and a second one while the first makes its disks, and returns
// their errors.
func (c *cloud) overlap(first, second int) (errs [2]error) {
	c.t.Helper()
	hold := make(chan struct{})
	c.Inject(gcp.Fault{Call: "disks.insert", Hold: hold})
	before := len(c.Calls())
	called := func(call string) error {
		if !slices.ContainsFunc(c.Calls()[before:], func(done string) bool { return strings.HasPrefix(done, call) }) {
			return fmt.Errorf("not yet")
		}
		return nil
	}
	images := []int{min(first, second), max(first, second)}
	for _, stamp := range images {
		c.build(stamp)
		c.Forward(time.Second) // no two are made in one millisecond
	}
	start := func(stamp int, said func(string)) <-chan error {
		ended := make(chan error, 1)
		go func() { ended <- c.process(c.t.Context(), &ui{said: said}, artifact(imageName(stamp))) }()
		return ended
	}
	one := start(first, nil)
	cluster.Wait(c.t, "the first run to make disks", func(context.Context) error { return called("disks.insert") })
	waiting := make(chan struct{})
	two := start(second, func(line string) {
		if strings.HasPrefix(line, "cluster us-central1/broker-us-central1: waiting for another run to end, ") {
			close(waiting)
		}
	})
	select {
	case <-waiting:
	case err := <-two:
		c.t.Fatalf("the second run did not wait: %v", err)
	}
	close(hold)
	return [2]error{<-one, <-two}
}

// TestOverlap has two runs at the same time. Neither takes the other's disks, and the
// newer image wins, whichever is the slower.
func TestOverlap(t *testing.T) {
	t.Parallel() // without nodes no test is in the other's way
	c := newCloud(t, "overlap", administrator(t))
	c.tidy()
	if errs := c.overlap(1, 2); errs[0] != nil || errs[1] != nil {
		t.Errorf("errors are %v", errs)
	}
	both := []string{image(1), image(2), c.disk(zoneA, 1), c.disk(zoneB, 1), c.disk(zoneA, 2), c.disk(zoneB, 2)}
	c.wantResources(both...)
	newer := slices.Concat(c.two(zoneA, 1), c.two(zoneB, 1), c.three(zoneA, 2), c.three(zoneB, 2))
	c.waitObjects(newer...)

	errs := c.overlap(4, 3)
	if errs[0] != nil || errs[1] == nil || errs[1].Error() != "image "+imageName(3)+" is older than "+imageName(4)+", which has been rolled out meanwhile; set image_name to go back to it" {
		t.Errorf("errors are %v", errs)
	}
	c.waitObjects(slices.Concat(c.two(zoneA, 2), c.two(zoneB, 2), c.three(zoneA, 4), c.three(zoneB, 4))...)
	c.wantResources(image(2), image(4), c.disk(zoneA, 2), c.disk(zoneB, 2), c.disk(zoneA, 4), c.disk(zoneB, 4))

	// Asked for by its name an older one is taken all the same.
	c.must(artifact(imageName(4)), "image_name", imageName(2))
	c.waitObjects(slices.Concat(c.three(zoneA, 2), c.three(zoneB, 2), c.two(zoneA, 4), c.two(zoneB, 4))...)
}

// TestHeldLease has the lease held by a run that is dead, and by one that is not.
func TestHeldLease(t *testing.T) {
	t.Parallel() // without nodes no test is in the other's way
	c := newCloud(t, "held", administrator(t))
	c.tidy()
	c.must(c.build(1))
	leases := world.Client.CoordinationV1().Leases(namespace)
	lease, err := leases.Get(t.Context(), "held", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if h := lease.Spec.HolderIdentity; h != nil && *h != "" {
		t.Errorf("after the run %q holds the lease", *h)
	}
	hold := func(seconds int32) {
		now := metav1.NowMicro()
		lease.Spec = coordinationv1.LeaseSpec{HolderIdentity: new("dead"), LeaseDurationSeconds: &seconds, RenewTime: &now, AcquireTime: &now}
		if lease, err = leases.Update(t.Context(), lease, metav1.UpdateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	hold(3)
	began := time.Now()
	c.must(c.build(2))
	if took := time.Since(began); took < 3*time.Second {
		t.Errorf("it waited for %s only", took)
	}

	// A run that is interrupted as it waits ends, and does nothing.
	if lease, err = leases.Get(t.Context(), "held", metav1.GetOptions{}); err != nil {
		t.Fatal(err)
	}
	hold(3600)
	changed := c.changes()
	interrupted := errors.New("interrupted by the test")
	ctx, cancel := context.WithCancelCause(t.Context())
	err = c.process(ctx, &ui{said: func(line string) {
		if strings.Contains(line, "waiting for another run to end, dead") {
			cancel(interrupted)
		}
	}}, c.build(3))
	if !errors.Is(err, interrupted) {
		t.Errorf("error is %v", err)
	}
	if now := c.changes(); !slices.Equal(changed, now) {
		t.Errorf("it has called %q", now[len(changed):])
	}
}

// TestLostLease has someone take the lease away from a run, which goes no further.
func TestLostLease(t *testing.T) {
	t.Parallel() // without nodes no test is in the other's way
	c := newCloud(t, "lostlease", administrator(t))
	c.tidy()
	c.must(c.build(1))
	hold := make(chan struct{})
	c.Inject(gcp.Fault{Call: "disks.insert", Hold: hold})
	u := &ui{said: func(line string) {
		if strings.HasPrefix(line, "make disk ") {
			takeLease(t, "lostlease")
			time.AfterFunc(13*time.Second, sync.OnceFunc(func() { close(hold) }))
		}
	}}
	err := c.process(t.Context(), u, c.build(2), "zones", []string{zoneA}, "keep", 1)
	if err == nil || !strings.HasPrefix(err.Error(), "1 of 1 clusters failed: cluster us-central1/broker-us-central1: the lease of this run was lost") {
		t.Errorf("error is %v", err)
	}
	c.waitObjects(slices.Concat(c.three(zoneA, 1), c.three(zoneB, 1))...)
	c.wantResources(image(1), image(2), c.disk(zoneA, 1), c.disk(zoneB, 1), c.disk(zoneA, 2))
}

// takeLease has another run hold a lease for an hour.
func takeLease(t *testing.T, name string) {
	t.Helper()
	patch := fmt.Sprintf(`{"spec":{"holderIdentity":"other","leaseDurationSeconds":3600,"renewTime":%q}}`, time.Now().UTC().Format("2006-01-02T15:04:05.000000Z"))
	if _, err := world.Client.CoordinationV1().Leases(namespace).Patch(t.Context(), name, types.MergePatchType, []byte(patch), metav1.PatchOptions{}); err != nil {
		t.Error(err)
	}
}
