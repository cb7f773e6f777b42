//go:build e2e

package docker_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"

	"github.com/selkies-project/packer-plugin-selkies/e2e/host"
	"github.com/selkies-project/packer-plugin-selkies/e2e/machine"
	"github.com/selkies-project/packer-plugin-selkies/e2e/nodestate"
	"github.com/selkies-project/packer-plugin-selkies/e2e/treediff"
	"github.com/selkies-project/packer-plugin-selkies/injector/report"
)

const (
	cacheDir = "/cache" // where the injector looks by itself
	dataRoot = nodestate.DockerDir
	stateDir = nodestate.CacheDir
	runDir   = "/run/selkies-image-injector"
)

var releases = []struct {
	name   string
	docker machine.Release
}{
	{"Docker 20.10", machine.Debian},
	{"Moby 29", machine.Upstream},
}

// node is a machine with a Docker.
type node struct {
	*machine.Machine
	docker machine.Docker
}

func newNode(t *testing.T, release machine.Release) *node {
	t.Helper()
	n := &node{machine.New(t, machine.Config{Name: "node"}), machine.Docker{Release: release}}
	if err := n.Install(world.injector, "/usr/local/bin/selkies-image-injector"); err != nil {
		t.Fatal(err)
	}
	if err := n.StartContainerd(t.Context(), machine.Containerd{Release: release}); err != nil {
		t.Fatal(err)
	}
	n.start(t)
	return n
}

func (n *node) start(t *testing.T) {
	t.Helper()
	if err := n.StartDocker(t.Context(), n.docker); err != nil {
		t.Fatal(err)
	}
}

func (n *node) stop(t *testing.T) {
	t.Helper()
	n.Output(t, "systemctl", "stop", "docker.socket", "docker.service")
}

// fresh gives the node a Docker that never had an image.
func (n *node) fresh(t *testing.T) {
	t.Helper()
	n.stop(t)
	n.Output(t, "sh", "-ec", "umount "+stateDir+"/* 2>/dev/null || :; rm -rf "+stateDir+"; find "+dataRoot+" -mindepth 1 -delete")
	n.start(t)
}

// attach attaches a disk image read-only and mounts it at dir, as GKE does. detach
// takes the disk away again.
func (n *node) attach(t *testing.T, image, dir string) (detach func()) {
	t.Helper()
	return n.MountDisk(t, image, dir, "ro,noload")
}

// emptyDisk attaches a new disk of 64 MiB and returns its device.
func (n *node) emptyDisk(t *testing.T) string {
	t.Helper()
	image := filepath.Join(t.TempDir(), "disk")
	if err := host.NewDisk(image, 64<<20); err != nil {
		t.Fatal(err)
	}
	loop, err := host.AttachLoop(image, false)
	if err != nil {
		t.Fatal(err)
	}
	if err := n.AttachDisk(loop.Path, "empty"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := n.DetachDisk(loop.Path, "empty"); err != nil {
			t.Error(err)
		}
		loop.Close()
	})
	return loop.Path
}

// injector runs the injector and decodes its report.
func (n *node) injector(t *testing.T, out any, args ...string) error {
	t.Helper()
	text, err := n.Run(t.Context(), append([]string{"selkies-image-injector", "--runtime", "docker", "--output", "json"}, args...)...)
	if strings.Contains(text, "null") {
		t.Errorf("an empty list is null in the report of %v: %s", args, text)
	}
	if text != "" && out != nil {
		if err := json.Unmarshal([]byte(text), out); err != nil {
			t.Fatalf("the injector said %q: %v", text, err)
		}
	}
	return err
}

func (n *node) inject(t *testing.T, args ...string) *report.Inject {
	t.Helper()
	var r report.Inject
	if err := n.injector(t, &r, append([]string{"inject"}, args...)...); err != nil {
		t.Fatal(err)
	}
	return &r
}

func (n *node) eject(t *testing.T, args ...string) *report.Eject {
	t.Helper()
	var r report.Eject
	if err := n.injector(t, &r, append([]string{"eject"}, args...)...); err != nil {
		t.Fatal(err)
	}
	return &r
}

