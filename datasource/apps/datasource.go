//go:generate packer-sdc struct-markdown
//go:generate packer-sdc mapstructure-to-hcl2 -type Config,Output

// Package apps is the Packer data source selkies-apps. It lists the images that a
// cluster's Selkies App Launcher can start, so that the cache holds exactly those.
package apps

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/hashicorp/hcl/v2/hcldec"
	"github.com/hashicorp/packer-plugin-sdk/common"
	packersdk "github.com/hashicorp/packer-plugin-sdk/packer"
	"github.com/hashicorp/packer-plugin-sdk/template/config"
	"github.com/zclconf/go-cty/cty"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/dynamic"

	"github.com/selkies-project/packer-plugin-selkies/gcp"
)

// timeout bounds the reading: Packer has no way to cancel a data source.
const timeout = 5 * time.Minute

var resource = schema.GroupVersionResource{Group: "gcp.solutions", Version: "v1", Resource: "brokerappconfigs"}

// Config is the configuration of the data source.
type Config struct {
	common.PackerConfig `mapstructure:",squash"`
	gcp.Auth            `mapstructure:",squash"`

	// The kubeconfig file of the cluster. By default, and without `cluster`, the one that
	// kubectl would use; in a pod, the cluster that the pod runs in.
	Kubeconfig string `mapstructure:"kubeconfig"`
	// The context in the kubeconfig. Defaults to its current context.
	KubeconfigContext string `mapstructure:"kubeconfig_context"`
	// The name of a GKE cluster to read from. By default the kubeconfig's cluster is read.
	Cluster string `mapstructure:"cluster"`
	// The region or zone of `cluster`. Required only if several clusters have that name.
	Location string `mapstructure:"location"`
	// The project that has `cluster`. Required with `cluster`.
	ProjectID string `mapstructure:"project_id"`
	// Which endpoint of the control plane of `cluster` to use: `public`, `private` or
	// `dns`. Defaults to `public`.
	ClusterEndpoint string `mapstructure:"cluster_endpoint"`
	// The namespace of the `BrokerAppConfig` objects. Defaults to `pod-broker-system`.
	Namespace string `mapstructure:"namespace"`
}

// Output is what the data source finds.
type Output struct {
	// The references of all images of all apps that are not disabled, sorted, each
	// once. Use them as `images` of the provisioner.
	Images []string `mapstructure:"images"`
	// The names of these apps, sorted.
	Apps []string `mapstructure:"apps"`
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
	if err := config.Decode(c, &config.DecodeOpts{PluginType: "selkies-apps", Interpolate: true}, raws...); err != nil {
		return err
	}
	c.Namespace = cmp.Or(c.Namespace, "pod-broker-system")
	c.ClusterEndpoint = cmp.Or(c.ClusterEndpoint, gcp.EndpointPublic)
	errs := packersdk.MultiErrorAppend(nil, c.Prepare()...)
	fail := func(format string, a ...any) {
		errs = packersdk.MultiErrorAppend(errs, fmt.Errorf(format, a...))
	}
	switch {
	case c.Cluster != "" && (c.Kubeconfig != "" || c.KubeconfigContext != ""):
		fail("cluster and kubeconfig are both set; choose one")
	case c.Cluster != "" && c.ProjectID == "":
		fail("cluster is set without project_id")
	case c.Cluster == "" && c.Location != "":
		fail("location is set without cluster")
	}
	if !slices.Contains(gcp.Endpoints, c.ClusterEndpoint) {
		fail("cluster_endpoint is %q; choose one of %q", c.ClusterEndpoint, gcp.Endpoints)
	}
	if len(errs.Errors) > 0 {
		return errs
	}
	return nil
}

// Execute reads the objects.
func (d *Datasource) Execute() (cty.Value, error) {
	ctx, cancel := context.WithTimeout(context.Background(), timeout)
	defer cancel()
	out, err := d.read(ctx)
	if err != nil {
		return cty.NullVal(cty.EmptyObject), errors.New(packersdk.LogSecretFilter.FilterString(err.Error()))
	}
	return cty.ObjectVal(map[string]cty.Value{"images": list(out.Images), "apps": list(out.Apps)}), nil
}

// list is like the SDK's, which cannot do empty ones.
func list(items []string) cty.Value {
	values := make([]cty.Value, len(items))
	for i, s := range items {
		values[i] = cty.StringVal(s)
	}
	if len(values) == 0 {
		return cty.ListValEmpty(cty.String)
	}
	return cty.ListVal(values)
}

func (d *Datasource) read(ctx context.Context) (*Output, error) {
	cluster, err := d.cluster(ctx)
	if err != nil {
		return nil, err
	}
	client, err := connect(cluster)
	if err != nil {
		return nil, fmt.Errorf("connecting to cluster %s: %w", cluster, err)
	}
	objects, err := client.Resource(resource).Namespace(d.config.Namespace).List(ctx, metav1.ListOptions{})
	switch {
	case apierrors.IsNotFound(err):
		return nil, fmt.Errorf("cluster %s has no BrokerAppConfig objects; is the App Launcher installed there?", cluster)
	case apierrors.IsForbidden(err):
		return nil, fmt.Errorf("reading the apps of cluster %s: %w; bind a Kubernetes role that may list brokerappconfigs.gcp.solutions in namespace %s", cluster, err, d.config.Namespace)
	case err != nil:
		return nil, fmt.Errorf("reading the apps of cluster %s: %w", cluster, err)
	}
	out := &Output{}
	for _, o := range objects.Items {
		var app appConfig
		if err := runtime.DefaultUnstructuredConverter.FromUnstructured(o.Object, &app); err != nil {
			return nil, fmt.Errorf("reading app %s of cluster %s: %w", o.GetName(), cluster, err)
		}
		if app.Spec.Disabled {
			continue
		}
		images, err := app.images()
		if err != nil {
			return nil, fmt.Errorf("app %s of cluster %s: %w", o.GetName(), cluster, err)
		}
		out.Apps = append(out.Apps, o.GetName())
		out.Images = append(out.Images, images...)
	}
	slices.Sort(out.Apps)
	slices.Sort(out.Images)
	out.Images = slices.Compact(out.Images)
	return out, nil
}

func connect(cluster *gcp.Cluster) (*dynamic.DynamicClient, error) {
	config, err := cluster.Config()
	if err != nil {
		return nil, err
	}
	return dynamic.NewForConfig(config)
}

func (d *Datasource) cluster(ctx context.Context) (*gcp.Cluster, error) {
	c := &d.config
	if c.Cluster == "" {
		return gcp.Kubeconfig(c.Kubeconfig, c.KubeconfigContext)
	}
	all, err := c.Clusters(ctx, c.ProjectID, c.ClusterEndpoint)
	if err != nil {
		return nil, err
	}
	all = slices.DeleteFunc(all, func(k *gcp.Cluster) bool {
		return k.Name != c.Cluster || c.Location != "" && k.Location != c.Location
	})
	switch len(all) {
	case 0:
		return nil, fmt.Errorf("project %s has no running cluster %s; check cluster and location", c.ProjectID, c.Cluster)
	case 1:
		return all[0], nil
	}
	return nil, fmt.Errorf("project %s has several clusters named %s: %s; set location", c.ProjectID, c.Cluster, all)
}
