package host

import (
	"context"
	"fmt"
	"os"
)

// Main is for the TestMain of packages whose tests share a set-up: tests makes it,
// runs them and gives their status, with which the process ends. dir is a folder for
// it, which is removed afterwards.
func Main(tests func(ctx context.Context, dir string) (status int, err error)) {
	status, err := inFolder(tests)
	if err != nil {
		fmt.Fprintln(os.Stderr, "setting up the tests:", err)
		status = 1
	}
	os.Exit(status)
}

func inFolder(tests func(ctx context.Context, dir string) (int, error)) (int, error) {
	if err := Check(); err != nil {
		return 1, err
	}
	dir, err := os.MkdirTemp("", "selkies-e2e-")
	if err != nil {
		return 1, err
	}
	defer os.RemoveAll(dir)
	return tests(context.Background(), dir)
}
