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

	"github.com/selkies-project/packer-plugin-selkies/e2e/host"
	"github.com/selkies-project/packer-plugin-selkies/manifest"
	"github.com/selkies-project/packer-plugin-selkies/trace"
)

// firstRead measures starts of programs whose image is registered and was never read:
// until they have drawn, from a cold page cache and a cache disk that is a network disk,
// with and without an access trace read ahead.
type firstRead struct {
	s      *session
	node   *node
	ref    string // of the image
	starts []*slowStart
}

// program is what is started. It ends, having said want.
type program struct {
	name, want string
	command    []string
	// trace is that of its start, misleading one of files that it does not read.
	trace, misleading *trace.Trace
}

// slowStart is what was measured of a program with one profile.
type slowStart struct {
	*program
	name string
	host.Profile
	// wrong is the same disk with the misleading trace.
	right, wrong *attached

	cold, warm, ahead, after, together, misled series
	// recorded is how long the start took whose access trace was recorded, 0 if it is another's.
	recorded time.Duration
}

// A browser and, of the same image, what shows the display of a desktop with OpenGL: the X
// server, and a program that asks it what it draws with.
func newFirstRead(s *session) benchmark {
	browser := &program{name: "browser"}
	// It says nothing: ctr can lose what a container says that ends at once.
	display := &program{name: "display", command: []string{"sh", "-c", `Xvfb :7 -nolisten local >/dev/null 2>&1 &
until DISPLAY=:7 glxinfo -B 2>/dev/null | grep -q llvmpipe; do sleep 0.02; done`}}
	fast, small := host.Profile{Delay: time.Millisecond, Rate: 140e6}, host.Profile{Delay: 2 * time.Millisecond, Rate: 30e6}
	return &firstRead{s: s, starts: []*slowStart{
		{program: browser, name: "browser, 1 ms, 140 MB/s", Profile: fast},
		{program: browser, name: "browser, 2 ms, 30 MB/s", Profile: small},
		{program: display, name: "display, 1 ms, 140 MB/s", Profile: fast},
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
	image := all.images[0]
	if b.ref, err = d.name(image.Ref); err != nil {
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
	for _, p := range b.starts {
		if p.command == nil {
			p.command, p.want = image.Command, image.Want
		}
		if p.right, err = b.attach(ctx, inMemory, p.Profile); err != nil {
			return err
		}
		if p.wrong, err = b.attach(ctx, inMemory, p.Profile); err != nil {
			return err
		}
		if p.trace == nil {
			if p.trace, err = b.record(ctx, p); err != nil {
				return fmt.Errorf("tracing the start of the %s: %w", p.program.name, err)
			}
			if p.misleading, err = wrongTrace(p); err != nil {
				return err
			}
		}
		if err := errors.Join(b.write(ctx, p.right, p.trace), b.write(ctx, p.wrong, p.misleading)); err != nil {
			return err
		}
	}
	b.s.cleanup = append(b.s.cleanup, func() error { return b.node.fresh(context.WithoutCancel(ctx)) })
	return nil
}

// record has the injector trace a start from the disk.
func (b *firstRead) record(ctx context.Context, p *slowStart) (*trace.Trace, error) {
	if err := b.node.fresh(ctx); err != nil {
		return nil, err
	}
	if _, err := p.right.inject(ctx); err != nil {
		return nil, err
	}
	if err := b.cold(ctx); err != nil {
		return nil, err
	}
	tracer := b.node.Command(ctx, "selkies-image-injector", "trace", "--cache", p.right.dir, b.ref)
	tracer.Stderr = os.Stderr
	stop, err := tracer.StdinPipe()
	if err != nil {
		return nil, err
	}
	stdout, err := tracer.StdoutPipe()
	if err != nil {
		return nil, err
	}
	if err := tracer.Start(); err != nil {
		return nil, err
	}
	out := bufio.NewReader(stdout)
	if line, err := out.ReadString('\n'); err != nil || line != "ready\n" {
		return nil, errors.Join(fmt.Errorf("it says %q: %w", line, err), tracer.Wait())
	}
	p.recorded, err = b.start(ctx, p.program)
	stop.Close()
	data, readErr := io.ReadAll(out)
	if err := errors.Join(err, readErr, tracer.Wait()); err != nil {
		return nil, err
	}
	t, err := trace.Decode(data)
	if err != nil {
		return nil, err
	}
	// Its containerd has the disk mounted as well.
	return t, b.node.fresh(ctx)
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

// attach attaches the disk with a profile. What is written to it is nobody else's.
func (b *firstRead) attach(ctx context.Context, d *disk, p host.Profile) (*attached, error) {
	device, err := host.AttachSlow(ctx, d.file, p, false)
	if err != nil {
		return nil, err
	}
	b.s.cleanup = append(b.s.cleanup, device.Close)
	a, err := b.s.attachLoop(b.node, d, device.Loop)
	if err != nil {
		return nil, err
	}
	b.s.cleanup = append(b.s.cleanup, func() error { return a.detach(context.WithoutCancel(ctx)) })
	return a, nil
}

// detach takes a disk away that no runtime uses.
func (a *attached) detach(ctx context.Context) error {
	_, err := a.node.Run(ctx, "umount", a.dir)
	return errors.Join(err, a.node.DetachDisk(a.loop.Path, filepath.Base(a.loop.Path)))
}

// wrongTrace has as many bytes as the right one, or as there are, of other files of the
// same layers that are not small.
func wrongTrace(p *slowStart) (*trace.Trace, error) {
	a, right := p.right, p.trace
	t := &trace.Trace{SchemaVersion: trace.SchemaVersion, Image: right.Image}
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
			if f := (trace.File{Layer: n, Path: rel}); fi.Size() >= 64<<10 && !slices.Contains(right.Files, f) {
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
	left := right.Bytes()
	for _, c := range all {
		if left <= 0 || len(t.Files) == len(right.Files)*10 {
			break
		}
		t.Ranges = append(t.Ranges, trace.Range{File: len(t.Files), Length: c.size})
		t.Files = append(t.Files, c.File)
		left -= c.size
	}
	return t, nil
}

func (b *firstRead) round(ctx context.Context) error {
	for _, p := range b.starts {
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
	if err := b.timed(ctx, p.program, &p.cold, true); err != nil {
		return err
	}
	if err := b.timed(ctx, p.program, &p.warm, false); err != nil {
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
	if err := b.timed(ctx, p.program, &p.after, false); err != nil {
		return err
	}
	if err := b.together(ctx, p.program, p.right, &p.together); err != nil {
		return err
	}
	if err := b.node.fresh(ctx); err != nil {
		return err
	}
	if _, err := p.wrong.inject(ctx); err != nil {
		return err
	}
	return b.together(ctx, p.program, p.wrong, &p.misled)
}

// timed measures a start.
func (b *firstRead) timed(ctx context.Context, p *program, s *series, cold bool) error {
	if cold {
		if err := b.cold(ctx); err != nil {
			return err
		}
	}
	took, err := b.start(ctx, p)
	s.took(took)
	return err
}

// together measures a start from a cold page cache that begins with the reading ahead.
func (b *firstRead) together(ctx context.Context, p *program, a *attached, s *series) error {
	if err := b.cold(ctx); err != nil {
		return err
	}
	var g errgroup.Group
	g.Go(func() error {
		_, err := a.readAhead(ctx)
		return err
	})
	err := b.timed(ctx, p, s, false)
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

// start runs the program.
func (b *firstRead) start(ctx context.Context, p *program) (time.Duration, error) {
	out, took, err := b.node.timed(ctx, containerdPeers.run(b.ref, p.command...)...)
	if err == nil && !strings.Contains(out, p.want) {
		err = fmt.Errorf("the %s said %q, not %q", p.name, out, p.want)
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
	var f []figure
	for _, p := range b.starts {
		if p.recorded > 0 {
			t := p.trace
			f = append(f, figure{name: p.program.name + ": read ahead", unit: bytes, runs: series{float64(t.Bytes())}},
				figure{name: p.program.name + ": files of that", unit: count, runs: series{float64(len(t.Files))}},
				figure{name: p.program.name + ": ranges of that", unit: count, runs: series{float64(len(t.Ranges))}},
				figure{name: p.program.name + ": start in which that was recorded", unit: seconds, runs: series{p.recorded.Seconds()},
					ratios: []ratio{{"cold", 0, series{p.recorded.Seconds() / p.cold.median()}}}})
		}
		var both series
		for i := range p.ahead {
			both.add(p.ahead[i] + p.after[i])
		}
		cold := func(bound float64, s series) []ratio { return []ratio{{"cold", bound, s.over(p.cold)}} }
		f = append(f,
			figure{name: p.name + ": cold start", unit: seconds, runs: p.cold},
			figure{name: p.name + ": start again, all in memory", unit: seconds, runs: p.warm, ratios: cold(0, p.warm)},
			figure{name: p.name + ": reading ahead", unit: seconds, runs: p.ahead, ratios: cold(0, p.ahead)},
			figure{name: p.name + ": start after reading ahead", unit: seconds, runs: p.after,
				ratios: append(cold(0.1, p.after), ratio{"start again", 0, p.after.over(p.warm)})},
			figure{name: p.name + ": reading ahead, then start", unit: seconds, runs: both, ratios: cold(0.3, both)},
			figure{name: p.name + ": reading ahead and start together", unit: seconds, runs: p.together, ratios: cold(0, p.together)},
			figure{name: p.name + ": start beside reading ahead of a wrong trace", unit: seconds, runs: p.misled, ratios: cold(1.05, p.misled)},
		)
	}
	return f
}
