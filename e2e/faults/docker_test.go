//go:build e2e

package faults_test

import (
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/selkies-project/packer-plugin-selkies/e2e/machine"
	"github.com/selkies-project/packer-plugin-selkies/e2e/nodestate"
	"github.com/selkies-project/packer-plugin-selkies/e2e/treediff"
)

// dockerNode is a machine whose Docker keeps everything on a small disk of its own.
type dockerNode struct {
	*cacheNode

	// empty and full are the stores before and after a clean inject.
	empty, full treediff.Tree
	// took is how long a run takes: of inject with Docker running and stopped, and of
	// eject.
	took map[string]time.Duration
}

const (
	injectRunning = "inject while docker runs"
	injectStopped = "inject while docker is stopped"
)

func newDockerNode(t *testing.T) *dockerNode {
	t.Helper()
	return &dockerNode{cacheNode: newCacheNode(t), took: map[string]time.Duration{}}
}

// start starts Docker with what it needs.
func (n *dockerNode) start(t *testing.T) {
	t.Helper()
	if err := n.StartContainerd(t.Context(), machine.Containerd{Release: machine.Debian}); err != nil {
		t.Fatal(err)
	}
	if err := n.StartDocker(t.Context(), machine.Docker{Release: machine.Debian}); err != nil {
		t.Fatal(err)
	}
}

// up starts Docker's units where they do not run.
func (n *dockerNode) up(t *testing.T) {
	t.Helper()
	// Faults follow each other faster than systemd lets units start.
	n.Output(t, "systemctl", "reset-failed")
	n.Output(t, "systemctl", "start", "containerd.service", "docker.socket", "docker.service")
}

func (n *dockerNode) down(t *testing.T) {
	t.Helper()
	n.Output(t, "systemctl", "stop", "docker.socket", "docker.service")
}

// units says in which state Docker's are.
func (n *dockerNode) units(t *testing.T) string {
	out, _ := n.Run(t.Context(), "systemctl", "is-active", "docker.socket", "docker.service")
	return strings.ReplaceAll(strings.TrimSpace(out), "\n", " ")
}

// store is Docker's store without what a killed dockerd leaves there for good: the entry
// of a layer whose files are already gone, a half-written file of names, and the
// directories in which it tries overlayfs when it starts.
func (n *dockerNode) store(t *testing.T) treediff.Tree {
	t.Helper()
	tree, err := nodestate.Docker(n.Machine)
	if err != nil {
		t.Fatal(err)
	}
	for name := range tree {
		for _, part := range []string{"-removing", "/.tmp-repositories.json", "/check-overlayfs-support", "/opaque-bug-check"} {
			if strings.Contains(name, part) {
				delete(tree, name)
			}
		}
	}
	return tree
}

// learn runs inject and eject without a fault.
func (n *dockerNode) learn(t *testing.T) {
	t.Helper()
	n.empty = n.store(t)
	n.took[injectRunning] = runInjector(t, n.Machine, "docker", inject)
	n.full = n.store(t)
	if visible := n.checkVisible(t); t.Failed() || visible < len(world.cache.Images) {
		t.Fatalf("after a clean run only %d images are visible", visible)
	}
	n.took[eject] = runInjector(t, n.Machine, "docker", eject)
	same(t, "after a clean eject", n.empty, n.store(t))
	n.down(t)
	n.took[injectStopped] = runInjector(t, n.Machine, "docker", inject)
	same(t, "after inject while docker is stopped", n.full, n.store(t))
	n.up(t)
	runInjector(t, n.Machine, "docker", eject)
	t.Logf("the runs take %v", n.took)
}

