package imagecache

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"time"
)

// stallLimit is how long nothing may come from a registry. Neither Docker nor the
// registry's client has such a limit.
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

// impatient ends requests of which nothing has come for stallLimit.
type impatient struct{ http.RoundTripper }

func (i impatient) RoundTrip(req *http.Request) (*http.Response, error) {
	ctx, cancel := context.WithCancelCause(req.Context())
	timer := time.AfterFunc(stallLimit, func() { cancel(errStalled) })
	resp, err := i.RoundTripper.RoundTrip(req.WithContext(ctx))
	timer.Stop()
	if err != nil {
		err = stalled(ctx, err)
		cancel(nil)
		return nil, err
	}
	resp.Body = &impatientBody{resp.Body, ctx, cancel, timer}
	return resp, nil
}

type impatientBody struct {
	io.ReadCloser
	ctx    context.Context
	cancel context.CancelCauseFunc
	timer  *time.Timer
}

func (b *impatientBody) Read(p []byte) (int, error) {
	b.timer.Reset(stallLimit)
	n, err := b.ReadCloser.Read(p)
	b.timer.Stop()
	return n, stalled(b.ctx, err)
}

func (b *impatientBody) Close() error {
	b.cancel(nil)
	return b.ReadCloser.Close()
}
