package gcp

import (
	"context"
	"fmt"
	"strings"
	"time"

	compute "cloud.google.com/go/compute/apiv1"
	"cloud.google.com/go/compute/apiv1/computepb"
)

const (
	// How often an operation is looked at. Disks of images take half a minute.
	pollInterval = 2 * time.Second
	// How often in a row a request may fail before it counts.
	maxAttempts = 10
)

// OperationError is an operation of Compute Engine that ended with an error.
type OperationError struct {
	// Code is such as QUOTA_EXCEEDED.
	Code    string
	Message string
	// Status is what the request would have been answered if the failure had been known
	// by then, 0 if that is not said.
	Status int
}

func (e *OperationError) Error() string {
	remedy := ""
	switch {
	case strings.HasPrefix(e.Code, "QUOTA"):
		remedy = "; ask for a higher quota, or ask for less"
	case strings.HasPrefix(e.Code, "ZONE_RESOURCE_POOL_EXHAUSTED"):
		remedy = "; try later or leave the zone out"
	}
	return fmt.Sprintf("%s: %s%s", e.Code, strings.Join(strings.Fields(e.Message), " "), remedy)
}

// Wait waits for the end of an operation, whatever happens to the connection
// meanwhile. An operation that failed gives an *OperationError. tell is called with
// each new percentage. Cancelling ctx ends the wait and not the operation.
func Wait(ctx context.Context, op *compute.Operation, tell func(percent int)) error {
	told := -1
	for {
		if err := Retry(ctx, func() error { return poll(ctx, op) }); err != nil {
			return err
		}
		if op.Done() {
			return operationError(op.Proto())
		}
		if p := int(op.Proto().GetProgress()); p > told {
			told = p
			tell(p)
		}
		if err := Sleep(ctx, pollInterval); err != nil {
			return err
		}
	}
}

// poll asks how far an operation is. The client gives an operation that failed as an
// error of the request, too.
func poll(ctx context.Context, op *compute.Operation) error {
	if op.Done() {
		return nil
	}
	if err := op.Poll(ctx); err != nil && !op.Done() {
		return err
	}
	return nil
}

func operationError(op *computepb.Operation) error {
	errs := op.GetError().GetErrors()
	if len(errs) > 0 {
		return &OperationError{Code: errs[0].GetCode(), Message: errs[0].GetMessage(), Status: int(op.GetHttpErrorStatusCode())}
	}
	if c := op.GetHttpErrorStatusCode(); c >= 400 {
		return &OperationError{Code: fmt.Sprint(c), Message: op.GetHttpErrorMessage(), Status: int(c)}
	}
	return nil
}

// Retry repeats a request that may be repeated as long as it fails for want of a
// connection or on the server's side.
func Retry(ctx context.Context, request func() error) error {
	for attempt := 1; ; attempt++ {
		err := request()
		if err == nil || ctx.Err() != nil || attempt == maxAttempts || !isTransient(err) {
			return err
		}
		if err := Sleep(ctx, min(time.Duration(attempt)*500*time.Millisecond, pollInterval)); err != nil {
			return err
		}
	}
}

// Sleep waits, or until ctx ends.
func Sleep(ctx context.Context, d time.Duration) error {
	timer := time.NewTimer(d)
	defer timer.Stop()
	select {
	case <-timer.C:
		return nil
	case <-ctx.Done():
		return context.Cause(ctx)
	}
}
