package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/selkies-project/packer-plugin-selkies/e2e/desktop"
	"github.com/selkies-project/packer-plugin-selkies/e2e/host"
	"github.com/selkies-project/packer-plugin-selkies/manifest"
	"github.com/selkies-project/packer-plugin-selkies/trace"
)

// firstRead measures the start of a browser whose image is registered and was never read:
// until it has drawn a page, from a cold page cache and a cache disk that is a network
// disk, with and without its access trace read ahead.
type firstRead struct {
	s        *session
	node     *node
	image    desktop.Image
	trace    *trace.Trace
	profiles []*slowStart
}

// slowStart is what was measured with one profile.
type slowStart struct {
	name string
	profile
	// wrong is the same disk with a trace of files that the start does not read.
	right, wrong *attached

	cold, warm, ahead, after, beside, wrongly series
}

func newFirstRead(s *session) benchmark {
	return &firstRead{s: s, profiles: []*slowStart{
		{name: "1 ms, 140 MB/s", profile: profile{time.Millisecond, 140e6}},
		{name: "2 ms, 30 MB/s", profile: profile{2 * time.Millisecond, 30e6}},
	}}
}

// imageRoom is that of the disk image in memory, from where nbdkit serves it: the real
// disk below would be measured too.
const imageRoom = "6G"

func (b *firstRead) prepare(ctx context.Context) error {
	var err error
	if b.node, err = b.s.containerd(); err != nil {
		return err
	}
	d, err := b.s.desktopDisk()
	if err != nil {
		return err
	}
	all, err := b.s.desktops()
	if err != nil {
		return err
	}
	b.image = all.images[0]
	if b.image.Ref, err = d.name(b.image.Ref); err != nil {
		return err
	}
	memory := filepath.Join(b.s.dir, "memory")
	if err := os.Mkdir(memory, 0o700); err != nil {
		return err
	}
	if _, err := host.Output(exec.CommandContext(ctx, "mount", "-t", "tmpfs", "-o", "size="+imageRoom, "bench", memory)); err != nil {
		return err
	}
	b.s.cleanup = append(b.s.cleanup, func() error {
		_, err := host.Output(exec.Command("umount", memory))
		return err
	})
	inMemory := &disk{file: filepath.Join(memory, "image"), manifest: d.manifest}
	if _, err := host.Output(exec.CommandContext(ctx, "cp", "--sparse=always", d.file, inMemory.file)); err != nil {
		return err
	}
	if err := b.record(ctx, inMemory); err != nil {
		return fmt.Errorf("tracing the browser's start: %w", err)
	}
	for _, p := range b.profiles {
		if p.right, err = b.attach(ctx, inMemory, p.profile, true); err != nil {
			return err
		}
		if p.wrong, err = b.attach(ctx, inMemory, p.profile, false); err != nil {
			return err
		}
	}
	b.s.cleanup = append(b.s.cleanup, func() error { return b.node.fresh(context.WithoutCancel(ctx)) })
	return nil
}

// record has the injector trace a start from the disk, and puts the trace there.
func (b *firstRead) record(ctx context.Context, d *disk) (err error) {
	loop, err := host.AttachLoop(d.file, false)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, loop.Close()) }()
	a, err := b.s.attachLoop(b.node, d, loop)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, a.detach(ctx)) }()
	if err := b.node.fresh(ctx); err != nil {
		return err
	}
	if _, err := a.inject(ctx); err != nil {
		return err
	}
	tracer := b.node.Command(ctx, "selkies-image-injector", "trace", "--cache", a.dir, b.image.Ref)
	tracer.Stderr = os.Stderr
	stop, err := tracer.StdinPipe()
	if err != nil {
		return err
	}
	stdout, err := tracer.StdoutPipe()
	if err != nil {
		return err
	}
	if err := tracer.Start(); err != nil {
		return err
	}
	out := bufio.NewReader(stdout)
	if line, err := out.ReadString('\n'); err != nil || line != "ready\n" {
		return errors.Join(fmt.Errorf("it says %q: %w", line, err), tracer.Wait())
	}
	_, started := b.start(ctx)
	stop.Close()
	data, err := io.ReadAll(out)
	if err := errors.Join(started, err, tracer.Wait()); err != nil {
		return err
	}
	if b.trace, err = trace.Decode(data); err != nil {
		return err
	}
	if err := b.write(ctx, a, b.trace); err != nil {
		return err
	}
	// Its containerd has the disk mounted as well.
	return b.node.fresh(ctx)
}

