package agent

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/selkies-project/packer-plugin-selkies/injector/cachedisk"
	"github.com/selkies-project/packer-plugin-selkies/injector/containerd"
	"github.com/selkies-project/packer-plugin-selkies/injector/report"
	"github.com/selkies-project/packer-plugin-selkies/internal/printable"
)

// Reasons of the node's condition. Only with the first is it True.
const (
	Registered             = "Registered"
	NothingRegistered      = "NothingRegistered"      // nothing failed, but all images were removed or skipped
	Partial                = "Partial"                // some images or disks failed, the others are served
	NoCacheDisk            = "NoCacheDisk"            // there is none
	BrokenManifest         = "BrokenManifest"         // it has a layer manifest that is not valid
	DiskUnreadable         = "DiskUnreadable"         // its device fails
	UnsupportedSnapshotter = "UnsupportedSnapshotter" // pods would not use registered layers
	RuntimeUnavailable     = "RuntimeUnavailable"     // it does not answer, or is none that can be served
	RegistrationFailed     = "RegistrationFailed"     // nothing could be registered
)

// Reasons of events, besides those of the condition.
const (
	eventRegistered = "Registered"
	eventHealed     = "Healed"
	eventRemoved    = "ImageRemoved"
	eventEjected    = "Ejected"
	eventDamaged    = "LayerDamaged"
	// eventGateDeadline is told where no agent runs.
	eventGateDeadline = "GateDeadline"
)

// outcome is what a pass has found in the end.
type outcome struct {
	// reason and message are the condition's, the message one line that changes only
	// if something has.
	reason, message string
	// serving is whether pods can use cached images; known says if that is known.
	serving, known bool
	// settled is whether nothing is left to be tried again soon.
	settled bool
}

func (o outcome) ready() bool { return o.reason == Registered }

// complete says whether there is nothing that pods should be kept waiting for.
func (o outcome) complete() bool { return o.reason == Registered || o.reason == NothingRegistered }

// conclude sums up a pass. diskErr is of the search for disks, err of the rest.
func (a *Agent) conclude(diskErr, err error) outcome {
	o := outcome{serving: a.last.serving, known: a.last.known}
	problem := func(reason string, err error) outcome {
		o.reason, o.message = reason, oneLine(err)
		return o
	}
	switch {
	case errors.Is(err, containerd.ErrSnapshotter):
		o.serving, o.known = false, true
		return problem(UnsupportedSnapshotter, err)
	case err != nil && a.runtime == nil:
		return problem(RuntimeUnavailable, err)
	}
	o.settled = err == nil && diskErr == nil && a.pending == ""
	images, left := a.images()
	o.known, o.serving = true, len(a.disks) > 0 && images > 0
	switch {
	case err != nil:
		return problem(RegistrationFailed, err)
	case len(a.disks) == 0 && errors.Is(diskErr, cachedisk.ErrUnreadable):
		return problem(DiskUnreadable, diskErr)
	case len(a.disks) == 0 && errors.Is(diskErr, cachedisk.ErrAbsent):
		return problem(NoCacheDisk, errors.Join(diskErr, a.dead()))
	case len(a.disks) == 0:
		return problem(BrokenManifest, diskErr)
	case images == 0 && a.registerError != nil:
		return problem(RegistrationFailed, a.registerError)
	}
	if err := errors.Join(a.registerError, diskErr, a.dead()); err != nil {
		return problem(Partial, err)
	}
	var caches []string
	for _, d := range a.disks {
		caches = append(caches, fmt.Sprintf("%s of %s", report.Short(d.ID), d.Manifest.Created.UTC().Format(time.DateOnly)))
	}
	o.reason = Registered
	if images == 0 {
		o.reason = NothingRegistered
	}
	o.message = fmt.Sprintf("%d images from cache %s", images, strings.Join(caches, ", "))
	if left != "" {
		o.message += "; " + left
	}
	return o
}

// images counts those that pods can use, and says how many were left out, and why.
func (a *Agent) images() (n int, left string) {
	if a.registered == nil {
		return 0, ""
	}
	removed, skipped := 0, 0
	for _, d := range a.registered.Disks {
		for _, img := range d.Images {
			switch state(img) {
			case "removed":
				removed++
			case "skipped":
				skipped++
			}
			if img.State == report.Registered || img.State == report.Present {
				n++
			}
		}
	}
	var why []string
	if removed > 0 {
		why = append(why, fmt.Sprintf("%d removed by someone", removed))
	}
	if skipped > 0 {
		why = append(why, fmt.Sprintf("%d skipped (their names stand for other images)", skipped))
	}
	return n, strings.Join(why, ", ")
}

// dead is an error for each disk that cannot be read. It has no time: two agents on a
// node, as one takes over from the other, are to say the same.
func (a *Agent) dead() error {
	var errs []error
	for _, g := range a.sorted() {
		if !g.dead.IsZero() {
			errs = append(errs, fmt.Errorf("cache %s is not readable: %w", report.Short(g.CacheID), g.problem))
		}
	}
	return errors.Join(errs...)
}

// publish tells the outcome to everyone.
func (a *Agent) publish() {
	o := a.last
	if o.complete() && a.gate.open() {
		a.Log.Info("the gate is open", "seconds", time.Since(a.started).Seconds())
	}
	open := a.gate.isOpen()
	if open {
		a.gate.see()
	}
	a.updateMetrics()
	a.health.ready.Store(open)
	a.node.set(desired{open: open, outcome: o})
	// Until the gate opens, a disk or a runtime may just be late.
	if o.reason == a.published || !open {
		return
	}
	switch {
	case !o.ready():
		a.warn(o.reason, "%s", o.message)
	case a.published != "":
		a.inform(eventHealed, "%s", o.message)
	default:
		a.Log.Info("ready: " + o.message)
	}
	a.published = o.reason
}

// inform and warn tell of something that has happened, in the log and in an event.
func (a *Agent) inform(reason, format string, args ...any) {
	msg := fmt.Sprintf(format, args...)
	a.Log.Info(msg, "reason", reason)
	a.node.event(false, reason, msg)
}

func (a *Agent) warn(reason, format string, args ...any) {
	msg := fmt.Sprintf(format, args...)
	a.Log.Warn(msg, "reason", reason)
	a.node.event(true, reason, msg)
}

// oneLine is the text of an error, or of several, as a condition's message can take it.
func oneLine(err error) string {
	const most = 1000
	return printable.Line(strings.ReplaceAll(err.Error(), "\n", "; "), most)
}
