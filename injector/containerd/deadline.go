package containerd

import (
	"context"
	"time"

	"google.golang.org/grpc"
)

const (
	// callTime bounds every call to containerd, so that one that hangs ends the run and
	// frees the lock. What is asked takes milliseconds, but can wait for the database
	// while a pull's layer is committed, whose files are counted in the transaction.
	callTime = 2 * time.Minute
	// collectTime bounds the deletion of a lease, which waits for garbage collection:
	// that removes the directories of images that others have removed.
	collectTime = 10 * time.Minute
)

// limit is how long a call may take; 0 is for the stream of events, which never ends.
func limit(method string) time.Duration {
	switch method {
	case "/containerd.services.events.v1.Events/Subscribe":
		return 0
	case "/containerd.services.leases.v1.Leases/Delete":
		return collectTime
	}
	return callTime
}

// bounded are the options of a connection on which no call lasts longer than limit says.
func bounded(limit func(method string) time.Duration) []grpc.DialOption {
	unary := func(ctx context.Context, method string, req, reply any, cc *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
		ctx, cancel := context.WithTimeout(ctx, limit(method))
		defer cancel()
		return invoke(ctx, method, req, reply, cc, opts...)
	}
	stream := func(ctx context.Context, desc *grpc.StreamDesc, cc *grpc.ClientConn, method string, open grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
		d := limit(method)
		if d == 0 {
			return open(ctx, desc, cc, method, opts...)
		}
		ctx, cancel := context.WithTimeout(ctx, d)
		s, err := open(ctx, desc, cc, method, opts...)
		if err != nil {
			cancel()
			return nil, err
		}
		// The stream's own context ends with it.
		context.AfterFunc(s.Context(), cancel)
		return s, nil
	}
	return []grpc.DialOption{grpc.WithChainUnaryInterceptor(unary), grpc.WithChainStreamInterceptor(stream)}
}
