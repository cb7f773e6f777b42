package main

import (
	"context"
	"encoding/json"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/selkies-project/packer-plugin-selkies/e2e/host"
)

// nodeBoot is the whole way: how long it takes from when a node boots until an application
// of the desktop's image runs on it, and until its browser has drawn a page, in a cluster.
type nodeBoot struct {
	s        *session
	program  string
	file     string // of the cache disk
	registry string // that the names on it begin with

	pulled, cached map[string]series // by moment
}

// moments of a node are in the order in which they come.
var moments = []struct{ name, title string }{
	{"ready", "node ready"},
	{"registered", "images registered, taint gone"},
	{"started", "application started"},
	{"drawn", "page drawn by the browser"},
}

func newNodeBoot(s *session) benchmark {
	return &nodeBoot{s: s, pulled: map[string]series{}, cached: map[string]series{}}
}

func (b *nodeBoot) prepare(ctx context.Context) error {
	d, err := b.s.desktopDisk()
	if err != nil {
		return err
	}
	all, err := b.s.desktops()
	if err != nil {
		return err
	}
	ref, err := d.name(all.images[0].Ref)
	if err != nil {
		return err
	}
	b.file = d.file
	b.registry, _, _ = strings.Cut(ref, "/")
	b.program = filepath.Join(b.s.dir, "boot")
	return host.Build(ctx, "./e2e/bench/boot", b.program)
}

func (b *nodeBoot) round(ctx context.Context) error {
	cmd := exec.CommandContext(ctx, b.program, "-disk", b.file, "-registry", b.registry)
	// It removes its machines then.
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	out, err := host.Output(cmd)
	if err != nil {
		return err
	}
	return b.add([]byte(out))
}

// add takes what the program printed.
func (b *nodeBoot) add(out []byte) error {
	var got struct{ Pulled, Cached map[string]float64 }
	if err := json.Unmarshal(out, &got); err != nil {
		return fmt.Errorf("decoding the moments: %w", err)
	}
	for _, m := range moments {
		pulled, ok := got.Pulled[m.name]
		cached, too := got.Cached[m.name]
		if !ok || !too {
			return fmt.Errorf("the program did not see when the nodes had %q: %s", m.name, out)
		}
		b.pulled[m.name] = append(b.pulled[m.name], pulled)
		b.cached[m.name] = append(b.cached[m.name], cached)
	}
	return nil
}

func (b *nodeBoot) figures() []figure {
	var f []figure
	for _, m := range moments {
		cached, pulled := b.cached[m.name], b.pulled[m.name]
		disk := figure{name: "cache disk: " + m.title, unit: seconds, runs: cached}
		pull := figure{name: "pull: " + m.title, unit: seconds, runs: pulled}
		switch m.name {
		case "ready":
			f = append(f, disk, pull)
		case "registered": // no other node joins with the taint
			f = append(f, disk)
		default:
			disk.ratios = []ratio{{"pull", 0, cached.over(pulled)}}
			f = append(f, disk, pull)
		}
	}
	return f
}
