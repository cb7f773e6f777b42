package imagecache

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"time"

	packersdk "github.com/hashicorp/packer-plugin-sdk/packer"
	"github.com/hashicorp/packer-plugin-sdk/template/interpolate"
)

const (
	rootCommand = "{{ .Command }}"
	sudoCommand = "sudo -n {{ .Command }}"

	// How long a command may go on after the build was cancelled. All commands but
	// those that read standard input are short, and one cut off in the middle, such
	// as mount, would leave behind what nobody undoes.
	commandGrace = 10 * time.Second

	maxOutput = 64 << 20

	// The exit status of env when it finds no such command.
	commandNotFound = 127
)

var errLost = errors.New("the connection to the build VM was lost")

// vm runs single commands on the build VM as root, through Packer's
// communicator.
type vm struct {
	comm     packersdk.Communicator
	template string
	ctx      interpolate.Context
}

// newVM proves that commands run on the VM and finds out how they become
// root's.
func newVM(ctx context.Context, comm packersdk.Communicator, c *Config, data map[string]any) (*vm, error) {
	// The none communicator answers every command with exit status 0 and no output.
	const refuse = `the build has no connection to a VM; set a communicator other than "none", such as "ssh"`
	if t, ok := data["ConnType"].(string); ok && t == "none" {
		return nil, errors.New(refuse)
	}
	r := &vm{comm: comm, template: rootCommand, ctx: c.ctx}
	r.ctx.Data = data
	out, err := r.run(ctx, "id", "-u")
	if err != nil {
		return nil, err
	}
	switch uid := strings.TrimSpace(string(out)); {
	case uid == "":
		return nil, errors.New(refuse)
	case c.ExecuteCommand != "":
		r.template = c.ExecuteCommand
	case uid != "0":
		r.template = sudoCommand
	default:
		return r, nil
	}
	out, err = r.run(ctx, "id", "-u")
	if err != nil {
		return nil, fmt.Errorf("becoming root on the build VM: %w; allow sudo without a password or set execute_command", err)
	}
	if uid := strings.TrimSpace(string(out)); uid != "0" {
		return nil, fmt.Errorf("execute_command runs commands with user ID %s, not as root", uid)
	}
	return r, nil
}

// commandError is a command that ended with a status other than 0.
type commandError struct {
	args   []string
	status int
	stderr string
}

func (e *commandError) Error() string {
	msg := e.stderr
	if msg == "" {
		msg = fmt.Sprintf("exit status %d", e.status)
	}
	return fmt.Sprintf("%s: %s", strings.Join(e.args, " "), msg)
}

// exitStatus is the status of the command that err is about, or -1.
func exitStatus(err error) int {
	if e, ok := errors.AsType[*commandError](err); ok {
		return e.status
	}
	return -1
}

// run runs a command to its end and returns its standard output. The error of a
// command that fails is a *commandError with what it wrote to standard error.
func (r *vm) run(ctx context.Context, args ...string) ([]byte, error) {
	return r.runInput(ctx, strings.NewReader(""), args...)
}

// runInput is run with something on the command's standard input. Cancelling ctx
// ends the input.
func (r *vm) runInput(ctx context.Context, stdin io.Reader, args ...string) ([]byte, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	var stdout, stderr buffer
	status := make(chan int, 1)
	failed := make(chan error, 1)
	input := &cancelReader{ctx: ctx, r: stdin}
	go func() {
		s, err := r.start(ctx, input, &stdout, &stderr, args)
		if err != nil {
			failed <- err
			return
		}
		status <- s.Wait()
	}()
	var grace <-chan time.Time
	done := ctx.Done()
	for {
		select {
		case err := <-failed:
			return nil, fmt.Errorf("running %s on the build VM: %w", args[0], err)
		case s := <-status:
			switch {
			case s == packersdk.CmdDisconnect:
				return nil, fmt.Errorf("running %s: %w", args[0], errLost)
			case s != 0:
				return nil, &commandError{args: args, status: s, stderr: oneLine(stderr.String())}
			case input.err() != nil:
				return nil, input.err()
			}
			return stdout.Bytes(), nil
		case <-done:
			timer := time.NewTimer(commandGrace)
			defer timer.Stop()
			done, grace = nil, timer.C
		case <-grace:
			return nil, ctx.Err()
		}
	}
}

