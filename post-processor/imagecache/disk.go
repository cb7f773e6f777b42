package imagecache

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"sync"
	"time"

	"cloud.google.com/go/compute/apiv1/computepb"
	"golang.org/x/sync/errgroup"

	"github.com/selkies-project/packer-plugin-selkies/gcp"
)

const (
	// Disks made at once. Compute Engine takes many more, but each is polled.
	parallelDisks = 8
	// How long a disk may take. Those of 500 GB take about a minute.
	diskTimeout = 30 * time.Minute
	// How often a disk that vanished or failed is made anew.
	diskAttempts = 3
)

// makeDisks makes the generation's disk in every zone. One that fails does not stop
// the others: the next run adopts them.
func (r *run) makeDisks(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, diskTimeout, fmt.Errorf("the disks took more than %s", diskTimeout))
	defer cancel()
	var group errgroup.Group
	group.SetLimit(parallelDisks)
	var mu sync.Mutex
	var errs []error
	for _, zone := range r.zones {
		group.Go(func() error {
			if err := r.makeDisk(ctx, zone); err != nil {
				mu.Lock()
				defer mu.Unlock()
				errs = append(errs, fmt.Errorf("disk %s: %w", r.diskName(zone), gcp.Explain(err)))
			}
			return nil
		})
	}
	_ = group.Wait() // they all return nil
	return join(errs)
}

func (r *run) diskName(zone string) string { return r.generation.diskName(r.config.CacheName, zone) }

// makeDisk makes a disk, or adopts the one that an earlier run made or began to
// make.
func (r *run) makeDisk(ctx context.Context, zone string) error {
	name := r.diskName(zone)
	for attempt := 1; ; attempt++ {
		disk, err := r.getDisk(ctx, zone, name)
		switch {
		case gcp.IsNotFound(err):
		case err != nil:
			return err
		default:
			if done, err := r.adopt(ctx, zone, disk); err != nil || done {
				return err
			}
		}
		if r.config.DryRun {
			return r.do(r.insertion(zone), nil)
		}
		if attempt > diskAttempts {
			return errors.New("it vanished or failed again and again; look at its operations")
		}
		if err := r.do(r.insertion(zone), func() error { return r.insertDisk(ctx, zone) }); err != nil {
			return err
		}
	}
}

func (r *run) insertion(zone string) string {
	return fmt.Sprintf("make disk %s, %s of %d GB, from image %s", r.diskName(zone), r.config.DiskType, r.diskSize(), r.generation.name())
}

func (r *run) diskSize() int64 {
	if s := int64(r.config.DiskSizeGB); s > 0 {
		return s
	}
	return r.generation.image.GetDiskSizeGb()
}

// setSize notes the size of a disk that is there.
func (r *run) setSize(zone string, sizeGB int64) {
	r.sizesMu.Lock()
	defer r.sizesMu.Unlock()
	if r.sizes == nil {
		r.sizes = map[string]int64{}
	}
	r.sizes[zone] = sizeGB
}

// zoneDisk is the generation's disk in a zone, after makeDisks.
func (r *run) zoneDisk(zone string) *zoneDisk {
	size := r.diskSize()
	if s, ok := r.sizes[zone]; ok {
		size = s
	}
	return &zoneDisk{config: r.config, name: r.diskName(zone), zone: zone, image: r.generation.name(), sizeGB: size}
}

func (r *run) getDisk(ctx context.Context, zone, name string) (disk *computepb.Disk, err error) {
	err = gcp.Retry(ctx, func() error {
		disk, err = r.disks.Get(ctx, &computepb.GetDiskRequest{Project: r.config.ProjectID, Zone: zone, Disk: name})
		return err
	})
	return disk, err
}

// insertDisk asks for the disk and waits for it. Asking again after a lost answer is
// harmless: the name is taken then, and the disk is adopted.
func (r *run) insertDisk(ctx context.Context, zone string) error {
	labels := maps.Clone(r.config.DiskLabels)
	if labels == nil {
		labels = map[string]string{}
	}
	labels[labelName], labels[labelImage] = r.config.CacheName, r.generation.name()
	request := &computepb.InsertDiskRequest{
		Project: r.config.ProjectID, Zone: zone,
		DiskResource: &computepb.Disk{
			Name:        new(r.diskName(zone)),
			Description: new("Container image cache, read-only on GKE nodes."),
			Type:        new(fmt.Sprintf("zones/%s/diskTypes/%s", zone, r.config.DiskType)),
			SizeGb:      new(r.diskSize()),
			SourceImage: new(r.generation.address()),
			Labels:      labels,
		},
	}
	err := r.operate(ctx, "disk "+r.diskName(zone), func() (operation, error) { return r.disks.Insert(ctx, request) })
	if gcp.IsConflict(err) {
		return nil
	}
	return err
}

// adopt checks that a disk is what this run would have made and waits until it is
// ready. It is not done if the disk has to be made.
func (r *run) adopt(ctx context.Context, zone string, disk *computepb.Disk) (done bool, err error) {
	name := disk.GetName()
	if disk.GetLabels()[labelName] != r.config.CacheName || disk.GetSourceImageId() != fmt.Sprint(r.generation.image.GetId()) {
		return false, fmt.Errorf("there is one that was not made from image %s for this cache; delete it or choose another cache_name", r.generation.name())
	}
	for {
		switch disk.GetStatus() {
		case "READY":
			r.setSize(zone, disk.GetSizeGb())
			if disk.GetSizeGb() != r.diskSize() || lastElement(disk.GetType()) != r.config.DiskType {
				r.say("disk %s stays a %s of %d GB", name, lastElement(disk.GetType()), disk.GetSizeGb())
			}
			r.say("disk %s is ready", name)
			return true, nil
		case "FAILED":
			return false, r.deleteDisk(ctx, zone, name)
		}
		if r.config.DryRun {
			return true, nil
		}
		if err := gcp.Sleep(ctx, pollInterval); err != nil {
			return false, err
		}
		if disk, err = r.getDisk(ctx, zone, name); err != nil {
			if gcp.IsNotFound(err) {
				return false, nil
			}
			return false, err
		}
	}
}

func (r *run) deleteDisk(ctx context.Context, zone, name string) error {
	return r.do("delete disk "+name, func() error {
		err := r.operate(ctx, "disk "+name, func() (operation, error) {
			return r.disks.Delete(ctx, &computepb.DeleteDiskRequest{Project: r.config.ProjectID, Zone: zone, Disk: name})
		})
		if gcp.IsNotFound(err) {
			return nil
		}
		return err
	})
}