// write makes t the trace on the disk, which is mounted read-only until then.
func (b *firstRead) write(ctx context.Context, a *attached, t *trace.Trace) error {
	data, err := t.Encode()
	if err != nil {
		return err
	}
	if _, err := b.node.Run(ctx, "mount", "-o", "remount,rw", a.dir); err != nil {
		return err
	}
	file := b.node.Path(filepath.Join(a.dir, trace.Path(t.Image)))
	if err := errors.Join(os.MkdirAll(filepath.Dir(file), 0o755), os.WriteFile(file, data, 0o644)); err != nil {
		return err
	}
	_, err = b.node.Run(ctx, "mount", "-o", "remount,ro", a.dir)
	return err
}

// attach attaches the disk with a profile, with the right trace or a wrong one.
func (b *firstRead) attach(ctx context.Context, d *disk, p profile, right bool) (*attached, error) {
	device, err := attachSlow(ctx, d.file, p, right)
	if err != nil {
		return nil, err
	}
	b.s.cleanup = append(b.s.cleanup, device.Close)
	a, err := b.s.attachLoop(b.node, d, device.Loop)
	if err != nil {
		return nil, err
	}
	b.s.cleanup = append(b.s.cleanup, func() error { return a.detach(context.WithoutCancel(ctx)) })
	if right {
		return a, nil
	}
	t, err := b.wrongTrace(a)
	if err != nil {
		return nil, err
	}
	return a, b.write(ctx, a, t)
}

// detach takes a disk away that no runtime uses.
func (a *attached) detach(ctx context.Context) error {
	_, err := a.node.Run(ctx, "umount", a.dir)
	return errors.Join(err, a.node.DetachDisk(a.loop.Path, filepath.Base(a.loop.Path)))
}

// wrongTrace has as many bytes as the right one, or as there are, of other files of the
// same layers that are not small.
func (b *firstRead) wrongTrace(a *attached) (*trace.Trace, error) {
	t := &trace.Trace{SchemaVersion: trace.SchemaVersion, Image: b.trace.Image}
	i := slices.IndexFunc(a.manifest.Images, func(img manifest.Image) bool { return img.Config.Digest == t.Image })
	chain, err := a.manifest.Images[i].ChainIDs()
	if err != nil {
		return nil, err
	}
	type candidate struct {
		trace.File
		size int64
	}
	var all []candidate
	for n, id := range chain {
		l := a.manifest.Layers[slices.IndexFunc(a.manifest.Layers, func(l manifest.Layer) bool { return l.ChainID == id })]
		dir := a.node.Path(filepath.Join(a.dir, a.manifest.LayerPath(l)))
		err := filepath.WalkDir(dir, func(name string, e fs.DirEntry, err error) error {
			if err != nil || !e.Type().IsRegular() {
				return err
			}
			fi, err := e.Info()
			if err != nil {
				return err
			}
			rel, err := filepath.Rel(dir, name)
			if f := (trace.File{Layer: n, Path: rel}); fi.Size() >= 64<<10 && !slices.Contains(b.trace.Files, f) {
				all = append(all, candidate{f, fi.Size()})
			}
			return err
		})
		if err != nil {
			return nil, err
		}
	}
	r := rand.New(rand.NewPCG(1, 2))
	r.Shuffle(len(all), func(i, j int) { all[i], all[j] = all[j], all[i] })
	left := b.trace.Bytes()
	for _, c := range all {
		if left <= 0 || len(t.Files) == len(b.trace.Files)*10 {
			break
		}
		t.Ranges = append(t.Ranges, trace.Range{File: len(t.Files), Length: c.size})
		t.Files = append(t.Files, c.File)
		left -= c.size
	}
	return t, nil
}

func (b *firstRead) round(ctx context.Context) error {
	for _, p := range b.profiles {
		if err := b.measure(ctx, p); err != nil {
			return fmt.Errorf("%s: %w", p.name, err)
		}
	}
	return nil
}

