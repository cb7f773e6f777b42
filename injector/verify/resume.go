package verify

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"sync"

	"github.com/opencontainers/go-digest"
	"golang.org/x/sys/unix"
)

// resume is the file that notes which layers are proved: the cache ID, and a chain ID in
// each further line. A line that was cut off names no layer.
type resume struct {
	mu sync.Mutex
	f  *os.File
}

// openResume opens the file name, which is made or, if it is of another generation,
// replaced; a file of something else is left alone. Without a name there is none, and
// nil notes nothing.
func openResume(name string, cache digest.Digest) (*resume, map[digest.Digest]bool, error) {
	if name == "" {
		return nil, nil, nil
	}
	if err := os.MkdirAll(filepath.Dir(name), 0o700); err != nil {
		return nil, nil, fmt.Errorf("noting what is proved: %w", err)
	}
	f, err := os.OpenFile(name, os.O_RDWR|os.O_CREATE|os.O_APPEND|unix.O_NOFOLLOW, 0o600)
	if err != nil {
		return nil, nil, fmt.Errorf("noting what is proved: %w", err)
	}
	proved := map[digest.Digest]bool{}
	lines := bufio.NewScanner(f)
	empty := !lines.Scan()
	of := digest.Digest(lines.Text())
	for of == cache && lines.Scan() {
		proved[digest.Digest(lines.Text())] = true
	}
	err = lines.Err()
	switch {
	case errors.Is(err, bufio.ErrTooLong), err == nil && !empty && of.Validate() != nil:
		err = errors.New("it is a file of something else; choose another one")
	case err != nil:
	case of == cache:
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