// checkVisible checks that a container of every image that a running dockerd lists
// would see the tree that it sees after a pull. It gives their number.
func (n *dockerNode) checkVisible(t *testing.T) int {
	t.Helper()
	const mnt = "/run/visible"
	ids := n.Output(t, "sh", "-ec", "docker images --all --quiet --no-trunc | sort -u")
	if ids == "" {
		return 0
	}
	var list []struct {
		ID          digest.Digest `json:"Id"`
		GraphDriver struct {
			Data struct{ UpperDir, LowerDir string }
		}
	}
	if err := json.Unmarshal([]byte(n.Output(t, append([]string{"docker", "image", "inspect"}, strings.Fields(ids)...)...)), &list); err != nil {
		t.Fatal(err)
	}
	script := "mkdir -p " + mnt + "\n"
	for i, img := range list {
		dir := fmt.Sprintf("%s/%d", mnt, i)
		script += "mkdir " + dir + "\n"
		if data := img.GraphDriver.Data; data.LowerDir == "" {
			script += fmt.Sprintf("mount --bind %s %s\n", data.UpperDir, dir)
		} else {
			script += fmt.Sprintf("mount -t overlay -o ro,lowerdir=%s:%s overlay %s\n", data.UpperDir, data.LowerDir, dir)
		}
	}
	if out, err := n.Run(t.Context(), "sh", "-ec", script); err != nil {
		t.Errorf("an image is visible and cannot be mounted: %v %s", err, out)
	}
	for i, img := range list {
		checkTree(t, img.ID.String(), targetOf(img.ID), n.Path(fmt.Sprintf("%s/%d", mnt, i)))
	}
	n.Output(t, "sh", "-ec", "for d in "+mnt+"/*; do ! mountpoint -q $d || umount $d; done; rm -rf "+mnt)
	return len(list)
}

// targetOf is the digest that the names of the image with this config lead to.
func targetOf(config digest.Digest) digest.Digest {
	for _, img := range world.cache.Images {
		if img.Config.Digest == config {
			return img.Target().Digest
		}
	}
	return ""
}

// dockerFault is something that goes wrong while the injector works with Docker.
type dockerFault struct {
	kind    string
	prepare func(t *testing.T, n *dockerNode)
	// strike says errNotRunning where there is nothing to strike at the moment.
	strike func(t *testing.T, n *dockerNode, r *rand.Rand, i *injection) error
	heal   func(t *testing.T, n *dockerNode)
	// unreadable is true of a fault after which the cache disk has to be mounted anew.
	unreadable bool
	// daemon is true of a fault that ends dockerd.
	daemon bool
	// passive is true of a fault that strikes only a run that fails by it.
	passive bool
}

var errNotRunning = errors.New("not running")

var dockerFaults = []dockerFault{
	{kind: "injector killed, docker", strike: func(_ *testing.T, _ *dockerNode, _ *rand.Rand, i *injection) error { return i.kill() }},
	{kind: "dockerd killed", daemon: true, strike: killDockerd},
	{kind: "dockerd and injector killed", daemon: true, strike: func(t *testing.T, n *dockerNode, r *rand.Rand, i *injection) error {
		if err := i.kill(); err != nil {
			return err
		}
		return killDockerd(t, n, r, i)
	}},
	{kind: "containerd killed, docker", daemon: true, strike: func(_ *testing.T, n *dockerNode, _ *rand.Rand, _ *injection) error {
		return killed(n.Machine, "containerd")
	}, heal: func(t *testing.T, n *dockerNode) {
		n.Output(t, "systemctl", "start", "containerd.service")
		// dockerd tries again after a while only. Of one that is stopped nobody asks.
		n.Output(t, "sh", "-ec", `systemctl -q is-active docker.service || exit 0
			for i in $(seq 300); do
				! docker version --format '{{range .Server.Components}}{{.Name}} {{end}}' | grep -q containerd || exit 0
				sleep 0.1
			done
			exit 1`)
	}},
	{kind: "disk full, docker", passive: true, strike: onDockerStore(fillDisk, 512<<10), heal: emptyDockerStore},
	{kind: "inodes used up, docker", passive: true, strike: onDockerStore(fillInodes, 64), heal: emptyDockerStore},
	{
		kind: "cache disk fails every read, docker", unreadable: true, passive: true,
		prepare: func(t *testing.T, n *dockerNode) { n.ownCache(t) },
		strike:  func(_ *testing.T, n *dockerNode, _ *rand.Rand, _ *injection) error { return n.failCache() },
		heal:    func(t *testing.T, n *dockerNode) { n.replaceCache(t) },
	},
	{
		kind: "cache disk's device gone for good, docker", unreadable: true, passive: true,
		prepare: func(t *testing.T, n *dockerNode) { n.onMortalCache(t) },
		strike:  func(_ *testing.T, n *dockerNode, _ *rand.Rand, _ *injection) error { return n.device.Kill() },
		heal:    func(t *testing.T, n *dockerNode) { n.replaceCache(t) },
	},
	{
		kind: "cache disk unmounted, docker", passive: true,
		strike: func(t *testing.T, n *dockerNode, _ *rand.Rand, _ *injection) error { return n.unmountCache(t) },
		heal:   func(t *testing.T, n *dockerNode) { n.replaceCache(t) },
	},
}

