package imagecache

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"
)

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
	if _, silent := errors.AsType[silence](err); silent || errors.Is(err, errDiskFull) || errors.Is(err, errLost) {
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
