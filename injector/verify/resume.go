package verify

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"

	"github.com/opencontainers/go-digest"
)

// resume is the file that notes which layers are proved: the cache ID, and a chain ID in
// each further line. A line that was cut off names no layer.
type resume struct {
	mu sync.Mutex
	f  *os.File
}

// openResume opens the file name, which is made or, if it is of another generation,
// replaced. Without a name there is none, and nil notes nothing.
func openResume(name string, cache digest.Digest) (*resume, map[digest.Digest]bool, error) {
	if name == "" {
		return nil, nil, nil
	}
	if err := os.MkdirAll(filepath.Dir(name), 0o700); err != nil {
		return nil, nil, fmt.Errorf("noting what is proved: %w", err)
	}
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return nil, nil, fmt.Errorf("noting what is proved: %w", err)
	}
	proved := map[digest.Digest]bool{}
	lines := bufio.NewScanner(f)
	ours := lines.Scan() && lines.Text() == cache.String()
	for ours && lines.Scan() {
		proved[digest.Digest(lines.Text())] = true
	}
	err = lines.Err()
	if errors.Is(err, bufio.ErrTooLong) { // no line of ours
		ours, err = false, nil
		clear(proved)
	}
	switch {
	case err != nil:
	case ours:
		// Ends a line that was cut off.
		_, err = fmt.Fprintln(f)
	default:
		if err = f.Truncate(0); err == nil {
			_, err = fmt.Fprintln(f, cache)
		}
	}
	if err != nil {
		f.Close()
		return nil, nil, fmt.Errorf("noting what is proved in %s: %w", name, err)
	}
	return &resume{f: f}, proved, nil
}

func (r *resume) note(chain digest.Digest) error {
	if r == nil {
		return nil
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	if _, err := fmt.Fprintln(r.f, chain); err != nil {
		return fmt.Errorf("noting what is proved: %w", err)
	}
	return nil
}

func (r *resume) close() {
	if r != nil {
		r.f.Close()
	}
}
