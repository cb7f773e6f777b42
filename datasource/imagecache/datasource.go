//go:generate packer-sdc struct-markdown
//go:generate packer-sdc mapstructure-to-hcl2 -type Config,Output

// Package imagecache is the Packer data source selkies-image-cache. It finds the
// newest image of the cache, so that a build starts with what the last one pulled.
package imagecache

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log"
	"strings"
	"time"

	compute "cloud.google.com/go/compute/apiv1"
	"cloud.google.com/go/compute/apiv1/computepb"
	"github.com/hashicorp/hcl/v2/hcldec"
	"github.com/hashicorp/packer-plugin-sdk/common"
	"github.com/hashicorp/packer-plugin-sdk/hcl2helper"
	packersdk "github.com/hashicorp/packer-plugin-sdk/packer"
	"github.com/hashicorp/packer-plugin-sdk/template/config"
	"github.com/zclconf/go-cty/cty"

	"github.com/selkies-project/packer-plugin-selkies/gcp"
)

// timeout bounds the search: Packer has no way to cancel a data source.
const timeout = 5 * time.Minute

// Config is the configuration of the data source.
type Config struct {
	common.PackerConfig `mapstructure:",squash"`
	gcp.Auth            `mapstructure:",squash"`

	// The project that has the cache's images.
	ProjectID string `mapstructure:"project_id" required:"true"`
	// The image family of the cache: the builder's `image_family`. Defaults to
	// `selkies-image-cache`.
	Family string `mapstructure:"family"`
	// The image to start from when the family has no image yet, or with `rebuild`. If the
	// images are on the boot disk, this or `base_image_family` is required. By default there
	// is none, and a data disk starts blank.
	BaseImage string `mapstructure:"base_image"`
	// The image family whose newest image to start from, instead of `base_image`. By
	// default none.
	BaseImageFamily string `mapstructure:"base_image_family"`
	// The project that has the base image, such as `debian-cloud`. Defaults to
	// `project_id`.
	BaseImageProjectID string `mapstructure:"base_image_project_id"`
	// Do not start from the cache's last image. Defaults to `false`.
	Rebuild bool `mapstructure:"rebuild"`
}

// Output is what the data source finds. Strings are empty and numbers 0 where the
// build starts with a blank disk.
type Output struct {
	// Whether the image is one of the cache's own, so that only changed layers are
	// pulled.
	Incremental bool `mapstructure:"incremental"`
	// The image's resource path, `projects/PROJECT/global/images/NAME`: the `source_image`
	// of a `disk_attachment`.
	Image string `mapstructure:"image"`
	// The image's name: the `source_image` of the builder.
	Name string `mapstructure:"name"`
	// The project that has the image, for the builder's `source_image_project_id`.
	ProjectID string `mapstructure:"project_id"`
	// The image's family.
	Family string `mapstructure:"family"`
	// The image's size in GB. No disk made from it may be smaller.
	DiskSizeGB int `mapstructure:"disk_size_gb"`
	// When the image was made, in RFC 3339 format, in UTC.
	Created string `mapstructure:"created"`
	// The image's labels.
	Labels map[string]string `mapstructure:"labels"`
}

// Datasource implements packersdk.Datasource.
type Datasource struct{ config Config }

var _ packersdk.Datasource = (*Datasource)(nil)

// ConfigSpec is the HCL2 specification of Config.
func (d *Datasource) ConfigSpec() hcldec.ObjectSpec { return d.config.FlatMapstructure().HCL2Spec() }

// OutputSpec is the HCL2 specification of Output.
func (d *Datasource) OutputSpec() hcldec.ObjectSpec {
	return new(Output).FlatMapstructure().HCL2Spec()
}

// Configure decodes and checks the configuration. Its errors name the option.
func (d *Datasource) Configure(raws ...any) error {
	c := &d.config
	if err := config.Decode(c, &config.DecodeOpts{PluginType: "selkies-image-cache", Interpolate: true}, raws...); err != nil {
		return err
	}
	c.Family = cmp.Or(c.Family, "selkies-image-cache")
	c.BaseImageProjectID = cmp.Or(c.BaseImageProjectID, c.ProjectID)
	errs := packersdk.MultiErrorAppend(nil, c.Prepare()...)
	if c.ProjectID == "" {
		errs = packersdk.MultiErrorAppend(errs, errors.New("project_id is not set"))
	}
	if c.BaseImage != "" && c.BaseImageFamily != "" {
		errs = packersdk.MultiErrorAppend(errs, errors.New("base_image and base_image_family are both set; choose one"))
	}
	if len(errs.Errors) > 0 {
		return errs
	}
	return nil
}

