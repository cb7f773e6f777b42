package gcp

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/http"
	"slices"
	"strings"
	"time"

	container "cloud.google.com/go/container/apiv1"
	"cloud.google.com/go/container/apiv1/containerpb"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/selkies-project/packer-plugin-selkies/version"
)

// clusterTimeout bounds one request to a cluster, so that one that swallows packets
// does not hold up the others.
const clusterTimeout = 30 * time.Second

// Which address of a GKE cluster's control plane to use.
const (
	EndpointPublic  = "public"
	EndpointPrivate = "private"
	EndpointDNS     = "dns"
)

// Endpoints are all of them.
var Endpoints = []string{EndpointPublic, EndpointPrivate, EndpointDNS}

// Cluster is a cluster and the way to it.
type Cluster struct {
	Name     string
	Location string   // a zone or a region; "" of a kubeconfig's
	Zones    []string // of its node pools
	// BootImages are the images that node pools make secondary boot disks from, in the
	// words of their settings.
	BootImages []string

	// auto are the zones in which GKE may make node pools by itself.
	auto   []string
	config *rest.Config
	err    error // why there is none
}

// Config is the way to the cluster's API server. Callers get one of their own.
func (c *Cluster) Config() (*rest.Config, error) {
	if c.err != nil {
		return nil, c.err
	}
	return rest.CopyConfig(c.config), nil
}

// String is LOCATION/NAME, or a kubeconfig's context.
func (c *Cluster) String() string {
	if c.Location == "" {
		return c.Name
	}
	return c.Location + "/" + c.Name
}

// Region is the region that the cluster is in.
func (c *Cluster) Region() string { return Region(c.Location) }

// Region is the region of a zone; a region's is itself.
func Region(location string) string {
	parts := strings.SplitN(location, "-", 3) // us-central1-ai1a is a zone, too
	return strings.Join(parts[:min(2, len(parts))], "-")
}

// MayHave tells whether the cluster has nodes in a zone, or can get them without a
// change of its settings.
func (c *Cluster) MayHave(zone string) bool {
	return slices.Contains(c.Zones, zone) || slices.Contains(c.auto, zone)
}

