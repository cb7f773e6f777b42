package pods

import (
	"context"
	"fmt"
	"time"

	"github.com/containerd/containerd/v2/client"

	"github.com/selkies-project/packer-plugin-selkies/e2e/machine"
	"github.com/selkies-project/packer-plugin-selkies/e2e/treediff"
)

// Tree is what a running container of m sees, owners as the host sees them, but for
// what the runtime makes. The client's namespace is the container's.
func Tree(ctx context.Context, m *machine.Machine, c *client.Client, id string) (treediff.Tree, error) {
	container, err := c.LoadContainer(ctx, id)
	if err != nil {
		return nil, err
	}
	task, err := container.Task(ctx, nil)
	if err != nil {
		return nil, err
	}
	tree, err := treediff.Dir(m.Path(fmt.Sprintf("/proc/%d/root", task.Pid())))
	if err != nil {
		return nil, err
	}
	return WithoutRuntime(tree), nil
}

// WithoutRuntime is the tree of an image without what a runtime makes in a container.
func WithoutRuntime(tree treediff.Tree) treediff.Tree {
	for _, name := range []string{"dev", "proc", "run", "sys", "etc/hosts", "etc/hostname", "etc/resolv.conf"} {
		delete(tree, name)
	}
	// The directories that it makes them in.
	for _, name := range []string{".", "etc"} {
		e := tree[name]
		e.ModTime = time.Time{}
		tree[name] = e
	}
	return tree
}
