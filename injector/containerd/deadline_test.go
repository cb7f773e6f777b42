package containerd

import (
	"context"
	"errors"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/containerd/containerd/v2/client"
	"github.com/containerd/containerd/v2/core/content"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"google.golang.org/grpc"
)

// TestBounded has a containerd whose calls hang: they end, the stream of events does not.
func TestBounded(t *testing.T) {
	address := filepath.Join(t.TempDir(), "socket")
	l, err := net.Listen("unix", address)
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer(grpc.UnknownServiceHandler(func(_ any, s grpc.ServerStream) error {
		<-s.Context().Done()
		return s.Context().Err()
	}))
	go func() { _ = server.Serve(l) }()
	defer server.Stop()
	const short = 100 * time.Millisecond
	c, err := client.New(address, client.WithExtraDialOpts(bounded(func(method string) time.Duration {
		return min(limit(method), short)
	})))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	ctx, cancel := context.WithCancel(namespaces.WithNamespace(t.Context(), "test"))
	defer cancel()
	_, events := c.Subscribe(ctx)

	r := &Runtime{opt: Options{Address: address}, client: c}
	for name, call := range map[string]func() error{
		"unary": func() error {
			_, err := c.LeasesService().List(ctx)
			return err
		},
		"stream": func() error { return c.ContentStore().Walk(ctx, func(content.Info) error { return nil }) },
	} {
		t.Run(name, func(t *testing.T) {
			err := call()
			if !errors.Is(err, context.DeadlineExceeded) {
				t.Fatalf("got %v", err)
			}
			if got := r.explain(err).Error(); !strings.Contains(got, "containerd at "+address+" does not answer: restart it") {
				t.Errorf("explained as %q", got)
			}
		})
	}
	if err := r.Check(ctx); err == nil || !strings.Contains(err.Error(), "containerd at "+address+" does not answer: restart it") {
		t.Errorf("Check says %v", err)
	}
	select {
	case err := <-events:
		t.Errorf("the stream of events ended: %v", err)
	case <-time.After(3 * short):
	}
}
