package imagecache

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"cloud.google.com/go/compute/apiv1/computepb"

	"github.com/selkies-project/packer-plugin-selkies/gcp"
)

// findImage finds the image to roll out.
func (r *run) findImage(ctx context.Context) error {
	image, err := r.getImage(ctx, r.config.ImageName)
	switch {
	case gcp.IsNotFound(err):
		return fmt.Errorf("project %s has no image %s", r.config.ImageProjectID, r.config.ImageName)
	case err != nil:
		return fmt.Errorf("getting image %s: %w", r.config.ImageName, gcp.Explain(err))
	case image.GetStatus() != "READY":
		return fmt.Errorf("image %s is %s, not ready", image.GetName(), strings.ToLower(image.GetStatus()))
	}
	if size := image.GetDiskSizeGb(); r.diskSizeBelow(size) {
		return fmt.Errorf("disk_size_gb is %d, but image %s has %d GB; set at least that, or leave it out", r.config.DiskSizeGB, image.GetName(), size)
	}
	if r.generation, err = newGeneration(image, r.config.ImageProjectID, r.config.CacheName); err != nil {
		return err
	}
	if image.GetFamily() == "" {
		r.say("image %s has no family, so that earlier images cannot be told; set image_family in the builder to have them pruned", image.GetName())
	}
	return nil
}

// findFamily finds the images of the same family.
func (r *run) findFamily(ctx context.Context) (err error) {
	family := r.generation.image.GetFamily()
	if family == "" {
		return nil
	}
	if r.family, err = r.listFamily(ctx, family); err != nil {
		return fmt.Errorf("listing the images of family %s: %w", family, gcp.Explain(err))
	}
	return nil
}

func (r *run) diskSizeBelow(size int64) bool {
	return r.config.DiskSizeGB > 0 && int64(r.config.DiskSizeGB) < size
}

func (r *run) getImage(ctx context.Context, name string) (image *computepb.Image, err error) {
	err = gcp.Retry(ctx, func() error {
		image, err = r.images.Get(ctx, &computepb.GetImageRequest{Project: r.config.ImageProjectID, Image: name})
		return err
	})
	return image, err
}

func (r *run) listFamily(ctx context.Context, family string) (generations []*generation, err error) {
	request := &computepb.ListImagesRequest{Project: r.config.ImageProjectID, Filter: new("family = " + family)}
	err = gcp.Retry(ctx, func() error {
		generations = nil
		for image, err := range r.images.List(ctx, request).All() {
			if err != nil {
				return err
			}
			if image.GetFamily() != family || image.GetStatus() != "READY" { // the filter matches patterns
				continue
			}
			g, err := newGeneration(image, r.config.ImageProjectID, r.config.CacheName)
			if err != nil {
				return err
			}
			generations = append(generations, g)
		}
		return nil
	})
	return generations, err
}

// listSources are the IDs of the disks of which an image is being made.
func (r *run) listSources(ctx context.Context) (ids map[string]bool, err error) {
	request := &computepb.ListImagesRequest{Project: r.config.ImageProjectID, Filter: new("status != READY")}
	err = gcp.Retry(ctx, func() error {
		ids = map[string]bool{}
		for image, err := range r.images.List(ctx, request).All() {
			if err != nil {
				return err
			}
			if image.GetStatus() != "READY" {
				ids[image.GetSourceDiskId()] = true
			}
		}
		return nil
	})
	return ids, err
}

// mark notes on the image that it has been rolled out, unless it says already that it
// was the last.
func (r *run) mark(ctx context.Context) error {
	var last int64 // of the others
	for _, g := range r.family {
		if g.name() != r.generation.name() {
			last = max(last, g.rolledOut)
		}
	}
	return r.labelImage(ctx, r.generation.name(), "as rolled out", func(g *generation, labels map[string]string) bool {
		// The order has to hold whatever the clocks of two Packer hosts say.
		labels[r.config.CacheName+labelRolledOut] = strconv.FormatInt(max(last+1, time.Now().Unix()), 10)
		return g.rolledOut <= last
	})
}

// labelImage changes the labels of an image, if change says that there is something to.
func (r *run) labelImage(ctx context.Context, name, how string, change func(*generation, map[string]string) bool) error {
	for {
		image, err := r.getImage(ctx, name)
		if err != nil {
			return fmt.Errorf("getting image %s: %w", name, gcp.Explain(err))
		}
		g, err := newGeneration(image, r.config.ImageProjectID, r.config.CacheName)
		if err != nil {
			return err
		}
		labels := map[string]string{}
		maps.Copy(labels, image.GetLabels())
		if !change(g, labels) {
			return nil
		}
		err = r.do(fmt.Sprintf("label image %s %s", name, how), func() error {
			return r.operate(ctx, "image "+name, func() (operation, error) {
				return r.images.SetLabels(ctx, &computepb.SetLabelsImageRequest{
					Project: r.config.ImageProjectID, Resource: name,
					GlobalSetLabelsRequestResource: &computepb.GlobalSetLabelsRequest{Labels: labels, LabelFingerprint: image.LabelFingerprint},
				})
			})
		})
		if gcp.IsConflict(err) { // someone else set labels meanwhile
			continue
		}
		if err != nil {
			return fmt.Errorf("labelling image %s: %w", name, gcp.Explain(err))
		}
		return nil
	}
}

// pruneImages deletes images that are neither kept nor the source of a disk: such a
// disk's nodes may need it in another zone, too. Nor are those deleted that node pools
// make secondary boot disks from. sources are the IDs of the images that disks were made
// from.
func (r *run) pruneImages(ctx context.Context, keep, sources map[string]bool) error {
	var errs []error
	for _, g := range r.family {
		if keep[g.name()] || sources[fmt.Sprint(g.image.GetId())] || r.boots(g) || !g.created.Before(r.generation.created) {
			continue
		}
		if err := r.pruneImage(ctx, g); err != nil {
			errs = append(errs, err)
		}
		if ctx.Err() != nil {
			return errors.Join(errs...)
		}
	}
	return join(errs)
}

// pruneImage deletes an image, or gives it up if another cache has rolled it out: that
// one deletes it.
func (r *run) pruneImage(ctx context.Context, g *generation) error {
	if g.foreign {
		return r.labelImage(ctx, g.name(), "as no longer rolled out", func(now *generation, labels map[string]string) bool {
			delete(labels, r.config.CacheName+labelRolledOut)
			return now.rolledOut > 0
		})
	}
	err := r.do("delete image "+g.name(), func() error {
		err := r.operate(ctx, "image "+g.name(), func() (operation, error) {
			return r.images.Delete(ctx, &computepb.DeleteImageRequest{Project: r.config.ImageProjectID, Image: g.name()})
		})
		if gcp.IsNotFound(err) {
			return nil
		}
		return err
	})
	if err != nil {
		return fmt.Errorf("deleting image %s: %w", g.name(), gcp.Explain(err))
	}
	return nil
}

// boots tells whether nodes get secondary boot disks of an image.
func (r *run) boots(g *generation) bool {
	return slices.ContainsFunc(r.bootImages, func(image string) bool {
		if strings.HasPrefix(image, "global/") {
			image = "projects/" + r.config.ProjectID + "/" + image
		}
		return strings.HasSuffix(image, g.address())
	})
}
