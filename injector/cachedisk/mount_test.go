package cachedisk

import (
	"testing"

	"golang.org/x/sys/unix"
)

func TestOwnThread(t *testing.T) {
	for range 1000 {
		if err := onOwnThread(func() error {
			if unix.Gettid() == unix.Getpid() {
				t.Error("on the process's first thread")
			}
			return nil
		}); err != nil {
			t.Fatal(err)
		}
		if t.Failed() {
			return
		}
	}
}
