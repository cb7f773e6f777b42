package containerd

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"syscall"

	"github.com/containerd/errdefs"
	"github.com/containerd/errdefs/pkg/errgrpc"
)

// explain names the remedy for the errors that a node in trouble gives. What
// containerd itself ran into arrives as text only.
func (r *Runtime) explain(err error) error {
	text := err.Error()
	switch {
	case errors.Is(err, syscall.ENOSPC), strings.Contains(text, syscall.ENOSPC.Error()):
		return fmt.Errorf("no room on the node below %s: free some space or inodes there: %w", r.root, err)
	case errors.Is(err, context.DeadlineExceeded):
		return fmt.Errorf("containerd at %s does not answer: restart it and run again: %w", r.opt.Address, err)
	case errdefs.IsUnavailable(err):
		return fmt.Errorf("containerd at %s stopped answering: start it and run again: %w", r.opt.Address, err)
	case errors.Is(err, syscall.EROFS), strings.Contains(text, syscall.EROFS.Error()):
		return fmt.Errorf("%s is read-only: mount the host's root writable: %w", r.root, err)
	}
	return err
}

// errdefsFromGRPC is for clients that are not containerd's own.
func errdefsFromGRPC(err error) error {
	if err == nil {
		return nil
	}
	return errgrpc.ToNative(err)
}
