package imagecache

import (
	"context"
	"errors"

	"golang.org/x/sync/errgroup"
)

// noSpace is ENOSPC in Docker's words.
const noSpace = "no space left on device"

var errDiskFull = errors.New("the disk is full; use a larger one, or list fewer images")

func isDiskFull(f failure) bool { return errors.Is(f.err, errDiskFull) }

// each calls do for every item, in the order given and several at once, and returns
// their errors. An item that fails does not stop the others, except when the disk is
// full: then that is the error of all that were not done. Nor is anything done with a
// Docker that is silent: that is the error of each itself.
func each[T any](ctx context.Context, concurrency int, items []T, do func(context.Context, T) error) ([]error, error) {
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	var g errgroup.Group
	g.SetLimit(concurrency)
	errs := make([]error, len(items))
	for i, item := range items {
		g.Go(func() error {
			if ctx.Err() != nil {
				errs[i] = context.Cause(ctx)
				return nil
			}
			errs[i] = do(ctx, item)
			if errors.Is(errs[i], errDiskFull) {
				stop(errDiskFull)
			}
			if silent, ok := errors.AsType[silence](errs[i]); ok {
				stop(silent)
			}
			return nil
		})
	}
	_ = g.Wait() // errs has them
	cause := context.Cause(ctx)
	if cause != nil && !errors.Is(cause, errDiskFull) {
		return nil, cause
	}
	for i := range errs {
		if errs[i] != nil && cause != nil {
			errs[i] = cause
		}
	}
	return errs, nil
}