// onMortalCache has what is registered, if anything, read from a device that can go.
func (n *dockerNode) onMortalCache(t *testing.T) {
	t.Helper()
	_, err := os.Stat(n.Path(nodestate.CacheDir))
	if err == nil {
		runInjector(t, n.Machine, "docker", eject)
	}
	n.mortalCache(t)
	if err == nil {
		runInjector(t, n.Machine, "docker", inject)
	}
}

func killDockerd(_ *testing.T, n *dockerNode, _ *rand.Rand, _ *injection) error {
	return killed(n.Machine, "dockerd")
}

// killed kills every process of the name, and says errNotRunning where there is none.
func killed(m *machine.Machine, name string) error {
	n, err := m.Signal(syscall.SIGKILL, name)
	if err == nil && n == 0 {
		err = errNotRunning
	}
	return err
}

func onDockerStore(fill filling, most int64) func(*testing.T, *dockerNode, *rand.Rand, *injection) error {
	return func(_ *testing.T, n *dockerNode, r *rand.Rand, _ *injection) error {
		return fill(r, n.Path(filepath.Join(nodestate.DockerDir, filler)), most)
	}
}

func emptyDockerStore(t *testing.T, n *dockerNode) {
	if err := os.RemoveAll(n.Path(filepath.Join(nodestate.DockerDir, filler))); err != nil {
		t.Fatal(err)
	}
}

// TestDocker lets one fault after another strike inject and eject.
func TestDocker(t *testing.T) {
	t.Parallel()
	n := newDockerNode(t)
	n.MountDisk(t, newStore(t), nodestate.DockerDir, "rw")
	n.start(t)
	n.learn(t)
	state := eject
	rounds(t, share(100), func(t *testing.T, r *rand.Rand) {
		command := eject
		if state == eject {
			command = pick(r, []string{injectRunning, injectStopped})
		}
		if command == injectStopped {
			n.down(t)
		}
		f, what := n.suffer(t, r, command)
		if f.heal != nil {
			f.heal(t, n)
		}
		if r.IntN(2) == 0 && !f.unreadable {
			n.up(t)
			n.checkVisible(t)
		} else if f.daemon && command != injectStopped {
			n.up(t)
		}
		before := n.units(t)
		state = pick(r, []string{inject, eject})
		n.recover(t, state, what, f.daemon && command == eject)
		if after := n.units(t); state == inject && strings.Contains(before, "inactive") && command != injectStopped && after != "active active" {
			t.Errorf("%s, then inject: docker's units are %s", what, after)
		}
		n.up(t)
		if f.unreadable && state == inject {
			n.checkVisible(t)
		}
	})
}

