package imagecache

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	cerrdefs "github.com/containerd/errdefs"
	"github.com/containerd/platforms"
	"github.com/docker/docker/api/types/image"
	"github.com/docker/go-units"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"
)

// noSpace is ENOSPC in Docker's words.
const noSpace = "no space left on device"

var errDiskFull = errors.New("the disk is full; use a larger one, or list fewer images")

// puller brings images into the daemon's store.
type puller struct {
	engine     *engine
	registries *registries
	platform   ocispec.Platform
	attempts   int
	say        func(format string, a ...any)
	progress   *progress
}

// pullAll pulls in the order given, several images at once. An image that fails
// does not stop the others, except when the disk is full.
func (p *puller) pullAll(ctx context.Context, images []*wanted, concurrency int) (pulled []*wanted, failures []failure, err error) {
	ctx, stop := context.WithCancelCause(ctx)
	defer stop(nil)
	var g errgroup.Group
	g.SetLimit(concurrency)
	errs := make([]error, len(images))
	for i, w := range images {
		g.Go(func() error {
			if ctx.Err() != nil {
				errs[i] = context.Cause(ctx)
				return nil
			}
			if errs[i] = p.pull(ctx, w); errors.Is(errs[i], errDiskFull) {
				stop(errDiskFull)
			}
			return nil
		})
	}
	g.Wait()
	if cause := context.Cause(ctx); cause != nil && !errors.Is(cause, errDiskFull) {
		return nil, nil, cause
	}
	for i, w := range images {
		if errs[i] == nil {
			pulled = append(pulled, w)
			continue
		}
		if errors.Is(context.Cause(ctx), errDiskFull) {
			errs[i] = errDiskFull
		}
		failures = append(failures, w.failures(errs[i])...)
	}
	return pulled, failures, nil
}

// pull pulls one image by digest, trying again after errors that may pass, and
// tags it.
func (p *puller) pull(ctx context.Context, w *wanted) error {
	id, err := p.stored(ctx, w)
	if err != nil {
		return err
	}
	if id != w.id() {
		started := time.Now()
		p.progress.start(w)
		if err := p.pullPatiently(ctx, w); err != nil {
			p.progress.finish(w, false)
			return err
		}
		if id, err = p.stored(ctx, w); err != nil {
			return err
		}
		if id != w.id() {
			return fmt.Errorf("docker took another image from its index than the one for %s, %s for %s; list it as %s", platforms.Format(p.platform), id, w.id(), w.refs[0].digested(w.image.Manifest.Digest))
		}
		p.say("pulled %s: %s in %s", w, units.HumanSize(float64(p.progress.downloaded(w))), time.Since(started).Round(100*time.Millisecond))
	}
	for _, ref := range w.refs {
		if t := ref.tag(); t != "" {
			if err := p.engine.ImageTag(ctx, w.id(), t); err != nil {
				return fmt.Errorf("tagging: %w", err)
			}
		}
	}
	p.progress.finish(w, true)
	return nil
}

// stored is the ID of the image that the store has under w's digest, "" if none.
func (p *puller) stored(ctx context.Context, w *wanted) (string, error) {
	inspect, err := p.engine.ImageInspect(ctx, w.pullRef())
	if cerrdefs.IsNotFound(err) {
		return "", nil
	}
	if err != nil {
		return "", fmt.Errorf("looking for it in the store: %w", err)
	}
	return inspect.ID, nil
}

func (p *puller) pullPatiently(ctx context.Context, w *wanted) error {
	delay := time.Second
	for attempt := 1; ; attempt++ {
		err := p.pullOnce(ctx, w)
		if err == nil || ctx.Err() != nil || !mayPass(err) {
			return err
		}
		if attempt == p.attempts {
			return fmt.Errorf("%w (%d attempts; see max_pull_attempts)", err, attempt)
		}
		p.say("pulling %s: %v; trying again in %s (attempt %d of %d)", w, err, delay, attempt+1, p.attempts)
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

// mayPass reports whether an error of the daemon may be gone at the next attempt.
func mayPass(err error) bool {
	if errors.Is(err, errDiskFull) {
		return false
	}
	// Errors in the stream of a pull that has begun have no type.
	for _, final := range []string{"unauthorized", "denied", "manifest unknown", "not found", "unsupported", "failed to register layer", "does not match the specified platform", plainHTTP, unknownCertificate} {
		if strings.Contains(err.Error(), final) {
			return false
		}
	}
	return true
}

// event is one message of the stream that a pull answers with.
type event struct {
	ID       string `json:"id"`
	Status   string `json:"status"`
	Progress struct {
		Current int64 `json:"current"`
	} `json:"progressDetail"`
	Error *struct {
		Message string `json:"message"`
	} `json:"errorDetail"`
}

func (p *puller) pullOnce(ctx context.Context, w *wanted) error {
	auth, err := p.registries.header(ctx, w.refs[0])
	if err != nil {
		return err
	}
	stream, err := p.engine.ImagePull(ctx, w.pullRef(), image.PullOptions{RegistryAuth: auth, Platform: platforms.Format(p.platform)})
	if err != nil {
		return explainPull(w.refs[0], err)
	}
	defer stream.Close()
	for events := json.NewDecoder(stream); ; {
		var e event
		if err := events.Decode(&e); err == io.EOF {
			return nil
		} else if err != nil {
			return fmt.Errorf("reading Docker's answer: %w", err)
		}
		if e.Error != nil {
			return explainPull(w.refs[0], errors.New(e.Error.Message))
		}
		p.progress.event(w, e)
	}
}

func explainPull(ref reference, err error) error {
	switch msg := err.Error(); {
	case strings.Contains(msg, noSpace):
		return errDiskFull
	case strings.Contains(msg, plainHTTP):
		return fmt.Errorf("%w; set insecure_registries, and for the VM's own Docker its insecure-registries", err)
	case strings.Contains(msg, unknownCertificate):
		return fmt.Errorf("%w; put the certificate of its authority into /etc/docker/certs.d/%s/ca.crt on the build VM, or set insecure_registries", err, ref.registry())
	}
	return err
}
