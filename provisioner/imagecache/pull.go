package imagecache

import (
	"cmp"
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

	"github.com/selkies-project/packer-plugin-selkies/htmlreport"
)

// puller brings images into the daemon's store.
type puller struct {
	engine     *engine
	registries *registries
	platform   ocispec.Platform
	patience   patience
	progress   *progress
}

// pullAll pulls in the order given, several images at once.
func (p *puller) pullAll(ctx context.Context, images []*wanted, concurrency int) (pulled []*wanted, failures []failure, err error) {
	errs, err := each(ctx, concurrency, images, p.pull)
	if err != nil {
		return nil, nil, err
	}
	for i, w := range images {
		if errs[i] != nil {
			failures = append(failures, w.failures(errs[i])...)
			continue
		}
		pulled = append(pulled, w)
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
		if err := p.patience.try(ctx, "pulling "+w.String(), func() error { return p.pullOnce(ctx, w) }); err != nil {
			p.progress.finish(w, false)
			return err
		}
		if id, err = p.stored(ctx, w); err != nil {
			return err
		}
		if id != w.id() {
			return fmt.Errorf("docker took another image from its index than the one for %s, %s for %s; list it as %s", platforms.Format(p.platform), id, w.id(), w.refs[0].digested(w.image.Manifest.Digest))
		}
		w.pulled = htmlreport.Pull{Took: time.Since(started), Bytes: p.progress.downloaded(w)}
		p.patience.say("pulled %s: %s in %s", w, units.HumanSize(float64(w.pulled.Bytes)), w.pulled.Took.Round(100*time.Millisecond))
	}
	for _, ref := range w.refs {
		if t := ref.tag(); t != "" {
			if err := p.engine.ImageTag(ctx, w.id(), t); err != nil {
				return fmt.Errorf("tagging %s: %w", t, err)
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
	watched, stop := p.progress.watch(ctx)
	defer stop()
	err := stalled(watched, p.pullWatched(watched, w))
	if errors.Is(err, errStalled) {
		// If it is Docker that tells nothing, the other images need not be tried.
		err = cmp.Or(p.engine.silent(ctx), err)
	}
	return err
}

func (p *puller) pullWatched(ctx context.Context, w *wanted) error {
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