// start starts a command. Its standard output and error are always both taken:
// the communicator's RPC goes wrong with only one of them.
func (r *vm) start(ctx context.Context, stdin io.Reader, stdout, stderr io.Writer, args []string) (*packersdk.RemoteCmd, error) {
	line, err := r.commandLine(args)
	if err != nil {
		return nil, err
	}
	cmd := &packersdk.RemoteCmd{Command: line, Stdin: stdin, Stdout: stdout, Stderr: stderr}
	if err := r.comm.Start(ctx, cmd); err != nil {
		return nil, err
	}
	return cmd, nil
}

func (r *vm) commandLine(args []string) (string, error) {
	quoted := make([]string, len(args))
	for i, a := range args {
		quoted[i] = quote(a)
	}
	// Messages in other languages would not say what the errors here are taken for,
	// and the PATH of a user who is not root lacks the programs for disks.
	command := `env LC_ALL=C PATH="$PATH:/usr/local/sbin:/usr/sbin:/sbin" ` + strings.Join(quoted, " ")
	ictx := r.ctx
	data := map[string]any{"Command": command}
	if m, ok := r.ctx.Data.(map[string]any); ok {
		for k, v := range m {
			data[k] = v
		}
		data["Command"] = command
	}
	ictx.Data = data
	line, err := interpolate.Render(r.template, &ictx)
	if err != nil {
		return "", fmt.Errorf("rendering execute_command: %w", err)
	}
	return line, nil
}

// writeFile is replaceFile for a file that lasts through a power loss.
func (r *vm) writeFile(ctx context.Context, name string, content io.Reader) error {
	if err := r.replaceFile(ctx, name, content); err != nil {
		return err
	}
	_, err := r.run(ctx, "sync", "--file-system", name)
	return err
}

// replaceFile writes a file on the VM, so that a reader sees the old one or the new
// one, whole.
func (r *vm) replaceFile(ctx context.Context, name string, content io.Reader) error {
	tmp := name + ".tmp"
	if _, err := r.runInput(ctx, content, "dd", "of="+tmp, "bs=1M", "conv=fsync", "status=none"); err != nil {
		return err
	}
	_, err := r.run(ctx, "mv", "--no-target-directory", tmp, name)
	return err
}

// quote quotes an argument for a POSIX shell.
func quote(s string) string {
	plain := s != "" && !strings.ContainsFunc(s, func(r rune) bool {
		return !(r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("-_./:=,@%+", r))
	})
	if plain {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}

// oneLine joins the lines of a command's complaint.
func oneLine(s string) string {
	return strings.Join(strings.FieldsFunc(strings.TrimSpace(s), func(r rune) bool { return r == '\n' || r == '\r' }), "; ")
}

// buffer keeps what a command writes. The communicator may go on writing to it
// after a cancelled run has returned.
type buffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if room := maxOutput - b.b.Len(); room > 0 {
		b.b.Write(p[:min(len(p), room)])
	}
	return len(p), nil
}

func (b *buffer) Bytes() []byte {
	b.mu.Lock()
	defer b.mu.Unlock()
	return bytes.Clone(b.b.Bytes())
}

func (b *buffer) String() string { return string(b.Bytes()) }

// cancelReader ends with its context, and remembers why it ended, since the
// command on the other side sees only an end of file.
type cancelReader struct {
	ctx context.Context
	r   io.Reader

	mu     sync.Mutex
	failed error
}

func (c *cancelReader) Read(p []byte) (int, error) {
	err := c.ctx.Err()
	n := 0
	if err == nil {
		n, err = c.r.Read(p)
	}
	if err != nil && !errors.Is(err, io.EOF) {
		c.mu.Lock()
		c.failed = err
		c.mu.Unlock()
	}
	return n, err
}

func (c *cancelReader) err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.failed
}
