package host

import (
	"strings"
	"sync"
)

// Said is what a program says, which can be looked at while it goes on.
type Said struct {
	mu   sync.Mutex
	text strings.Builder
}

// Write takes what the program writes.
func (s *Said) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.text.Write(p)
}

// String is what it has said so far.
func (s *Said) String() string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.text.String()
}