// Execute finds the image.
func (d *Datasource) Execute() (cty.Value, error) {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	out, err := d.find(ctx)
	if err != nil {
		return cty.NullVal(cty.EmptyObject), errors.New(packersdk.LogSecretFilter.FilterString(err.Error()))
	}
	log.Printf("[INFO] selkies-image-cache: starting from %q, incremental: %t", out.Image, out.Incremental)
	return hcl2helper.HCL2ValueFromConfig(*out, d.OutputSpec()), nil
}

func (d *Datasource) find(ctx context.Context) (*Output, error) {
	c := &d.config
	opts, err := c.Options(ctx, gcp.Compute)
	if err != nil {
		return nil, err
	}
	images, err := compute.NewImagesRESTClient(ctx, opts...)
	if err != nil {
		return nil, fmt.Errorf("connecting to Compute Engine: %w", err)
	}
	defer images.Close()
	if !c.Rebuild {
		last, err := newest(ctx, images, c.ProjectID, c.Family)
		if err != nil {
			return nil, fmt.Errorf("listing the images of family %s in project %s: %w", c.Family, c.ProjectID, gcp.Explain(err))
		}
		if last != nil {
			return output(last, c.ProjectID, true)
		}
	}
	base, err := d.base(ctx, images)
	if err != nil || base == nil {
		return &Output{Labels: map[string]string{}}, err
	}
	return output(base, c.BaseImageProjectID, false)
}

// newest is the newest image of a family that a disk can be made from, or nil. What
// Compute Engine itself calls a family's image may be still in the making.
func newest(ctx context.Context, images *compute.ImagesClient, project, family string) (*computepb.Image, error) {
	var last *computepb.Image
	var lastCreated time.Time
	err := gcp.Retry(ctx, func() error {
		last = nil
		for i, err := range images.List(ctx, &computepb.ListImagesRequest{Project: project, Filter: new("family = " + family)}).All() {
			if err != nil {
				return err
			}
			// The filter matches patterns.
			if i.GetFamily() != family || i.GetStatus() != "READY" || !active(i) {
				continue
			}
			created, err := time.Parse(time.RFC3339, i.GetCreationTimestamp())
			if err != nil {
				return fmt.Errorf("image %s: %w", i.GetName(), err)
			}
			if last == nil || created.After(lastCreated) {
				last, lastCreated = i, created
			}
		}
		return nil
	})
	return last, err
}

func active(i *computepb.Image) bool {
	state := i.GetDeprecated().GetState()
	return state == "" || state == "ACTIVE"
}

// base is the image that the first build starts from, or nil for a blank disk.
func (d *Datasource) base(ctx context.Context, images *compute.ImagesClient) (image *computepb.Image, err error) {
	c := &d.config
	switch {
	case c.BaseImage != "":
		err = gcp.Retry(ctx, func() error {
			image, err = images.Get(ctx, &computepb.GetImageRequest{Project: c.BaseImageProjectID, Image: c.BaseImage})
			return err
		})
		if gcp.IsNotFound(err) {
			return nil, fmt.Errorf("base_image: project %s has no image %s", c.BaseImageProjectID, c.BaseImage)
		}
		if err == nil && (image.GetStatus() != "READY" || !active(image)) {
			return nil, fmt.Errorf("base_image: %s is %s; choose another",
				c.BaseImage, strings.ToLower(cmp.Or(image.GetDeprecated().GetState(), image.GetStatus())))
		}
	case c.BaseImageFamily != "":
		err = gcp.Retry(ctx, func() error {
			image, err = images.GetFromFamily(ctx, &computepb.GetFromFamilyImageRequest{Project: c.BaseImageProjectID, Family: c.BaseImageFamily})
			return err
		})
		if gcp.IsNotFound(err) {
			return nil, fmt.Errorf("base_image_family: project %s has no image of family %s; is base_image_project_id right?", c.BaseImageProjectID, c.BaseImageFamily)
		}
	default:
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("getting the base image from project %s: %w", c.BaseImageProjectID, gcp.Explain(err))
	}
	return image, nil
}

func output(i *computepb.Image, project string, incremental bool) (*Output, error) {
	created, err := time.Parse(time.RFC3339, i.GetCreationTimestamp())
	if err != nil {
		return nil, fmt.Errorf("image %s: %w", i.GetName(), err)
	}
	o := &Output{
		Incremental: incremental,
		Image:       fmt.Sprintf("projects/%s/global/images/%s", project, i.GetName()),
		Name:        i.GetName(),
		ProjectID:   project,
		Family:      i.GetFamily(),
		DiskSizeGB:  int(i.GetDiskSizeGb()),
		Created:     created.UTC().Format(time.RFC3339),
		Labels:      map[string]string{},
	}
	for k, v := range i.GetLabels() {
		o.Labels[k] = v
	}
	return o, nil
}
