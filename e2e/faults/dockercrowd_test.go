//go:build e2e

package faults_test

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/selkies-project/packer-plugin-selkies/e2e/machine"
	"github.com/selkies-project/packer-plugin-selkies/e2e/nodestate"
	"github.com/selkies-project/packer-plugin-selkies/e2e/pods"
	"github.com/selkies-project/packer-plugin-selkies/e2e/treediff"
)

// dockerCrowd works on a node with Docker, which inject restarts.
type dockerCrowd struct {
	*crowd
	n *dockerNode
	// containers is held by each user for as long as its container is there.
	containers sync.RWMutex
}

// TestConcurrentDocker lets injectors and users of Docker work on the same images at once.
// Users are without Docker for moments, and go on after each; no container sees anything
// but its whole tree, and nothing is left over.
func TestConcurrentDocker(t *testing.T) {
	t.Parallel()
	if *faults < 50 {
		return // dockerd has many states of its own to be stopped in, which a few seconds hardly show
	}
	n := newDockerNode(t)
	n.MountDisk(t, newStore(t), nodestate.DockerDir, "rw")
	n.start(t)
	err := n.StartDocker(t.Context(), machine.Docker{Release: machine.Debian, Config: map[string]any{"live-restore": true}})
	if err != nil {
		t.Fatal(err)
	}
	c := &dockerCrowd{crowd: newCrowd(n.Machine, "docker", "images pulled", "images removed", "containers run"), n: n}
	// Docker remembers for good where layers come from.
	for _, ref := range world.refs {
		n.Output(t, "docker", "pull", "-q", ref)
	}
	c.removeAll(t)
	n.learn(t)
	took := c.work(t.Context(), t, time.Duration(*faults)*time.Second/2, c.injects, c.injects, c.ejects, c.user, c.user, c.user)
	if t.Failed() {
		return
	}
	c.removeAll(t)
	c.adopt(t)
	n.recoverOwn(t, eject, "everything at once")
	n.recoverOwn(t, inject, "everything at once, and eject")
	n.checkVisible(t)
	n.recoverOwn(t, eject, "everything at once, eject and inject")
	total.crowded(took)
}

// recoverOwn makes a plain run of inject or eject and compares what is the injector's: what a
// clean inject adds. dockerd itself leaves for good what it had half unpacked of a pull as it
// was stopped.
func (n *dockerNode) recoverOwn(t *testing.T, command, after string) {
	t.Helper()
	total.state()
	runInjector(t, n.Machine, "docker", command)
	own := func(tree treediff.Tree) treediff.Tree {
		tree = maps.Clone(tree)
		maps.DeleteFunc(tree, func(name string, _ treediff.Entry) bool {
			_, node := n.empty[name]
			_, ours := n.full[name]
			return node || !ours
		})
		return tree
	}
	want := treediff.Tree{}
	if command == inject {
		want = own(n.full)
	}
	same(t, after+", then "+command, want, own(n.store(t)))
}

// adopt has Docker take layers that no image has, and removes them. dockerd keeps those that
// it had unpacked of a pull as it was stopped, until a pull takes them; none is the injector's.
func (c *dockerCrowd) adopt(t *testing.T) {
	t.Helper()
	runInjector(t, c.n.Machine, "docker", eject)
	if links := c.n.Output(t, "find", nodestate.DockerDir+"/image", "-name", "tar-split.json.gz", "-type", "l"); links != "" {
		t.Errorf("everything at once, then eject: the injector's layers are left: %s", links)
	}
	c.n.Output(t, "systemctl", "restart", "docker.service")
	for _, ref := range world.refs {
		c.n.Output(t, "docker", "pull", "-q", ref)
	}
	c.removeAll(t)
}

// removeAll removes every image.
func (c *dockerCrowd) removeAll(t *testing.T) {
	t.Helper()
	c.n.Output(t, "sh", "-ec", "docker images -aq --no-trunc | sort -u | xargs -r docker rmi -f")
}

// injects may find that a user's call has had systemd start dockerd while its units were being
// stopped.
func (c *dockerCrowd) injects(context.Context, *rand.Rand, int) {
	c.run(inject, "while images were being registered there; run inject again")
}

func (c *dockerCrowd) ejects(_ context.Context, r *rand.Rand, _ int) {
	time.Sleep(time.Duration(r.Int64N(int64(2 * time.Second))))
	if r.IntN(2) == 0 {
		// When no container is there that would have it refused.
		c.containers.Lock()
		defer c.containers.Unlock()
	}
	c.take(func() []string {
		// Of a container that was there, and of one that has come since.
		if took := c.eject("remove it with docker rm", "is using its referenced image"); took != nil {
			return took
		}
		return world.refs // what it has removed until then
	})
}

