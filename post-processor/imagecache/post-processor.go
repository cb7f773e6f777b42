// Package imagecache is the Packer post-processor selkies-image-cache. It brings an
// image of the cache to GKE nodes: a disk per zone, a volume, a claim and a DaemonSet
// for each in every cluster, and the pruning of what nothing uses any more.
package imagecache

import (
	"cmp"
	"context"
	"errors"
	"fmt"

	"github.com/hashicorp/hcl/v2/hcldec"
	packersdk "github.com/hashicorp/packer-plugin-sdk/packer"
)

// builderID is that of the googlecompute builder's artifacts.
const builderID = "packer.googlecompute"

// PostProcessor implements packersdk.PostProcessor.
type PostProcessor struct{ config Config }

var _ packersdk.PostProcessor = (*PostProcessor)(nil)

// ConfigSpec is the HCL2 specification of Config.
func (p *PostProcessor) ConfigSpec() hcldec.ObjectSpec { return p.config.FlatMapstructure().HCL2Spec() }

// Configure decodes and checks the configuration. Its errors name the option.
func (p *PostProcessor) Configure(raws ...any) error { return p.config.prepare(raws...) }

// PostProcess rolls the image out. It always keeps the image: the disks of more
// zones, the next build and a rollback need it. Everything that it makes has a name
// that follows from the image, and a later run adopts or prunes what an earlier one
// left.
func (p *PostProcessor) PostProcess(ctx context.Context, ui packersdk.Ui, artifact packersdk.Artifact) (packersdk.Artifact, bool, bool, error) {
	config := p.config
	r := &run{config: &config, ui: ui}
	defer r.close()
	if err := r.take(artifact); err != nil {
		return nil, true, true, err
	}
	for _, step := range []struct {
		name string
		run  func(context.Context) error
	}{
		{"connecting", r.connect},
		{"finding the image", r.findImage},
		{"finding the injector's image", r.pinInjector},
		{"finding clusters", r.findClusters},
		{"waiting for other runs", r.lead},
		{"looking at what is there", r.look},
		{"making room", r.makeRoom},
		{"making disks", r.makeDisks},
		{"rolling out", r.rollOut},
		{"pruning", r.prune},
	} {
		err := step.run(ctx)
		if ctx.Err() != nil {
			return nil, true, true, fmt.Errorf("%s: %w", step.name, context.Cause(ctx))
		}
		if err != nil {
			return nil, true, true, errors.New(packersdk.LogSecretFilter.FilterString(err.Error()))
		}
	}
	if err := r.failed(); err != nil {
		return nil, true, true, errors.New(packersdk.LogSecretFilter.FilterString(err.Error()))
	}
	return r.result(), true, true, nil
}

// take takes from the artifact what the configuration leaves open.
func (r *run) take(artifact packersdk.Artifact) error {
	c := r.config
	r.goBack = c.ImageName != ""
	if artifact.BuilderId() == builderID {
		c.ImageName = cmp.Or(c.ImageName, artifact.Id())
		project, _ := artifact.State("ProjectId").(string)
		c.ProjectID = cmp.Or(c.ProjectID, project)
	} else if c.ImageName == "" {
		return fmt.Errorf("the artifact comes from %s, not from the googlecompute builder; set image_name for an image that is there already", artifact.BuilderId())
	}
	if c.ProjectID == "" {
		return errors.New("project_id is not set, and the artifact has none")
	}
	c.ImageProjectID = cmp.Or(c.ImageProjectID, c.ProjectID)
	return nil
}

// artifact is what a run leaves.
type artifact struct {
	image    string
	disks    []string // projects/PROJECT/zones/ZONE/disks/DISK
	clusters int
}

func (r *run) result() packersdk.Artifact {
	a := &artifact{image: r.generation.name(), clusters: len(r.clusters)}
	for _, zone := range r.zones {
		a.disks = append(a.disks, fmt.Sprintf("projects/%s/zones/%s/disks/%s", r.config.ProjectID, zone, r.diskName(zone)))
	}
	return a
}

func (a *artifact) BuilderId() string { return "packer.post-processor.selkies-image-cache" } //nolint:revive // the interface's name
func (a *artifact) Id() string        { return a.image }                                     //nolint:revive // the interface's name
func (a *artifact) Files() []string   { return nil }

func (a *artifact) String() string {
	return fmt.Sprintf("Image %s is on %d disks, in %d clusters", a.image, len(a.disks), a.clusters)
}

// State has the disks under "Disks".
func (a *artifact) State(name string) any {
	if name == "Disks" {
		return a.disks
	}
	return nil
}

// Destroy does nothing: nodes may use the disks by now.
func (a *artifact) Destroy() error { return nil }
