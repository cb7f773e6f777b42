//go:generate packer-sdc struct-markdown
//go:generate packer-sdc mapstructure-to-hcl2 -type Config

package imagecache

import (
	"cmp"
	"errors"
	"fmt"
	"maps"
	"regexp"
	"slices"
	"time"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/hashicorp/packer-plugin-sdk/common"
	packersdk "github.com/hashicorp/packer-plugin-sdk/packer"
	"github.com/hashicorp/packer-plugin-sdk/template/config"
	"github.com/hashicorp/packer-plugin-sdk/template/interpolate"

	"github.com/selkies-project/packer-plugin-selkies/gcp"
)

// Config is the configuration of the post-processor.
type Config struct {
	common.PackerConfig `mapstructure:",squash"`
	gcp.Auth            `mapstructure:",squash"`

	// The project that gets the disks and has the clusters. Defaults to the project
	// of the build.
	ProjectID string `mapstructure:"project_id"`
	// The project that has the image. Defaults to `project_id`.
	ImageProjectID string `mapstructure:"image_project_id"`
	// The image to roll out, for a rollback to an earlier generation. The build's artifact
	// is then ignored. Defaults to the image that was built. See
	// [Rolling back](#rolling-back).
	ImageName string `mapstructure:"image_name"`
	// The name of the cache: the prefix of the names of its disks and Kubernetes objects,
	// and the value of their label `selkies-image-cache`. Caches that share a
	// project need different names. Defaults to `selkies-image-cache`.
	CacheName string `mapstructure:"cache_name"`
	// The zones that get a disk. Defaults to all zones in which the clusters have node
	// pools.
	Zones []string `mapstructure:"zones"`
	// A regular expression for the names of the project's GKE clusters that the cache
	// is rolled out to, such as `^desktops-`; clusters of Selkies have `^broker-`.
	// Required unless `kubeconfig` is set, or `skip_rollout` with `zones`.
	ClusterPattern string `mapstructure:"cluster_pattern"`
	// Regions whose clusters are left out, such as `["europe-west4"]`. By default none.
	ExcludeRegions []string `mapstructure:"exclude_regions"`
	// Which endpoint of the clusters' control planes to use: `public`, `private` or
	// `dns`. Defaults to `public`.
	ClusterEndpoint string `mapstructure:"cluster_endpoint"`
	// A kubeconfig file: the cache is rolled out to its cluster only. Needs `zones`.
	// By default the clusters come from GKE.
	Kubeconfig string `mapstructure:"kubeconfig"`
	// The context in the kubeconfig. Defaults to its current context.
	KubeconfigContext string `mapstructure:"kubeconfig_context"`
	// Make the disks, but roll nothing out. Nothing is pruned, since it is not known which
	// disks are in use. Defaults to `false`.
	SkipRollout bool `mapstructure:"skip_rollout"`
	// The type of the disks. Defaults to `pd-balanced`.
	DiskType string `mapstructure:"disk_type"`
	// The size of the disks in GB, at least the image's. The throughput of a disk
	// grows with its size, and all nodes of a zone share it. Defaults to the image's
	// size.
	DiskSizeGB int `mapstructure:"disk_size_gb"`
	// Labels for the disks, in addition to `selkies-image-cache` and
	// `selkies-image-cache-image`. By default none.
	DiskLabels map[string]string `mapstructure:"disk_labels"`
	// The injector's container image. Required unless `skip_rollout`. Packer resolves it
	// to its current digest, which the clusters get. For that it uses Docker's
	// credentials, or those below for Google's registries.
	InjectorImage string `mapstructure:"injector_image"`
	// The platform of the nodes, which `injector_image` must support. Defaults to
	// `linux/amd64`.
	Platform string `mapstructure:"platform"`
	// Labels that a node must have to get the cache, such as
	// `{ "app.broker/tier" = "gpu-cos" }`. Defaults to all nodes of the zones.
	NodeSelector map[string]string `mapstructure:"node_selector"`
	// How long the first pod of a new generation, if there are nodes for it, and the first
	// of the gate may take to become ready. If none does, the former state is restored.
	// Defaults to `5m`.
	StartTimeout time.Duration `mapstructure:"start_timeout"`
	// How many generations to keep, including the new one. Generations that nodes still use
	// are always kept. Defaults to 2.
	Keep int `mapstructure:"keep"`
	// The prefix of the names of the builder's own disks, ending in a dash, such as
	// `selkies-image-cache-build-`. Disks with such names in `project_id` that nothing has
	// used for an hour are deleted, as leftovers of a killed build. See
	// [What a killed build leaves](#what-a-killed-build-leaves). By default none are
	// deleted.
	BuilderDiskPrefix string `mapstructure:"builder_disk_prefix"`
	// Report what would be done, and change nothing. Defaults to `false`.
	DryRun bool `mapstructure:"dry_run"`
	// A directory to write the manifests to, one file for each cluster, instead of
	// applying them. Disks are made, but former generations are neither locked nor pruned.
	// By default the manifests are applied.
	OutputDir string `mapstructure:"output_dir"`

	clusterRE *regexp.Regexp
	injector  name.Reference
	platform  *v1.Platform
	ctx       interpolate.Context
}

