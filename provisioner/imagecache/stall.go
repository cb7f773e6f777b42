package imagecache

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"time"
)

// stallLimit is how long nothing may come from a registry, or from Docker on the build VM.
// Neither Docker nor the clients have such a limit.
const stallLimit = 5 * time.Minute

var errStalled = fmt.Errorf("nothing has come from the registry for %s", stallLimit)

// watch gives a context that ends with errStalled when Docker has told of nothing for
// stallLimit. It is what any pull tells that counts: some wait for the downloads of others.
func (p *progress) watch(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(ctx)
	p.told()
	go func() {
		for {
			left := time.Until(p.lastTold().Add(stallLimit))
			if left <= 0 {
				cancel(errStalled)
				return
			}
			timer := time.NewTimer(left)
			select {
			case <-timer.C:
			case <-ctx.Done():
				timer.Stop()
				return
			}
		}
	}()
	return ctx, func() { cancel(nil) }
}

func (p *progress) told() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.toldAt = time.Now()
}

func (p *progress) lastTold() time.Time {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.toldAt
}

// stalled is errStalled if that is why ctx has ended, and err otherwise.
func stalled(ctx context.Context, err error) error {
	if err != nil && errors.Is(context.Cause(ctx), errStalled) {
		return errStalled
	}
	return err
}

// impatient ends requests of which nothing has come for a time.
type impatient struct {
	http.RoundTripper
	// limit is that time, for ever if it is 0, and the error to end with.
	limit func(*http.Request) (time.Duration, error)
}

// ofRegistry is the limit of a registry's client.
func ofRegistry(*http.Request) (time.Duration, error) { return stallLimit, errStalled }

func (i impatient) RoundTrip(req *http.Request) (*http.Response, error) {
	limit, silent := i.limit(req)
	if limit == 0 {
		return i.RoundTripper.RoundTrip(req)
	}
	ctx, cancel := context.WithCancelCause(req.Context())
	b := &impatientBody{ctx: ctx, cancel: cancel, limit: limit, silent: silent}
	b.timer = time.AfterFunc(limit, func() { cancel(silent) })
	resp, err := i.RoundTripper.RoundTrip(req.WithContext(ctx))
	b.timer.Stop()
	if err != nil {
		err = b.explain(err)
		cancel(nil)
		return nil, err
	}
	b.ReadCloser, resp.Body = resp.Body, b
	return resp, nil
}

type impatientBody struct {
	io.ReadCloser
	ctx    context.Context
	cancel context.CancelCauseFunc
	timer  *time.Timer
	limit  time.Duration
	silent error
}

func (b *impatientBody) Read(p []byte) (int, error) {
	b.timer.Reset(b.limit)
	n, err := b.ReadCloser.Read(p)
	b.timer.Stop()
	return n, b.explain(err)
}

// explain says silent if that is why the request has ended.
func (b *impatientBody) explain(err error) error {
	if err != nil && errors.Is(context.Cause(b.ctx), b.silent) {
		return b.silent
	}
	return err
}

func (b *impatientBody) Close() error {
	b.cancel(nil)
	return b.ReadCloser.Close()
}