// refused runs the injector, which must fail with status 1 and one line on stderr that
// has every word, and change nothing.
func (n *node) refused(t *testing.T, args []string, words ...string) {
	t.Helper()
	before := n.state(t)
	n.Refused(t, 1, append([]string{"selkies-image-injector", "--runtime", "docker"}, args...), words...)
	after := n.state(t)
	same(t, "after a refusal", before.files, after.files)
	before.files, after.files = nil, nil
	if diff := cmp.Diff(before, after, cmp.AllowUnexported(state{})); diff != "" {
		t.Errorf("after a refusal (-before +after):\n%s", diff)
	}
}

// state is all that a refusal must leave alone: the data root, whatever is in it, what
// is registered, mounts, and the process that is dockerd.
type state struct {
	files  treediff.Tree
	mounts string
	pid    string
}

func (n *node) state(t *testing.T) state {
	t.Helper()
	root := dataRoot
	if r, ok := n.docker.Config["data-root"].(string); ok {
		root = r
	}
	files := treediff.Tree{}
	for _, dir := range []string{root, stateDir} {
		if _, err := os.Stat(n.Path(dir)); errors.Is(err, fs.ErrNotExist) {
			continue
		}
		tree, err := treediff.Dir(n.Path(dir))
		if err != nil {
			t.Fatal(err)
		}
		for name, e := range tree {
			// BuildKit's own databases change at any time after a build.
			if !strings.HasPrefix(name, "buildkit") {
				files[filepath.Join(dir, name)] = e
			}
		}
	}
	return state{files, n.Output(t, "cat", "/proc/1/mountinfo"), n.pid(t)}
}

// hello runs an image's echo in a container.
func (n *node) hello(t *testing.T, image string) {
	t.Helper()
	if out := n.Output(t, "docker", "run", "--rm", "--network", "none", image, "/bin/echo", "hello"); out != "hello\n" {
		t.Errorf("%s said %q", image, out)
	}
}

// tree is the tree that a container of the image sees, without what Docker makes in it.
func (n *node) tree(t *testing.T, image string) treediff.Tree {
	t.Helper()
	id := strings.TrimSpace(n.Output(t, "docker", "run", "-d", "--network", "none", image, "/bin/sleep", "1000"))
	defer n.Output(t, "docker", "rm", "-f", id)
	pid := strings.TrimSpace(n.Output(t, "docker", "inspect", "-f", "{{.State.Pid}}", id))
	tree, err := treediff.Dir(n.Path(fmt.Sprintf("/proc/%s/root", pid)))
	if err != nil {
		t.Fatal(err)
	}
	for name := range tree {
		switch top, _, _ := strings.Cut(name, "/"); top {
		case ".", ".dockerenv", "dev", "proc", "sys", "etc":
			delete(tree, name)
		}
	}
	return tree
}

// inspect is what docker says of an image, without what depends on the day.
func (n *node) inspect(t *testing.T, image string) map[string]any {
	t.Helper()
	var all []map[string]any
	if err := json.Unmarshal([]byte(n.Output(t, "docker", "image", "inspect", image)), &all); err != nil {
		t.Fatal(err)
	}
	delete(all[0], "Metadata")
	delete(all[0], "GraphDriver")
	return all[0]
}

// store is Docker's image store and our state, as files.
func (n *node) store(t *testing.T) treediff.Tree {
	t.Helper()
	tree, err := nodestate.Docker(n.Machine)
	if err != nil {
		t.Fatal(err)
	}
	return tree
}

func same(t *testing.T, what string, want, got treediff.Tree) {
	t.Helper()
	diffs := treediff.Compare(want, got)
	for i, d := range diffs {
		if i == 10 {
			t.Errorf("%s: and %d more", what, len(diffs)-i)
			break
		}
		t.Errorf("%s: %s", what, d)
	}
}

// wait waits until ok says so.
func (n *node) wait(t *testing.T, otherwise string, ok func() bool) {
	t.Helper()
	tick := time.NewTicker(200 * time.Millisecond)
	defer tick.Stop()
	for range 100 {
		if ok() {
			return
		}
		<-tick.C
	}
	t.Error(otherwise)
}

// pid is that of dockerd.
func (n *node) pid(t *testing.T) string {
	t.Helper()
	return strings.TrimSpace(n.Output(t, "systemctl", "show", "-P", "MainPID", "docker.service"))
}