// suffer runs a command that a random fault strikes, and says which and when.
func (n *dockerNode) suffer(t *testing.T, r *rand.Rand, command string) (dockerFault, string) {
	t.Helper()
	for {
		f := draw(r, dockerFaults)
		if f.prepare != nil {
			f.prepare(t, n)
		}
		after := time.Duration(r.Int64N(int64(n.took[command])))
		i := startInjector(t, n.Machine, "docker", strings.Fields(command)[0])
		if i.runsFor(after) {
			what := fmt.Sprintf("%s, %v into %s", f.kind, after.Round(time.Millisecond), command)
			err := f.strike(t, n, r, i)
			status := i.wait(t)
			if err == nil {
				t.Logf("%s: exit status %d %s", what, status, i.last())
				if !f.passive || status != 0 {
					total.fault(f.kind)
				}
				return f, what
			}
			if !errors.Is(err, errNotRunning) {
				t.Fatalf("%s: %v", what, err)
			}
		} else {
			n.took[command] = n.took[command] * 9 / 10 // it was slower when it was timed
			i.wait(t)
		}
		// Once more, from where this run began.
		if command == eject {
			runInjector(t, n.Machine, "docker", inject)
			continue
		}
		n.up(t)
		runInjector(t, n.Machine, "docker", eject)
		if command == injectStopped {
			n.down(t)
		}
	}
}

// recover makes a plain run of inject or eject and compares the end.
func (n *dockerNode) recover(t *testing.T, command, after string, removing bool) {
	t.Helper()
	total.state()
	if command == inject {
		runInjector(t, n.Machine, "docker", inject)
		same(t, after+", then inject", n.full, n.store(t))
		return
	}
	n.up(t)
	runInjector(t, n.Machine, "docker", eject)
	if removing {
		// dockerd finishes the removal of a layer as it stops. Further layers of an image
		// that it had begun to remove belong to none: only another image that has them
		// takes them along.
		n.Output(t, "systemctl", "restart", "docker.service")
		runInjector(t, n.Machine, "docker", inject)
	}
	// What a killed eject has asked for, dockerd may still be doing.
	deadline := time.Now().Add(30 * time.Second)
	for {
		runInjector(t, n.Machine, "docker", eject)
		now := n.store(t)
		if len(treediff.Compare(n.empty, now)) == 0 {
			return
		}
		if time.Now().After(deadline) {
			same(t, after+", then eject", n.empty, now)
			return
		}
		time.Sleep(200 * time.Millisecond)
	}
}

// TestDockerPowerLoss cuts the power of a node with Docker at random moments of inject
// and eject.
func TestDockerPowerLoss(t *testing.T) {
	t.Parallel()
	n := newDockerNode(t)
	p := powered{n.Machine, "docker", nodestate.DockerDir, func() { n.start(t) }, func() { n.down(t) }}
	rec := p.record(t, func() { n.learn(t) })
	id, err := world.cache.ID()
	if err != nil {
		t.Fatal(err)
	}
	mountPoint := filepath.Join(nodestate.CacheDir, id.Encoded())
	rounds(t, share(40), func(t *testing.T, r *rand.Rand) {
		image, what := rec.cut(t, r)
		t.Log(what)
		shutDown := p.boot(t, image)
		total.fault("power lost, docker")
		// As an entry in fstab does at boot.
		n.Output(t, "sh", "-ec", "mkdir -p "+mountPoint+"; mount --bind "+cacheDir+" "+mountPoint)
		n.checkVisible(t)
		n.Output(t, "umount", mountPoint)
		// Its mount point is on the node's disk too, and may not be there yet.
		n.Output(t, "rm", "-r", nodestate.CacheDir)
		n.recover(t, pick(r, []string{inject, eject}), what, true)
		shutDown()
		n.Output(t, "sh", "-ec", "umount "+mountPoint+" 2>/dev/null || :; rm -rf "+nodestate.CacheDir)
	})
}
