package docker

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"golang.org/x/sys/unix"
)

// lock waits for other injectors to end, and looks at docker anew: it may have been
// started or stopped meanwhile, by one of them or by anybody. From here on a store
// without a daemon is one that no daemon has open.
func (r *Runtime) lock(ctx context.Context) (unlock func(), err error) {
	if unlock, err = r.flock(ctx); err != nil {
		return nil, err
	}
	if err = r.settle(ctx); err == nil {
		err = r.open(ctx)
	}
	if err == nil && r.info == nil {
		err = r.checkUnused(r.cli.DaemonHost())
	}
	if err != nil {
		unlock()
		return nil, err
	}
	return unlock, nil
}

// flock waits for other injectors to end.
func (s store) flock(ctx context.Context) (unlock func(), err error) {
	if err := os.MkdirAll(s.runDir(), 0o700); err != nil {
		return nil, fmt.Errorf("locking docker's store: %w", err)
	}
	f, err := os.OpenFile(filepath.Join(s.runDir(), "docker.lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return nil, fmt.Errorf("locking docker's store: %w", err)
	}
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		err := unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return func() { f.Close() }, nil
		}
		if !errors.Is(err, unix.EWOULDBLOCK) && !errors.Is(err, unix.EINTR) {
			f.Close()
			return nil, fmt.Errorf("locking docker's store: %w", err)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			f.Close()
			return nil, fmt.Errorf("waiting for another injector: %w", ctx.Err())
		}
	}
}