// Clusters lists a project's GKE clusters, with the zones that their node pools are
// in. Clusters that have no control plane yet or any more are left out.
func (a *Auth) Clusters(ctx context.Context, project, endpoint string) ([]*Cluster, error) {
	opts, err := a.Options(ctx, Container)
	if err != nil {
		return nil, err
	}
	client, err := container.NewClusterManagerRESTClient(ctx, opts...)
	if err != nil {
		return nil, fmt.Errorf("connecting to GKE: %w", err)
	}
	defer client.Close()
	var list *containerpb.ListClustersResponse
	err = Retry(ctx, func() (err error) {
		list, err = client.ListClusters(ctx, &containerpb.ListClustersRequest{Parent: "projects/" + project + "/locations/-"})
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("listing the GKE clusters of project %s: %w", project, Explain(err))
	}
	if len(list.GetMissingZones()) > 0 {
		return nil, fmt.Errorf("listing the GKE clusters of project %s: GKE has no answer from %s; try again later",
			project, strings.Join(list.GetMissingZones(), ", "))
	}
	var clusters []*Cluster
	for _, c := range list.GetClusters() {
		switch c.GetStatus() {
		case containerpb.Cluster_PROVISIONING, containerpb.Cluster_STOPPING:
			continue
		}
		config, err := a.restConfig(c, endpoint)
		clusters = append(clusters, &Cluster{
			Name: c.GetName(), Location: c.GetLocation(), Zones: zones(c), BootImages: bootImages(c), auto: autoZones(c),
			config: config, err: err,
		})
	}
	slices.SortFunc(clusters, func(a, b *Cluster) int { return strings.Compare(a.String(), b.String()) })
	return clusters, nil
}

// zones are those of all node pools, even of pools without a node: autoscaling may
// make one at any moment.
func zones(c *containerpb.Cluster) []string {
	set := map[string]bool{}
	for _, pool := range c.GetNodePools() {
		for _, z := range pool.GetLocations() {
			set[z] = true
		}
	}
	if len(set) == 0 {
		for _, z := range c.GetLocations() {
			set[z] = true
		}
	}
	return slices.Sorted(maps.Keys(set))
}

// autoZones are those in which GKE may make node pools: Autopilot or node
// auto-provisioning does.
func autoZones(c *containerpb.Cluster) []string {
	if !c.GetAutopilot().GetEnabled() && !c.GetAutoscaling().GetEnableNodeAutoprovisioning() {
		return nil
	}
	return slices.Concat(c.GetLocations(), c.GetAutoscaling().GetAutoprovisioningLocations())
}

func bootImages(c *containerpb.Cluster) (images []string) {
	for _, pool := range c.GetNodePools() {
		for _, d := range pool.GetConfig().GetSecondaryBootDisks() {
			images = append(images, d.GetDiskImage())
		}
	}
	return images
}

func (a *Auth) restConfig(c *containerpb.Cluster, endpoint string) (*rest.Config, error) {
	config := &rest.Config{
		Timeout:   clusterTimeout,
		UserAgent: "packer-plugin-selkies/" + version.String(),
		WrapTransport: func(next http.RoundTripper) http.RoundTripper {
			return &bearer{auth: a, next: next}
		},
	}
	host := c.GetEndpoint()
	switch endpoint {
	case EndpointPrivate:
		host = c.GetPrivateClusterConfig().GetPrivateEndpoint() //nolint:staticcheck // for where the newer field is not set
		if p := c.GetControlPlaneEndpointsConfig().GetIpEndpointsConfig().GetPrivateEndpoint(); p != "" {
			host = p
		}
	case EndpointDNS:
		host = c.GetControlPlaneEndpointsConfig().GetDnsEndpointConfig().GetEndpoint()
	}
	if host == "" {
		return nil, fmt.Errorf("it has no %s endpoint; choose another cluster_endpoint", endpoint)
	}
	config.Host = "https://" + host
	if endpoint != EndpointDNS { // whose certificate is a public one
		ca, err := base64.StdEncoding.DecodeString(c.GetMasterAuth().GetClusterCaCertificate())
		if err != nil {
			return nil, fmt.Errorf("reading its certificate: %w", err)
		}
		config.CAData = ca
	}
	return config, nil
}

// bearer adds the access token to requests, renewed when it is about to expire.
type bearer struct {
	auth *Auth
	next http.RoundTripper
}

func (b *bearer) RoundTrip(r *http.Request) (*http.Response, error) {
	token, err := b.auth.token(r.Context())
	if err != nil {
		return nil, err
	}
	r = r.Clone(r.Context())
	r.Header.Set("Authorization", "Bearer "+token)
	return b.next.RoundTrip(r)
}

// Kubeconfig is the cluster of a kubeconfig file's context. Without a file it is
// what kubectl would use, and in a pod the cluster that it runs in.
func Kubeconfig(file, context string) (*Cluster, error) {
	rules := clientcmd.NewDefaultClientConfigLoadingRules()
	rules.ExplicitPath = file
	loader := clientcmd.NewNonInteractiveDeferredLoadingClientConfig(rules, &clientcmd.ConfigOverrides{CurrentContext: context})
	config, err := loader.ClientConfig()
	if clientcmd.IsEmptyConfig(err) {
		return nil, errors.New("there is no kubeconfig; set kubeconfig or cluster")
	}
	if err != nil {
		return nil, fmt.Errorf("reading the kubeconfig: %w", err)
	}
	config.Timeout = clusterTimeout
	config.UserAgent = "packer-plugin-selkies/" + version.String()
	name := context
	if raw, err := loader.RawConfig(); err == nil && name == "" {
		name = raw.CurrentContext
	}
	if name == "" {
		name = "in-cluster"
	}
	return &Cluster{Name: name, config: config}, nil
}

// IsUnreachable tells whether a cluster gave no answer at all.
func IsUnreachable(err error) bool {
	_, ok := errors.AsType[net.Error](err)
	return ok
}