// life is the life of Docker's units, while both run; "" else.
func (c *dockerCrowd) life(ctx context.Context) string {
	out, err := c.n.Run(ctx, "systemctl", "show", "-p", "ActiveState", "-p", "InvocationID", "docker.socket", "docker.service")
	if err != nil || strings.Count(out, "ActiveState=active") < 2 {
		return ""
	}
	return out
}

// absent is what docker says when dockerd is not there, or goes away.
var absent = []string{"Cannot connect to the Docker daemon", "error during connect", "EOF", "context canceled", "connection reset by peer"}

// docker runs a docker command, again if dockerd was not there all the time.
func (c *dockerCrowd) docker(ctx context.Context, args ...string) (string, error) {
	for {
		life := c.life(ctx)
		out, err := c.n.Run(ctx, append([]string{"docker"}, args...)...)
		if err == nil || ctx.Err() != nil {
			return strings.TrimSpace(out), errors.Join(err, ctx.Err())
		}
		if !contains(err.Error(), absent...) {
			return "", err
		}
		if life != "" && life == c.life(ctx) {
			return "", fmt.Errorf("docker ran all the time: %w", err)
		}
		c.count("calls without docker")
		time.Sleep(100 * time.Millisecond)
	}
}

// user pulls an image if it is not there, or all the same, runs it, compares what the
// container sees, and now and then removes the image.
func (c *dockerCrowd) user(ctx context.Context, r *rand.Rand, i int) {
	ctx, cancel := context.WithTimeout(ctx, stepLimit)
	defer cancel()
	ref, from := pick(r, world.refs), time.Now()
	there, err := c.docker(ctx, "images", "-q", ref)
	if err != nil {
		c.fail("asking for %s: %v", ref, err)
		return
	}
	if there == "" || r.IntN(2) == 0 {
		if _, err := c.docker(ctx, "pull", "-q", ref); err != nil {
			c.said(ctx, "pulling", ref, from, err)
			return
		}
		c.count("images pulled")
	}
	if !c.container(ctx, r, fmt.Sprintf("user-%d", i), ref, from) {
		return
	}
	if r.IntN(3) == 0 {
		var err error
		c.take(func() []string {
			_, err = c.docker(ctx, "rmi", ref)
			return []string{ref}
		})
		if err != nil && !contains(err.Error(), "No such image", "is using its referenced image", "is being used by") {
			c.fail("removing %s: %v", ref, err)
			return
		}
		c.count("images removed")
	}
}

// container runs one of the image, compares what it sees, and removes it. It is false where
// that was not to be.
func (c *dockerCrowd) container(ctx context.Context, r *rand.Rand, name, ref string, from time.Time) bool {
	c.containers.RLock()
	defer c.containers.RUnlock()
	defer func() {
		if _, err := c.docker(ctx, "rm", "-f", name); err != nil && !strings.Contains(err.Error(), "No such container") {
			c.fail("removing a container: %v", err)
		}
	}()
	if _, err := c.docker(ctx, "create", "--pull", "never", "--name", name, "--network", "none", ref, "/bin/busybox", "sleep", "86397"); err != nil && !strings.Contains(err.Error(), "is already in use") {
		c.said(ctx, "creating a container of", ref, from, err)
		return false
	}
	life := c.life(ctx)
	if _, err := c.docker(ctx, "start", name); err != nil {
		// Of a container that dockerd was starting as it was stopped.
		if strings.Contains(err.Error(), "id already in use") && (life == "" || life != c.life(ctx)) {
			c.count("containers lost to a restart")
			return false
		}
		c.said(ctx, "running", ref, from, err)
		return false
	}
	for range 2 {
		pid, err := c.docker(ctx, "inspect", "-f", "{{.State.Pid}}", name)
		if err != nil {
			c.fail("looking at a container of %s: %v", ref, err)
			return false
		}
		if pid == "0" {
			// dockerd does not know containers again that it was starting as it was stopped.
			if life != "" && life == c.life(ctx) {
				c.fail("a container of %s has ended by itself", ref)
			}
			c.count("containers lost to a restart")
			return false
		}
		tree, err := treediff.Dir(c.n.Path("/proc/" + pid + "/root"))
		if err != nil {
			c.fail("reading the tree of %s: %v", ref, err)
			return false
		}
		delete(tree, ".dockerenv")
		delete(tree, "etc/mtab")
		c.compare(ref, pods.WithoutRuntime(tree))
		time.Sleep(time.Duration(r.Int64N(int64(time.Second)))) // with a restart in it, or not
	}
	c.count("containers run")
	return true
}
