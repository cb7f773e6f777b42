package machine

import (
	"strings"
	"testing"

	"github.com/selkies-project/packer-plugin-selkies/e2e/treediff"
)

// CompareImage compares what a container sees of an image in a containerd namespace with
// what it sees after a pull into another, and runs it.
func (m *Machine) CompareImage(t testing.TB, ns, ref string) {
	t.Helper()
	injected := m.imageTree(t, ns, ref)
	m.Output(t, "ctr", "-n", "pulled", "images", "pull", "--plain-http", ref)
	pulled := m.imageTree(t, "pulled", ref)
	// No layer has the root: its time is that of its unpacking.
	root := injected["."]
	root.ModTime = pulled["."].ModTime
	injected["."] = root
	for _, diff := range treediff.Compare(pulled, injected) {
		t.Error(diff)
	}
	if len(injected) < 3 {
		t.Errorf("only %d names in the tree", len(injected))
	}
	m.Output(t, "ctr", "-n", ns, "run", "--rm", "--net-host", ref, "e2e", "/bin/busybox", "true")
}

// imageTree is an image's tree, mounted as for a read-only container.
func (m *Machine) imageTree(t testing.TB, ns, ref string) treediff.Tree {
	t.Helper()
	dir := strings.TrimSpace(m.Output(t, "mktemp", "--directory", "/mnt/tree-XXXXXX"))
	m.Output(t, "ctr", "-n", ns, "images", "mount", ref, dir)
	tree, err := treediff.Dir(m.Path(dir))
	m.Output(t, "ctr", "-n", ns, "images", "unmount", "--rm", dir)
	m.Output(t, "rmdir", dir)
	if err != nil {
		t.Fatal(err)
	}
	return tree
}
