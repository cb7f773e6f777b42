package agent

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"slices"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"

	"github.com/selkies-project/packer-plugin-selkies/injector/cachedisk"
	"github.com/selkies-project/packer-plugin-selkies/injector/report"
	"github.com/selkies-project/packer-plugin-selkies/manifest"
)

// fakeRuntime has the images that it is given, less those that it is told to leave.
type fakeRuntime struct {
	t       *testing.T
	images  []report.Image
	watched bool
	// asked are the names that the last Inject was told to leave.
	asked map[string]bool
	// meanwhile happens during an Inject.
	meanwhile func()
	// hangs is what Check says.
	hangs  error
	closed bool
}

func (f *fakeRuntime) Check(context.Context) error { return f.hangs }

func (f *fakeRuntime) Watch(context.Context) func(func(report.Change)) error {
	f.watched = true
	return func(func(report.Change)) error { select {} }
}

func (f *fakeRuntime) Inject(_ context.Context, disks []*cachedisk.Disk, opt report.InjectOptions) (*report.Inject, error) {
	if !f.watched {
		f.t.Error("images are registered before changes to them are watched")
	}
	f.asked = opt.Removed
	if f.meanwhile != nil {
		f.meanwhile()
	}
	if len(disks) == 0 {
		return &report.Inject{}, nil
	}
	return &report.Inject{Disks: []report.Disk{{CacheID: disks[0].ID, Images: f.images}}}, nil
}

func (f *fakeRuntime) Generations(context.Context) ([]report.Generation, error) { return nil, nil }
func (f *fakeRuntime) Eject(context.Context, report.EjectOptions) (*report.Eject, error) {
	return nil, errors.New("not asked for")
}
func (f *fakeRuntime) Close() error {
	f.closed = true
	return nil
}

// TestRemovedMeanwhile has the agent register again: what it left on the node and is gone
// was removed by someone, also where no event has told of it yet, unless containerd may
// have lost its state.
func TestRemovedMeanwhile(t *testing.T) {
	rt := &fakeRuntime{t: t, images: []report.Image{
		{State: report.Registered, Names: []string{"a", "b"}},
		{State: report.Present, Names: []string{"c"}},
		{State: report.Failed, Names: []string{"d"}},
		{State: report.Skipped, Names: []string{"e"}, Removed: []string{"e"}},
	}}
	a, err := newAgent(Config{
		GateDeadline: DefaultGateDeadline, GoneAfter: DefaultGoneAfter, CheckInterval: DefaultCheckInterval,
		Log: slog.New(slog.DiscardHandler), HostRoot: t.TempDir(),
		Open: func(context.Context) (Runtime, error) { return rt, nil },
	})
	if err != nil {
		t.Fatal(err)
	}
	a.disks = []*cachedisk.Disk{{ID: digest.FromString("disk"), Manifest: &manifest.Manifest{}}}
	register := func(r reason, want ...string) {
		t.Helper()
		a.pending = r
		if err := a.register(t.Context()); err != nil {
			t.Fatal(err)
		}
		if diff := cmp.Diff(want, slices.Sorted(maps.Keys(rt.asked))); diff != "" {
			t.Errorf("%s: the names to be left are not as they should be: %s", r, diff)
		}
	}
	register(reasonStart)
	register(reasonPin, "a", "b", "c", "e")
	register(reasonMount, "a", "b", "c", "e")
	register(reasonDisk, "a", "b", "c", "e")

	rt.meanwhile = func() { a.changes.end(errors.New("containerd has stopped")) }
	rt.images = []report.Image{{State: report.Skipped, Names: []string{"a", "b"}, Removed: []string{"a", "b"}}}
	register(reasonPin, "a", "b", "c", "e")
	if a.pending == "" {
		t.Error("a registration during which containerd stopped counts")
	}
	rt.meanwhile = nil
	a.takeChanges()
	register(reasonRuntime, "e")

	a.RestoreRemoved = true
	register(reasonPin)
}

// TestHangs has a containerd that is watched answer no more, of which no event tells: the
// agent says so at once, and connects again when there is an answer.
func TestHangs(t *testing.T) {
	rt := &fakeRuntime{t: t, images: []report.Image{{State: report.Registered, Names: []string{"a"}}}}
	a, err := newAgent(Config{
		GateDeadline: DefaultGateDeadline, GoneAfter: DefaultGoneAfter, CheckInterval: DefaultCheckInterval,
		Log: slog.New(slog.DiscardHandler), HostRoot: t.TempDir(), Caches: []string{t.TempDir()},
		Open: func(context.Context) (Runtime, error) { return rt, rt.hangs },
	})
	if err != nil {
		t.Fatal(err)
	}
	for _, hangs := range []error{nil, errors.New("containerd does not answer"), nil} {
		rt.hangs, rt.closed = hangs, false
		a.pass(t.Context())
		unavailable := a.last.reason == RuntimeUnavailable
		if unavailable != (hangs != nil) || rt.closed != unavailable || (a.pending != "") != unavailable {
			t.Errorf("it answers %v, and the agent says %s: %s; closed %t, to be registered %q", hangs, a.last.reason, a.last.message, rt.closed, a.pending)
		}
	}
}
