//go:build e2e

package docker_test

import (
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/selkies-project/packer-plugin-selkies/injector/report"
)

// TestGenerations has two cache disks that share layers.
func TestGenerations(t *testing.T) {
	n := newNode(t, releases[0].docker)
	before := n.store(t)
	detach := n.attach(t, world.first.image, cacheDir)
	n.attach(t, world.second.image, "/mnt/disks/gke-secondary-disks/second")
	r := n.inject(t)
	if len(r.Disks) != 2 || r.Disks[0].CacheID.String() != world.second.id(t) || r.Disks[0].Registered != len(world.second.manifest.Layers) {
		t.Errorf("two disks: %+v", r.Disks)
	}
	n.hello(t, world.newer)

	// The older disk goes: what both have stays, and is read from the newer one.
	n.eject(t, world.first.id(t))
	n.Output(t, "umount", cacheDir)
	detach()
	n.hello(t, world.newer)
	n.hello(t, ref("shared:1"))
	n.hello(t, ref("two-tags:one"))
	if _, err := n.Run(t.Context(), "docker", "image", "inspect", ref("oci:latest")); err == nil {
		t.Error("an image of the older disk alone is still there")
	}
	if r := n.eject(t); len(r.Kept) > 0 {
		t.Errorf("kept: %q", r.Kept)
	}
	same(t, "after eject", before, n.store(t))

	// The older disk is gone without a word: the newer one heals what it has.
	detach = n.attach(t, world.first.image, cacheDir)
	n.inject(t, "--cache", cacheDir)
	n.Output(t, "umount", cacheDir, stateDir+"/"+strings.TrimPrefix(world.first.id(t), "sha256:"))
	detach()
	if _, err := n.Run(t.Context(), "docker", "run", "--rm", "--network", "none", ref("shared:1")); err == nil {
		t.Error("a container runs without its layers")
	}
	n.inject(t)
	n.hello(t, ref("shared:1"))
}

// TestMovedTag has a tag that the newer disk's build found on another image.
func TestMovedTag(t *testing.T) {
	moved := ref("oci:latest")
	third := world.second.copy(t)
	m := *third.manifest
	m.Images = slices.Clone(m.Images)
	for i := range m.Images {
		if slices.Contains(m.Images[i].Names, world.newer) {
			m.Images[i].Names = append(slices.Clone(m.Images[i].Names), moved)
		}
	}
	third.manifest = &m
	if err := third.writeManifest(t.Context(), third.image+".mnt"); err != nil {
		t.Fatal(err)
	}
	const newerDir = "/mnt/disks/gke-secondary-disks/third"

	n := newNode(t, releases[0].docker)
	before := n.store(t)
	n.attach(t, world.first.image, cacheDir)
	n.attach(t, third.image, newerDir)
	id := func(image string) any { return n.inspect(t, image)["Id"] }
	reasons := func(r *report.Inject) string {
		var all []string
		for _, d := range r.Disks {
			for _, img := range d.Images {
				all = append(all, img.Reason)
			}
		}
		return strings.Join(all, "")
	}

	n.inject(t, "--cache", cacheDir)
	older := id(moved)
	// Both at once, the older one named first.
	r := n.inject(t, "--cache", cacheDir, "--cache", newerDir)
	newer := id(world.newer)
	if id(moved) != newer || newer == older {
		t.Errorf("%s is %v, want the newer disk's %v", moved, id(moved), newer)
	}
	if want := moved + " comes from the newer cache " + third.short(t); reasons(r) != want {
		t.Errorf("reported %q, want %q", reasons(r), want)
	}
	n.hello(t, moved)
	settled, pid := n.store(t), n.pid(t)
	for _, args := range [][]string{nil, {"--cache", cacheDir}, {"--cache", newerDir}} {
		n.inject(t, args...)
		same(t, "after another run", settled, n.store(t))
	}
	if n.pid(t) != pid {
		t.Error("the newer disk's name restarted docker more than once")
	}

	// Without the newer one it is the older one's again.
	n.eject(t, third.id(t))
	n.inject(t, "--cache", cacheDir)
	if id(moved) != older {
		t.Errorf("%s is %v, want the older disk's %v", moved, id(moved), older)
	}
	// What someone on the node has made of it stays.
	n.Output(t, "docker", "tag", ref("shared:1"), moved)
	if r := n.inject(t); id(moved) != id(ref("shared:1")) || !strings.Contains(reasons(r), "another image as "+moved) {
		t.Errorf("%s is %v, and reported is %q", moved, id(moved), reasons(r))
	}
	n.Output(t, "docker", "rmi", moved)
	n.eject(t)
	same(t, "after eject", before, n.store(t))
}

// TestDeadDisk has a disk whose device fails every read, while the kernel goes on
// answering from memory.
func TestDeadDisk(t *testing.T) {
	for _, link := range []string{"symlink", "bind"} {
		t.Run(link, func(t *testing.T) {
			first := world.first.copy(t)
			n := newNode(t, releases[0].docker)
			n.attach(t, first.image, cacheDir)
			n.inject(t, "--link", link)
			if err := os.Truncate(first.image, 0); err != nil {
				t.Fatal(err)
			}
			var regs []report.Registration
			if err := n.injector(t, &regs, "status"); err == nil || !strings.Contains(err.Error(), "cache "+first.short(t)+": disk not readable") {
				t.Errorf("status says %v", err)
			}
			for _, r := range regs {
				if r.Readable && r.Layers > 0 {
					t.Errorf("status says that %s is readable", r.Names)
				}
			}
			n.attach(t, world.second.image, "/mnt/second")
			var refs []report.Reference
			if err := n.injector(t, &refs, "plan", "--cache", "/mnt/second", ref("shared:1")); err != nil || refs[0].Cover == report.Hit {
				t.Errorf("plan says %v, %+v", err, refs)
			}
			if link == "bind" {
				return
			}
			// The newer disk heals what it has.
			n.inject(t, "--cache", "/mnt/second")
			n.hello(t, ref("shared:1"))
			regs = nil
			_ = n.injector(t, &regs, "status") // the older one's others are still lost
			for _, r := range regs {
				if slices.Contains(r.Names, ref("shared:1")) && !r.Readable {
					t.Errorf("%s: %s", r.Names, r.Problem)
				}
			}
			// Nothing is led back to a disk that is dead.
			if r := n.eject(t, world.second.id(t)); len(r.Kept) == 0 {
				t.Errorf("nothing is kept: %+v", r)
			}
			n.hello(t, ref("shared:1"))
		})
	}
}
