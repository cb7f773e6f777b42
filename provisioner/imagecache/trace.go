package imagecache

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/docker/docker/api/types/container"
	"github.com/docker/docker/api/types/filters"
	"github.com/docker/docker/pkg/stdcopy"
	"github.com/docker/go-units"

	"github.com/selkies-project/packer-plugin-selkies/manifest"
	"github.com/selkies-project/packer-plugin-selkies/trace"
)

const (
	// traceLabel is that of the containers that are started for traces.
	traceLabel = "selkies-image-cache.trace"

	// traceProgram is where the injector lies on the disk while it is uploaded. Run from
	// /tmp or /run it would fail where those are mounted noexec.
	traceProgram = manifest.Dir + "/trace-program.tmp"
)

// traceScript takes the injector from its standard input, $2 bytes, and runs it with what
// follows there. The program has no name any more when it runs: however the build ends,
// none of it is left on the VM. head reads no byte too many.
//
//	sh -c traceScript sh FILE BYTES ARGUMENT...
const traceScript = `program=$1 bytes=$2
shift 2
trap 'rm -f "$program"' EXIT
head -c "$bytes" >"$program" && [ "$(stat -c %s "$program")" = "$bytes" ] || { echo "the program was not uploaded whole" >&2; exit 1; }
chmod 700 "$program"
exec 9<"$program"
rm "$program"
trap - EXIT
exec /proc/self/fd/9 "$@"`

// trace records what the starts of images read, and keeps what earlier builds recorded of
// the same. Traces of others are removed.
func (b *build) trace(ctx context.Context) error {
	s := &traceStore{vm: b.vm, dir: path.Join(b.root, trace.Dir)}
	keep := map[string]bool{}
	for _, block := range b.config.Trace {
		i := slices.IndexFunc(b.images, func(w *wanted) bool { return slices.Contains(w.names(), block.name) })
		if i < 0 {
			return fmt.Errorf("trace of %s: no image of this build has that name", block.Image)
		}
		w := b.images[i]
		keep[path.Base(trace.Path(w.image.Config.Digest))] = true
		if earlier, err := s.read(ctx, w); err != nil {
			return err
		} else if earlier != nil && earlier.Seconds == block.Seconds && slices.Equal(earlier.Command, block.Command) {
			b.say("kept the access trace of %s", w)
			continue
		}
		t, err := b.traceImage(ctx, block, w)
		if err != nil {
			return fmt.Errorf("tracing %s: %w", w, err)
		}
		if err := s.write(ctx, t); err != nil {
			return err
		}
		b.say("traced %s: its start reads %s in %d files", w, units.HumanSize(float64(t.Bytes())), len(t.Files))
	}
	return s.prune(ctx, keep)
}

// traceImage starts a container of the image from a cold page cache and watches.
func (b *build) traceImage(ctx context.Context, block Trace, w *wanted) (_ *trace.Trace, err error) {
	b.say("tracing %s for %d seconds", w, block.Seconds)
	created, err := b.engine.ContainerCreate(ctx, &container.Config{
		Image: w.id(), Cmd: block.Command, Labels: map[string]string{traceLabel: "true"}, StopTimeout: new(int),
	}, &container.HostConfig{
		// An image should not reach the VM's network, where its metadata server is.
		NetworkMode: "none",
		LogConfig:   container.LogConfig{Type: "json-file", Config: map[string]string{"max-size": "1m", "max-file": "1"}},
	}, nil, nil, "")
	if err != nil {
		return nil, fmt.Errorf("creating a container: %w", err)
	}
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupTimeout/2)
		defer cancel()
		err = errors.Join(err, b.removeContainer(ctx, created.ID))
	}()
	watch, err := b.startTracer(ctx, w)
	if err != nil {
		return nil, err
	}
	defer watch.Close()
	if err := b.engine.ContainerStart(ctx, created.ID, container.StartOptions{}); err != nil {
		return nil, fmt.Errorf("starting a container: %w", err)
	}
	if err := b.awaitContainer(ctx, created.ID, time.Duration(block.Seconds)*time.Second); err != nil {
		return nil, err
	}
	t, err := watch.end()
	if err != nil {
		return nil, err
	}
	t.Command, t.Seconds = block.Command, block.Seconds
	return t, nil
}

// awaitContainer waits until the time is over, or the container has ended: well.
func (b *build) awaitContainer(ctx context.Context, id string, limit time.Duration) error {
	waiting, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	ended, failed := b.engine.ContainerWait(waiting, id, container.WaitConditionNotRunning)
	select {
	case <-waiting.Done():
		return ctx.Err()
	case err := <-failed:
		if waiting.Err() != nil {
			return ctx.Err()
		}
		return fmt.Errorf("waiting for the container: %w", err)
	case r := <-ended:
		if r.StatusCode == 0 {
			return nil
		}
		return fmt.Errorf("the container ended with status %d: %s", r.StatusCode, b.lastWords(ctx, id))
	}
}

// lastWords is the end of what a container has said.
func (b *build) lastWords(ctx context.Context, id string) string {
	logs, err := b.engine.ContainerLogs(ctx, id, container.LogsOptions{ShowStdout: true, ShowStderr: true, Tail: "3"})
	if err != nil {
		return err.Error()
	}
	defer logs.Close()
	var said bytes.Buffer
	if _, err := stdcopy.StdCopy(&said, &said, io.LimitReader(logs, 10_000)); err != nil {
		return err.Error()
	}
	return oneLine(said.String())
}

