package imagecache

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"sync"
	"time"

	compute "cloud.google.com/go/compute/apiv1"
	packersdk "github.com/hashicorp/packer-plugin-sdk/packer"

	"github.com/selkies-project/packer-plugin-selkies/gcp"
)

// pollInterval is how often something is looked at that has no operation.
const pollInterval = time.Second

// run is the state of one run.
type run struct {
	config *Config
	ui     packersdk.Ui
	sayMu  sync.Mutex

	images *compute.ImagesClient
	disks  *compute.DisksClient

	generation *generation
	goBack     bool          // an image was asked for by its name
	family     []*generation // of which images are pruned
	bootImages []string      // that node pools have
	clusters   []*cluster    // those that answer
	absent     []*cluster    // those that do not
	others     []*cluster    // not rolled out to, that may use disks all the same
	pruning    error         // what went wrong in the last step
	zones      []string      // that get a disk
	builders   []string      // VMs that were told of

	sizesMu sync.Mutex
	sizes   map[string]int64 // of the disks, by zone, in GB
}

// operation is what Compute Engine's clients return.
type operation = *compute.Operation

func (r *run) connect(ctx context.Context) error {
	opts, err := r.config.Options(ctx, gcp.Compute)
	if err != nil {
		return err
	}
	if r.images, err = compute.NewImagesRESTClient(ctx, opts...); err != nil {
		return fmt.Errorf("connecting to Compute Engine: %w", err)
	}
	if r.disks, err = compute.NewDisksRESTClient(ctx, opts...); err != nil {
		return fmt.Errorf("connecting to Compute Engine: %w", err)
	}
	return nil
}

func (r *run) close() {
	for _, k := range slices.Concat(r.clusters, r.absent) {
		if k.release != nil {
			k.release()
		}
	}
	if r.images != nil {
		r.images.Close()
	}
	if r.disks != nil {
		r.disks.Close()
	}
}

// say is safe for concurrent use.
func (r *run) say(format string, a ...any) {
	r.sayMu.Lock()
	defer r.sayMu.Unlock()
	r.ui.Say(packersdk.LogSecretFilter.FilterString(fmt.Sprintf(format, a...)))
}

// do does what changes something, or in a dry run only says so. Everything that
// changes something goes through here.
func (r *run) do(what string, f func() error) error {
	if r.config.DryRun {
		r.say("dry run: would %s", what)
		return nil
	}
	r.say("%s", what)
	return f()
}

// operate starts an operation and waits for its end. A request that may have been
// lost is asked again, so that start has to bear repetition.
func (r *run) operate(ctx context.Context, what string, start func() (operation, error)) error {
	var op operation
	err := gcp.Retry(ctx, func() (err error) {
		op, err = start()
		return err
	})
	if err != nil {
		return err
	}
	var last time.Time
	return gcp.Wait(ctx, op, func(percent int) {
		if percent > 0 && percent < 100 && time.Since(last) > tellInterval {
			last = time.Now()
			r.say("%s: %d%%", what, percent)
		}
	})
}

// tellInterval is how often progress is told.
const tellInterval = 5 * time.Second

// join is errors.Join in one line.
func join(errs []error) error {
	switch len(errs) {
	case 0:
		return nil
	case 1:
		return errs[0]
	}
	return &joined{errs}
}

type joined struct{ errs []error }

func (j *joined) Error() string {
	lines := make([]string, len(j.errs))
	for i, err := range j.errs {
		lines[i] = strings.Join(strings.Fields(err.Error()), " ")
	}
	return strings.Join(lines, "; ")
}

func (j *joined) Unwrap() []error { return j.errs }