const (
	defaultName = "selkies-image-cache"

	// The length of the longest zone's name, northamerica-northeast1-a, and of a Unix
	// time in seconds.
	longestZone = 25
	stampLength = 10
	maxName     = 63
)

var (
	nameRE   = regexp.MustCompile(`^[a-z]([a-z0-9-]*[a-z0-9])?$`)
	prefixRE = regexp.MustCompile(`^[a-z][a-z0-9-]*[a-z0-9]-$`)
	zoneRE   = regexp.MustCompile(`^[a-z]+-[a-z]+[0-9]+-([a-z]|ai[0-9]+[a-z])$`)
	labelRE  = regexp.MustCompile(`^[a-z][a-z0-9_-]{0,62}$`)
)

func (c *Config) prepare(raws ...any) error {
	err := config.Decode(c, &config.DecodeOpts{
		PluginType:         "selkies-image-cache",
		Interpolate:        true,
		InterpolateContext: &c.ctx,
	}, raws...)
	if err != nil {
		return err
	}
	c.setDefaults()
	errs := packersdk.MultiErrorAppend(nil, c.Prepare()...)
	fail := func(format string, a ...any) {
		errs = packersdk.MultiErrorAppend(errs, fmt.Errorf(format, a...))
	}
	if !nameRE.MatchString(c.CacheName) {
		fail("cache_name %q is not lower case letters, digits and dashes", c.CacheName)
	}
	if longest := maxName - longestZone - stampLength - 2; len(c.CacheName) > longest {
		fail("cache_name %q is too long: with zone and time the names of disks would have more than %d characters; choose one of at most %d", c.CacheName, maxName, longest)
	}
	for i, z := range c.Zones {
		if !zoneRE.MatchString(z) {
			fail("zones[%d]: %q is not a zone such as europe-west4-a", i, z)
		}
		if slices.Contains(c.Zones[:i], z) {
			fail("zones[%d]: %q is there twice", i, z)
		}
	}
	for i, region := range c.ExcludeRegions {
		if gcp.Region(region) != region {
			fail("exclude_regions[%d]: %q is a zone; name its region, %s", i, region, gcp.Region(region))
		}
	}
	if c.clusterRE, err = regexp.Compile(c.ClusterPattern); err != nil {
		fail("cluster_pattern: %w", err)
	}
	if !slices.Contains(gcp.Endpoints, c.ClusterEndpoint) {
		fail("cluster_endpoint is %q; choose one of %q", c.ClusterEndpoint, gcp.Endpoints)
	}
	for _, k := range slices.Sorted(maps.Keys(c.DiskLabels)) {
		if !labelRE.MatchString(k) || k == labelName || k == labelImage {
			fail("disk_labels: %q cannot be used as the name of a label", k)
		}
	}
	if c.BuilderDiskPrefix != "" && !prefixRE.MatchString(c.BuilderDiskPrefix) {
		fail("builder_disk_prefix %q is not lower case letters, digits and dashes, with a dash at the end", c.BuilderDiskPrefix)
	}
	if c.DiskSizeGB < 0 {
		fail("disk_size_gb is %d; leave it out for the image's size", c.DiskSizeGB)
	}
	if c.Keep < 1 {
		fail("keep is %d; choose 1 or more", c.Keep)
	}
	check := func(err error) {
		if err != nil {
			errs = packersdk.MultiErrorAppend(errs, err)
		}
	}
	check(c.prepareInjector())
	check(c.prepareTargets())
	if len(errs.Errors) > 0 {
		return errs
	}
	return nil
}

func (c *Config) prepareInjector() (err error) {
	if c.SkipRollout {
		return nil
	}
	if c.InjectorImage == "" {
		return errors.New("injector_image is not set; name the injector's container image, or set skip_rollout")
	}
	if c.injector, err = name.ParseReference(c.InjectorImage); err != nil {
		return fmt.Errorf("injector_image: %w", err)
	}
	c.platform, err = v1.ParsePlatform(c.Platform)
	if err != nil || c.platform.Architecture == "" {
		return fmt.Errorf("platform %q is not os/architecture[/variant], such as linux/amd64", c.Platform)
	}
	return nil
}

func (c *Config) prepareTargets() error {
	switch {
	case c.Kubeconfig == "" && c.KubeconfigContext != "":
		return errors.New("kubeconfig_context is set without kubeconfig")
	case c.Kubeconfig == "" && c.ClusterPattern == "" && (!c.SkipRollout || len(c.Zones) == 0):
		return errors.New("cluster_pattern is not set; give a regular expression for the names of the clusters, such as ^desktops-")
	case c.Kubeconfig != "" && len(c.Zones) == 0:
		return errors.New("kubeconfig is set without zones, which a kubeconfig does not have")
	case c.SkipRollout && c.OutputDir != "":
		return errors.New("skip_rollout and output_dir are both set; choose one")
	}
	return nil
}

func (c *Config) setDefaults() {
	c.CacheName = cmp.Or(c.CacheName, defaultName)
	c.ClusterEndpoint = cmp.Or(c.ClusterEndpoint, gcp.EndpointPublic)
	c.DiskType = cmp.Or(c.DiskType, "pd-balanced")
	c.Platform = cmp.Or(c.Platform, "linux/amd64")
	c.StartTimeout = cmp.Or(c.StartTimeout, 5*time.Minute)
	c.Keep = cmp.Or(c.Keep, 2)
}