func (b *firstRead) measure(ctx context.Context, p *slowStart) error {
	if err := b.node.fresh(ctx); err != nil {
		return err
	}
	if _, err := p.right.inject(ctx); err != nil {
		return err
	}
	if err := b.timed(ctx, &p.cold, true); err != nil {
		return err
	}
	if err := b.timed(ctx, &p.warm, false); err != nil {
		return err
	}
	if err := b.cold(ctx); err != nil {
		return err
	}
	took, err := p.right.readAhead(ctx)
	if err != nil {
		return err
	}
	p.ahead.took(took)
	if err := b.timed(ctx, &p.after, false); err != nil {
		return err
	}
	if err := b.together(ctx, p.right, &p.beside); err != nil {
		return err
	}
	if err := b.node.fresh(ctx); err != nil {
		return err
	}
	if _, err := p.wrong.inject(ctx); err != nil {
		return err
	}
	return b.together(ctx, p.wrong, &p.wrongly)
}

// timed measures a start.
func (b *firstRead) timed(ctx context.Context, s *series, cold bool) error {
	if cold {
		if err := b.cold(ctx); err != nil {
			return err
		}
	}
	took, err := b.start(ctx)
	s.took(took)
	return err
}

// together measures a start from a cold page cache that begins with the reading ahead.
func (b *firstRead) together(ctx context.Context, a *attached, s *series) error {
	if err := b.cold(ctx); err != nil {
		return err
	}
	var g errgroup.Group
	g.Go(func() error {
		_, err := a.readAhead(ctx)
		return err
	})
	err := b.timed(ctx, s, false)
	return errors.Join(err, g.Wait())
}

// cold empties the page cache. The programs that start containers are the node's own, on
// another disk, and in memory.
func (b *firstRead) cold(ctx context.Context) error {
	if err := host.DropCaches(); err != nil {
		return err
	}
	_, err := b.node.Run(ctx, "sh", "-ec", `for p in ctr containerd containerd-shim-runc-v2 runc selkies-image-injector; do
	cat $(command -v $p) >/dev/null
done
ctr version >/dev/null
runc --version >/dev/null
containerd-shim-runc-v2 -v >/dev/null`)
	return err
}

// start runs the browser.
func (b *firstRead) start(ctx context.Context) (time.Duration, error) {
	out, took, err := b.node.timed(ctx, containerdPeers.run(b.image.Ref, b.image.Command...)...)
	if err == nil && !strings.Contains(out, b.image.Want) {
		err = fmt.Errorf("%s said %q, not %q", b.image.Ref, out, b.image.Want)
	}
	return took, err
}

var milliseconds = regexp.MustCompile(`msg="read ahead" .* milliseconds=(\d+)`)

// readAhead has the injector, which has nothing to register, read the disk's trace, and
// gives how long that took of its time.
func (a *attached) readAhead(ctx context.Context) (time.Duration, error) {
	args := append([]string{"sh", "-c", `exec selkies-image-injector inject --read-ahead --log-level info "$@" 2>&1`, "inject"}, a.flags()...)
	out, err := a.node.Run(ctx, args...)
	if err != nil {
		return 0, err
	}
	m := milliseconds.FindStringSubmatch(out)
	if m == nil {
		return 0, fmt.Errorf("inject does not say that it has read ahead: %s", out)
	}
	n, err := strconv.Atoi(m[1])
	return time.Duration(n) * time.Millisecond, err
}

func (b *firstRead) figures() []figure {
	f := []figure{{name: "read ahead", unit: bytes, runs: series{float64(b.trace.Bytes())}},
		{name: "  in files", unit: count, runs: series{float64(len(b.trace.Files))}},
		{name: "  in ranges", unit: count, runs: series{float64(len(b.trace.Ranges))}}}
	for _, p := range b.profiles {
		var both series
		for i := range p.ahead {
			both.add(p.ahead[i] + p.after[i])
		}
		cold := func(bound float64, s series) []ratio { return []ratio{{"cold", bound, s.over(p.cold)}} }
		f = append(f,
			figure{name: p.name + ": cold start", unit: seconds, runs: p.cold},
			figure{name: p.name + ": start again, all in memory", unit: seconds, runs: p.warm, ratios: cold(0, p.warm)},
			figure{name: p.name + ": reading ahead", unit: seconds, runs: p.ahead, ratios: cold(0, p.ahead)},
			figure{name: p.name + ": start after it", unit: seconds, runs: p.after, ratios: cold(0.1, p.after)},
			figure{name: p.name + ": both, one after the other", unit: seconds, runs: both, ratios: cold(0.3, both)},
			figure{name: p.name + ": both at once", unit: seconds, runs: p.beside, ratios: cold(0, p.beside)},
			figure{name: p.name + ": at once with a wrong trace", unit: seconds, runs: p.wrongly, ratios: cold(1.05, p.wrongly)},
		)
	}
	return f
}
