package gcp

import (
	"context"
	"testing"

	compute "cloud.google.com/go/compute/apiv1"
	container "cloud.google.com/go/container/apiv1"
	"golang.org/x/oauth2"
	"google.golang.org/api/option"
)

// Clients are Google's own clients, of a server.
type Clients struct {
	Images    *compute.ImagesClient
	Disks     *compute.DisksClient
	Instances *compute.InstancesClient
	Clusters  *container.ClusterManagerClient
}

// Clients makes clients for a test, which may do everything.
func (s *Server) Clients(t testing.TB) *Clients {
	t.Helper()
	options := []option.ClientOption{
		option.WithEndpoint(s.URL),
		option.WithTokenSource(oauth2.StaticTokenSource(&oauth2.Token{AccessToken: s.config.Token})),
	}
	return &Clients{
		Images:    client(t, compute.NewImagesRESTClient, options),
		Disks:     client(t, compute.NewDisksRESTClient, options),
		Instances: client(t, compute.NewInstancesRESTClient, options),
		Clusters:  client(t, container.NewClusterManagerRESTClient, options),
	}
}

func client[C interface{ Close() error }](t testing.TB, f func(context.Context, ...option.ClientOption) (C, error), options []option.ClientOption) C {
	t.Helper()
	c, err := f(t.Context(), options...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	return c
}

// Wait waits for an operation, as the methods of Compute Engine's clients return it,
// to end well.
func Wait(t testing.TB, op *compute.Operation, err error) {
	t.Helper()
	if err == nil {
		err = op.Wait(t.Context())
	}
	if err != nil {
		t.Fatal(err)
	}
}
