package agent

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/opencontainers/go-digest"

	"github.com/selkies-project/packer-plugin-selkies/injector/cachedisk"
)

// ejectedNote is an empty file for each generation that the command eject has removed
// since the agent started. The agent leaves those alone.
func ejectedNote(hostRoot string, cache ...string) string {
	return cachedisk.HostPath(hostRoot, filepath.Join(append([]string{notesDir, "ejected"}, cache...)...))
}

// NoteEjected tells the agent of this node that the generations are to stay ejected
// until it starts again. The command eject calls it before it removes anything, and undo
// if it refuses to.
func NoteEjected(hostRoot string, caches []digest.Digest) (undo func() error, err error) {
	if err := os.MkdirAll(ejectedNote(hostRoot), 0o755); err != nil {
		return nil, fmt.Errorf("telling the agent what is ejected: %w", err)
	}
	var made []string
	undo = func() error {
		var errs []error
		for _, file := range made {
			// Another eject may have taken it back already.
			if err := os.Remove(file); !errors.Is(err, os.ErrNotExist) {
				errs = append(errs, err)
			}
		}
		return errors.Join(errs...)
	}
	for _, cache := range caches {
		file := ejectedNote(hostRoot, cache.Encoded())
		f, err := os.OpenFile(file, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o644)
		if errors.Is(err, os.ErrExist) {
			continue
		}
		if err != nil {
			return nil, errors.Join(fmt.Errorf("telling the agent what is ejected: %w", err), undo())
		}
		made = append(made, file)
		if err := f.Close(); err != nil {
			return nil, errors.Join(fmt.Errorf("telling the agent what is ejected: %w", err), undo())
		}
	}
	return undo, nil
}

// ForgetEjected is called when the generation is registered again by hand.
func ForgetEjected(hostRoot string, cache digest.Digest) error {
	if err := os.Remove(ejectedNote(hostRoot, cache.Encoded())); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("telling the agent what is no longer ejected: %w", err)
	}
	return nil
}

// forgetEjected is for the agent's start, which registers all that there is.
func forgetEjected(hostRoot string) error {
	if err := os.RemoveAll(ejectedNote(hostRoot)); err != nil {
		return fmt.Errorf("forgetting what was ejected: %w", err)
	}
	return nil
}

// wasEjected says whether the generation has been ejected since the agent started.
func (a *Agent) wasEjected(cache digest.Digest) bool {
	_, err := os.Stat(ejectedNote(a.HostRoot, cache.Encoded()))
	return err == nil
}