func (b *build) removeContainer(ctx context.Context, id string) error {
	if err := b.engine.ContainerRemove(ctx, id, container.RemoveOptions{Force: true, RemoveVolumes: true}); err != nil {
		return fmt.Errorf("removing the container of a trace from the build VM: %w", err)
	}
	return nil
}

// removeTraced removes the containers that a build left behind which was cut off.
func (b *build) removeTraced(ctx context.Context) error {
	left, err := b.engine.ContainerList(ctx, container.ListOptions{All: true, Filters: filters.NewArgs(filters.Arg("label", traceLabel))})
	if err != nil {
		return fmt.Errorf("listing the containers of the build VM: %w", err)
	}
	for _, c := range left {
		if err := b.removeContainer(ctx, c.ID); err != nil {
			return err
		}
	}
	return nil
}

// tracer is the injector at work on the VM.
type tracer struct {
	net.Conn
	dialer *dialer
	out    *bufio.Reader
}

// startTracer uploads the injector and starts it. When it returns, the image's files are
// not in the VM's page cache any more.
func (b *build) startTracer(ctx context.Context, w *wanted) (_ *tracer, err error) {
	program, err := os.Open(b.config.Injector)
	if err != nil {
		return nil, fmt.Errorf("injector: %w", err)
	}
	defer program.Close()
	fi, err := program.Stat()
	if err != nil {
		return nil, fmt.Errorf("injector: %w", err)
	}
	// The session that it takes may be one that is idle.
	b.engine.hangUp(ctx)
	d := &dialer{vm: b.vm, command: []string{"sh", "-c", traceScript, "sh", path.Join(b.root, traceProgram), strconv.FormatInt(fi.Size(), 10),
		"trace", "--cache", b.root, w.pullRef()}}
	conn, err := d.dial(ctx, "", "")
	if err != nil {
		return nil, err
	}
	t := &tracer{Conn: conn, dialer: d, out: bufio.NewReader(conn)}
	defer func() {
		if err != nil {
			t.Close()
		}
	}()
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	defer stop()
	_, err = io.Copy(conn, program)
	line, readErr := t.out.ReadString('\n')
	switch {
	case ctx.Err() != nil:
		return nil, ctx.Err()
	case readErr != nil:
		return nil, fmt.Errorf("running the injector on the build VM: %w", t.explain(errors.Join(err, readErr)))
	case line != "ready\n":
		return nil, fmt.Errorf("the injector on the build VM said %.100q; is %s the selkies-image-injector?", line, b.config.Injector)
	}
	return t, nil
}

// explain is why the program has ended, if it has.
func (t *tracer) explain(err error) error {
	t.dialer.wait(context.Background(), time.Second)
	failed := t.dialer.failed.Load()
	if failed == nil {
		return err
	}
	if strings.Contains(failed.stderr, "Exec format error") {
		return errors.New("it is for another platform; set injector to one that is built for the build VM's")
	}
	return errors.New(cmp.Or(failed.stderr, failed.Error()))
}

// end ends the recording and gives the trace.
func (t *tracer) end() (*trace.Trace, error) {
	if err := t.Conn.(*stdioConn).CloseWrite(); err != nil {
		return nil, err
	}
	data, err := io.ReadAll(io.LimitReader(t.out, trace.MaxSize+1))
	if err != nil {
		return nil, fmt.Errorf("reading what the injector recorded: %w", t.explain(err))
	}
	return trace.Decode(data)
}

// traceStore keeps traces on the disk.
type traceStore struct {
	vm  *vm
	dir string
}

// read is the trace that an earlier build recorded of an image, nil if there is none to
// go by.
func (s *traceStore) read(ctx context.Context, w *wanted) (*trace.Trace, error) {
	data, err := s.vm.run(ctx, "cat", path.Join(s.dir, path.Base(trace.Path(w.image.Config.Digest))))
	if exitStatus(err) > 0 {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("reading access traces: %w", err)
	}
	t, err := trace.Decode(data)
	if err != nil || t.Image != w.image.Config.Digest {
		return nil, nil
	}
	return t, nil
}

func (s *traceStore) write(ctx context.Context, t *trace.Trace) error {
	data, err := t.Encode()
	if err != nil {
		return err
	}
	if _, err := s.vm.run(ctx, "mkdir", "--parents", s.dir); err != nil {
		return fmt.Errorf("writing an access trace: %w", err)
	}
	if err := s.vm.writeFile(ctx, path.Join(s.dir, path.Base(trace.Path(t.Image))), bytes.NewReader(data)); err != nil {
		return fmt.Errorf("writing an access trace: %w", err)
	}
	return nil
}

// prune removes all traces but those with the names given.
func (s *traceStore) prune(ctx context.Context, keep map[string]bool) error {
	if len(keep) == 0 {
		_, err := s.vm.run(ctx, "rm", "--recursive", "--force", s.dir)
		return err
	}
	out, err := s.vm.run(ctx, "find", s.dir, "-mindepth", "1", "-maxdepth", "1", "-printf", `%f\0`)
	if err != nil {
		return fmt.Errorf("listing access traces: %w", err)
	}
	for name := range strings.SplitSeq(strings.TrimSuffix(string(out), "\x00"), "\x00") {
		if keep[name] {
			continue
		}
		if _, err := s.vm.run(ctx, "rm", "--recursive", "--force", path.Join(s.dir, name)); err != nil {
			return fmt.Errorf("removing an access trace: %w", err)
		}
	}
	return nil
}
