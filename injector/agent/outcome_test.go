package agent

import (
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/selkies-project/packer-plugin-selkies/injector/cachedisk"
	"github.com/selkies-project/packer-plugin-selkies/injector/report"
	"github.com/selkies-project/packer-plugin-selkies/manifest"
)

func TestConclude(t *testing.T) {
	disk := &cachedisk.Disk{ID: digest.FromString("disk"), Manifest: &manifest.Manifest{Created: time.Date(2026, 1, 2, 3, 4, 5, 0, time.UTC)}}
	from := "images from cache " + report.Short(disk.ID) + " of 2026-01-02"
	there := report.Image{State: report.Present}
	removed := report.Image{State: report.Skipped, Removed: []string{"a"}}
	skipped := report.Image{State: report.Skipped}
	for name, c := range map[string]struct {
		images            []report.Image
		failed            error
		reason, message   string
		complete, serving bool
	}{
		"all":          {[]report.Image{there, there}, nil, Registered, "2 " + from, true, true},
		"some removed": {[]report.Image{there, removed, skipped}, nil, Registered, "1 " + from + "; 1 removed by someone, 1 skipped (their names stand for other images)", true, true},
		"all removed":  {[]report.Image{removed, removed}, nil, NothingRegistered, "0 " + from + "; 2 removed by someone", true, false},
		"all skipped":  {[]report.Image{skipped}, nil, NothingRegistered, "0 " + from + "; 1 skipped (their names stand for other images)", true, false},
		"no image":     {nil, nil, NothingRegistered, "0 " + from, true, false},
		"some failed":  {[]report.Image{there, {State: report.Failed}}, errors.New("image b: broken"), Partial, "image b: broken", false, true},
		"all failed":   {[]report.Image{{State: report.Failed}}, errors.New("image b: broken"), RegistrationFailed, "image b: broken", false, false},
	} {
		t.Run(name, func(t *testing.T) {
			a := &Agent{
				disks:         []*cachedisk.Disk{disk},
				registered:    &report.Inject{Disks: []report.Disk{{CacheID: disk.ID, Images: c.images}}},
				registerError: c.failed,
			}
			got := a.conclude(nil, nil)
			if got.reason != c.reason || got.message != c.message || got.complete() != c.complete || got.serving != c.serving {
				t.Errorf("got %+v, complete %v; want %s: %q, complete %v, serving %v", got, got.complete(), c.reason, c.message, c.complete, c.serving)
			}
			if got.ready() != (c.reason == Registered) {
				t.Errorf("ready is %v", got.ready())
			}
		})
	}
}

// TestDead has two agents, one of which has seen the disk die earlier, say the same.
func TestDead(t *testing.T) {
	id := digest.FromString("disk")
	of := func(at time.Time) *Agent {
		g := &generation{Generation: report.Generation{CacheID: id}, dead: at, problem: errors.New("input/output error")}
		return &Agent{generations: map[digest.Digest]*generation{id: g}}
	}
	one, other := of(time.Unix(1, 0)).dead().Error(), of(time.Unix(2, 0)).dead().Error()
	if one != other || !strings.Contains(one, "input/output error") {
		t.Errorf("they say %q and %q", one, other)
	}
}
