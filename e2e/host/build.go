package host

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

// Build builds a program of this module, named by its folder as in "./injector",
// into the file out. It is static and without debugging information and gRPC's traces, as
// the released injector is, but with the flag -race, whose detector needs libc.
//
// Most packages of tests want the same two programs, and to link one takes longer than to
// start some of their machines. It is kept in the cache folder, where go build leaves a
// program alone that is up to date.
func Build(ctx context.Context, pkg, out string, flags ...string) error {
	src, err := Source(ctx)
	if err != nil {
		return err
	}
	cache, err := Cache("programs")
	if err != nil {
		return err
	}
	kept := filepath.Join(cache, strings.NewReplacer("/", "_", " ", "").Replace("program"+strings.TrimPrefix(pkg, ".")+strings.Join(flags, "")))
	lock, err := Lock(kept + ".lock")
	if err != nil {
		return err
	}
	defer lock.Close()
	cmd := exec.CommandContext(ctx, "go", append(append([]string{"build", "-buildvcs=false", "-tags=grpcnotrace", "-ldflags=-s -w", "-o", kept}, flags...), pkg)...)
	cmd.Dir = src
	cgo := "0"
	if slices.Contains(flags, "-race") {
		cgo = "1"
	}
	cmd.Env = append(os.Environ(), "CGO_ENABLED="+cgo)
	if _, err := Output(cmd); err != nil {
		return fmt.Errorf("building %s: %w", pkg, err)
	}
	return copyProgram(kept, out)
}

func copyProgram(from, to string) error {
	in, err := os.Open(from)
	if err != nil {
		return err
	}
	defer in.Close()
	// One that runs cannot be written to.
	if err := os.Remove(to); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	out, err := os.OpenFile(to, os.O_CREATE|os.O_EXCL|os.O_WRONLY, 0o755)
	if err != nil {
		return err
	}
	_, err = io.Copy(out, in)
	return errors.Join(err, out.Close())
}
