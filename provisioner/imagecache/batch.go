package imagecache

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"
)

// noSpace is ENOSPC in Docker's words.
const noSpace = "no space left on device"

var errDiskFull = errors.New("the disk is full; use a larger one, or list fewer images")

func isDiskFull(f failure) bool { return errors.Is(f.err, errDiskFull) }

// each calls do for every item, in the order given and several at once, and returns
// their errors. An item that fails does not stop the others, except when the disk is
// full: then that is the error of all that were not done.
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
			if errs[i] = do(ctx, item); errors.Is(errs[i], errDiskFull) {
				stop(errDiskFull)
			}
			return nil
		})
	}
	g.Wait()
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

// patience is how errors that may pass are waited out.
type patience struct {
	attempts int
	say      func(format string, a ...any)
}

// try calls do until it succeeds, fails for good or has been called attempts times.
func (p patience) try(ctx context.Context, what string, do func() error) error {
	delay := time.Second
	for attempt := 1; ; attempt++ {
		err := do()
		if err == nil || ctx.Err() != nil || !mayPass(err) {
			return err
		}
		if attempt == p.attempts {
			return fmt.Errorf("%w (%d attempts; see max_pull_attempts)", err, attempt)
		}
		p.say("%s: %v; trying again in %s (attempt %d of %d)", what, err, delay, attempt+1, p.attempts)
		timer := time.NewTimer(delay)
		select {
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return ctx.Err()
		}
		delay = min(2*delay, 30*time.Second)
	}
}

// mayPass reports whether an error of Docker or of a registry may be gone at the next
// attempt.
func mayPass(err error) bool {
	if errors.Is(err, errDiskFull) || errors.Is(err, errLost) {
		return false
	}
	// Errors in the stream of a pull that has begun have no type.
	for _, final := range []string{"unauthorized", "denied", "refused access", "manifest unknown", "not found", "unsupported", "failed to register layer", "does not match the specified platform", plainHTTP, unknownCertificate} {
		if strings.Contains(err.Error(), final) {
			return false
		}
	}
	return true
}
