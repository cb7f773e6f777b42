package containerd

import (
	"context"
	"errors"
	"fmt"

	eventtypes "github.com/containerd/containerd/api/events"
	"github.com/containerd/containerd/v2/core/events"
	"github.com/containerd/typeurl/v2"

	"github.com/selkies-project/packer-plugin-selkies/injector/report"
)

// Watch asks containerd to tell of changes to images. follow calls changed for each image
// record that has been removed since, or is without our labels, until the stream of
// events ends: containerd has stopped, or the context has ended.
func (r *Runtime) Watch(ctx context.Context) (follow func(changed func(report.Change)) error) {
	ctx, cancel := context.WithCancel(r.context(ctx))
	stream, errs := r.client.Subscribe(ctx, fmt.Sprintf(`namespace==%q,topic~="^/images/"`, r.opt.Namespace))
	return func(changed func(report.Change)) error {
		defer cancel()
		for {
			select {
			case e := <-stream:
				c, err := changeOf(e)
				if err != nil {
					r.opt.Log.Warn("reading an event of containerd", "topic", e.Topic, "error", err)
				} else if c != nil {
					changed(*c)
				}
			case err := <-errs:
				if err == nil {
					err = errors.New("the stream ended")
				}
				return fmt.Errorf("watching containerd's images: %w", r.explain(err))
			}
		}
	}
}

// changeOf is nil for an event that needs no answer: a record that has our labels,
// or that is an image ID, which the CRI makes.
func changeOf(e *events.Envelope) (*report.Change, error) {
	v, err := typeurl.UnmarshalAny(e.Event)
	if err != nil {
		return nil, err
	}
	switch v := v.(type) {
	case *eventtypes.ImageCreate:
		return changeTo(v.Name, v.Labels), nil
	case *eventtypes.ImageUpdate:
		return changeTo(v.Name, v.Labels), nil
	case *eventtypes.ImageDelete:
		return &report.Change{Name: v.Name, Removed: true}, nil
	}
	return nil, nil
}

func changeTo(name string, labels map[string]string) *report.Change {
	if isID(name) || labels[labelPinned] == pinned && labels[labelCache] != "" {
		return nil
	}
	return &report.Change{Name: name}
}
