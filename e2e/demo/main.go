// Command demo shows the whole way of an image: packer build puts it on a cache
// disk, the disk is attached to a node, and the image runs there without a pull.
// Every part is the real one: Packer, sshd, Docker, containerd, systemd; the two
// machines are systemd-nspawn's and the disk is a loop device.
//
//	demo          run it; `make demo` first installs what it needs
//	demo clean    remove everything that it, and the tests, keep in the cache folder
//
// IMAGES, a list of references with blanks between, takes the place of the demo's own
// images. SELKIES_BUILD_CACHE names the folder that keeps what is expensive to make.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/selkies-project/packer-plugin-selkies/e2e/desktop"
	"github.com/selkies-project/packer-plugin-selkies/e2e/host"
	"github.com/selkies-project/packer-plugin-selkies/e2e/machine"
	"github.com/selkies-project/packer-plugin-selkies/e2e/registry"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "demo:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	switch {
	case len(args) == 0:
		return demonstrate(ctx, strings.Fields(os.Getenv("IMAGES")))
	case len(args) == 1 && args[0] == "clean":
		return clean()
	}
	return fmt.Errorf("unknown arguments %q: give none, or clean", args)
}

// demo is a demonstration under way.
type demo struct {
	refs    []string // that the user named
	dir     string   // of this run, on a real file system
	blobs   string   // of the registry
	sshPort int

	registry *registry.Registry
	images   []desktop.Image
	build    *machine.Machine
	disk     *host.Loop
}

func demonstrate(ctx context.Context, refs []string) (err error) {
	if err := host.Check(); err != nil {
		return err
	}
	d := &demo{refs: refs}
	lock, err := d.prepare()
	if err != nil {
		return err
	}
	defer lock.Close()
	defer func() { err = errors.Join(err, d.close()) }()

	containerd, docker := newContainerd(), newDocker()
	began := time.Now()
	fmt.Printf("Everything is kept in %s. The first run makes images for many minutes; later ones take a few.\n", filepath.Dir(filepath.Dir(d.dir)))
	for _, step := range []struct {
		name string
		run  func(context.Context) error
	}{
		{"Building the plugin, the injector, Packer and containerd from source", d.buildPrograms},
		{"Filling a registry on loopback", d.fillRegistry},
		{"Booting a build machine", d.boot},
		{"Filling a cache disk: packer build", d.packerBuild},
		{"Detaching it from the build machine, attaching it read-only", d.attachReadOnly},
		{"containerd 2.4 on a new node: pull and start", d.pullOn(containerd)},
		{"containerd 2.4 on a new node: inject and start", d.injectOn(containerd)},
		{"Docker 20.10 on a new node: pull and start", d.pullOn(docker)},
		{"Docker 20.10 on a new node: inject and start", d.injectOn(docker)},
	} {
		fmt.Printf("==> %s\n", step.name)
		start := time.Now()
		if err := step.run(ctx); err != nil {
			if ctx.Err() != nil {
				return errors.New("interrupted")
			}
			return err
		}
		fmt.Printf("    done in %s\n", time.Since(start).Round(100*time.Millisecond))
	}
	fmt.Println()
	d.print(os.Stdout, containerd, docker)
	fmt.Printf("\nThe demo took %s. It can run again at once; `make demo-clean` removes what it keeps.\n",
		time.Since(began).Round(time.Second))
	return nil
}

// prepare makes the folder of this run, in the cache folder, where there is only one
// at a time, and removes that of a run which was killed.
func (d *demo) prepare() (lock *os.File, err error) {
	top, err := host.Cache("demo")
	if err != nil {
		return nil, err
	}
	// The layers and blobs of the images, the disk, the roots and a node's store took
	// 7 GB at most.
	const needed = 10e9
	var st unix.Statfs_t
	if err := unix.Statfs(top, &st); err != nil {
		return nil, err
	}
	if free := st.Bavail * uint64(st.Bsize); free < needed {
		return nil, fmt.Errorf("%s has %s free, %s are needed: set SELKIES_BUILD_CACHE to a folder with more", top, size(int64(free)), size(needed))
	}
	if lock, err = host.Lock(filepath.Join(top, ".lock")); err != nil {
		return nil, err
	}
	d.dir = filepath.Join(top, "run")
	if err := os.RemoveAll(d.dir); err != nil {
		return nil, errors.Join(err, lock.Close())
	}
	if d.blobs, err = desktop.Blobs(); err != nil {
		return nil, errors.Join(err, lock.Close())
	}
	return lock, os.Mkdir(d.dir, 0o755)
}

func (d *demo) buildPrograms(ctx context.Context) error {
	for _, tool := range []string{"packer", "containerd", "runc"} {
		if _, err := host.Tool(ctx, tool); err != nil {
			return err
		}
	}
	return errors.Join(
		host.Build(ctx, ".", d.plugin()),
		host.Build(ctx, "./injector", d.injector()),
	)
}

func (d *demo) plugin() string   { return filepath.Join(d.dir, "packer-plugin-selkies") }
func (d *demo) injector() string { return filepath.Join(d.dir, "selkies-image-injector") }

func (d *demo) fillRegistry(ctx context.Context) error {
	var err error
	if d.registry, err = registry.Start(registry.Config{Dir: d.blobs}); err != nil {
		return err
	}
	if len(d.refs) > 0 {
		d.images, err = copyImages(ctx, d.registry.Addr, d.refs)
	} else {
		d.images, err = desktop.Push(ctx, d.registry.Addr, d.blobs)
	}
	if err != nil {
		return err
	}
	for _, i := range d.images {
		unpacked := ""
		if i.Unpacked > 0 {
			unpacked = ", " + size(i.Unpacked) + " unpacked"
		}
		fmt.Printf("    %s: %s%s\n", i.Ref, size(i.Packed), unpacked)
	}
	return nil
}

func (d *demo) boot(ctx context.Context) error {
	var err error
	if d.sshPort, err = machine.FreePort(); err != nil {
		return err
	}
	if d.build, err = machine.Boot(ctx, machine.Config{Name: "build", SSHPort: d.sshPort}); err != nil {
		return err
	}
	return d.build.StartDocker(ctx, machine.Docker{Release: machine.Debian})
}

func (d *demo) close() error {
	var errs []error
	if d.build != nil {
		errs = append(errs, d.build.Close())
	}
	if d.disk != nil {
		errs = append(errs, d.disk.Close())
	}
	if d.registry != nil {
		errs = append(errs, d.registry.Stop())
	}
	return errors.Join(append(errs, os.RemoveAll(d.dir))...)
}

// clean removes everything that the demo and the tests keep. Packages that were
// installed stay.
func clean() error {
	if err := machine.Reap(); err != nil {
		return err
	}
	top, err := host.Cache("")
	if err != nil {
		return err
	}
	live, err := filepath.Glob(filepath.Join(top, "machines", "selkies-*"))
	if err != nil {
		return err
	}
	if len(live) > 0 {
		return fmt.Errorf("%s runs: end the demo or the tests that use it", live[0])
	}
	for _, name := range []string{"machines", "demo", "bench", "roots", "tools", "programs"} {
		if err := os.RemoveAll(filepath.Join(top, name)); err != nil {
			return err
		}
	}
	fmt.Println("removed the machines, images, roots, tools and programs in", top)
	// Others may keep something there.
	if err := os.Remove(top); err != nil && !errors.Is(err, unix.ENOTEMPTY) {
		return err
	}
	return nil
}
