// Package imagecache is the Packer provisioner selkies-image-cache. It fills a disk
// of the build VM with container images through the VM's Docker and records in a
// layer manifest what is where, so that the injector can make the images appear on
// a node without a pull.
package imagecache

import (
	"context"
	"errors"
	"fmt"
	"path"
	"strings"
	"time"

	"github.com/docker/go-units"
	"github.com/hashicorp/hcl/v2/hcldec"
	packersdk "github.com/hashicorp/packer-plugin-sdk/packer"
	"github.com/opencontainers/go-digest"

	"github.com/selkies-project/packer-plugin-selkies/internal/printable"
	"github.com/selkies-project/packer-plugin-selkies/manifest"
)

// cleanupTimeout bounds the clean-up of a build that failed or was cancelled.
const cleanupTimeout = 100 * time.Second

// Provisioner implements packersdk.Provisioner.
type Provisioner struct{ config Config }

var _ packersdk.Provisioner = (*Provisioner)(nil)

// ConfigSpec is the HCL2 specification of Config.
func (p *Provisioner) ConfigSpec() hcldec.ObjectSpec { return p.config.FlatMapstructure().HCL2Spec() }

// Prepare decodes and checks the configuration. Its errors name the option.
func (p *Provisioner) Prepare(raws ...any) error { return p.config.prepare(raws...) }

// Provision fills the disk. It may run again on the same instance, as max_retries
// has it.
func (p *Provisioner) Provision(ctx context.Context, ui packersdk.Ui, comm packersdk.Communicator, data map[string]any) error {
	b := &build{config: &p.config, ui: ui, comm: comm, data: data}
	defer b.cleanUp(ctx)
	type step struct {
		name string
		run  func(context.Context) error
	}
	// These change nothing, neither on the disk nor in the VM's Docker.
	steps := []step{
		{"finding credentials", b.findCredentials},
		{"connecting to the build VM", b.connect},
		{"listing catalogs", b.listCatalogs},
		{"resolving images", b.resolve},
		{"looking at the disk", b.look},
		{"reading the earlier layer manifest", b.readEarlier},
		{"planning", b.plan},
	}
	if !p.config.DryRun {
		steps = append(steps, []step{
			{"preparing the disk", b.prepareDisk},
			{"starting Docker on the disk", b.startDocker},
			{"pulling", b.pull},
			{"verifying layers", b.verifyLayers},
			{"keeping layer blobs", b.keepBlobs},
			{"recording the layer manifest", b.record},
			{"pruning", b.prune},
			{"tracing", b.trace},
			{"verifying the disk", b.verifyDisk},
			{"writing the report", b.report},
			{"releasing the disk", b.release},
		}...)
	}
	for _, s := range steps {
		err := s.run(ctx)
		if ctx.Err() != nil {
			return fmt.Errorf("%s: %w", s.name, context.Cause(ctx))
		}
		if err != nil {
			return errors.New(shown(err.Error()))
		}
	}
	return nil
}

// build is the state of one run.
type build struct {
	config *Config
	ui     packersdk.Ui
	comm   packersdk.Communicator
	data   map[string]any

	registries *registries
	vm         *vm
	references []reference // of the configuration, then of the catalogs
	images     []*wanted
	failures   []failure
	disk       *cacheDisk             // nil without a disk block
	stored     map[digest.Digest]bool // chain IDs of the layers that were there
	engine     *engine
	store      manifest.Store
	root       string // where the disk with the store is mounted on the VM

	earlier     *manifest.Manifest
	earlierData []byte
	former      *manifest.Manifest // earlier, also when images have made room since
	// mayRemove says which names of images may be taken out of the store.
	mayRemove func(name string) bool
	// crowded is true when what is to be pulled fits only without what is no longer listed.
	crowded  bool
	manifest []byte
}

func (b *build) say(format string, a ...any) {
	b.ui.Say(shown(fmt.Sprintf(format, a...)))
}

// shown is text as Packer's terminal and log may have it: registries, containers and the build
// VM have had a say in it.
func shown(text string) string {
	return printable.Lines(packersdk.LogSecretFilter.FilterString(text))
}

func (b *build) findCredentials(ctx context.Context) error {
	b.registries = newRegistries(b.config)
	return b.registries.hideSecrets(ctx, b.config.references, b.config.catalogs)
}

func (b *build) connect(ctx context.Context) (err error) {
	b.vm, err = newVM(ctx, b.comm, b.config, b.data)
	return err
}

func (b *build) listCatalogs(ctx context.Context) (err error) {
	b.references, err = b.registries.listAll(ctx, b.config.references, b.config.catalogs, b.config.Concurrency)
	if n := len(b.references) - len(b.config.references); n > 0 {
		b.say("found %d references in catalogs", n)
	}
	return err
}

// resolve finds out what the registries have, before anything on the VM changes.
func (b *build) resolve(ctx context.Context) (err error) {
	b.images, b.failures, err = b.registries.resolveAll(ctx, b.references, b.config.platform, b.config.Concurrency)
	if err != nil {
		return err
	}
	if len(b.images) == 0 {
		return b.failed()
	}
	b.say("resolved %d references to %d images for %s", len(b.references)-len(b.failures), len(b.images), b.config.Platform)
	b.sayFailures(b.failures)
	return nil
}

func (b *build) sayFailures(failures []failure) {
	for _, f := range failures {
		b.say("%v; going on with the others", f)
	}
}

// look finds the disk, or else the VM's own daemon, and refuses what cannot be used.
func (b *build) look(ctx context.Context) error {
	if b.config.Disk == nil {
		return b.connectDocker(ctx, b.config.DockerHost)
	}
	b.root = b.config.Disk.MountPoint
	b.disk = &cacheDisk{vm: b.vm, config: *b.config.Disk, say: b.say}
	return b.disk.look(ctx)
}

func (b *build) prepareDisk(ctx context.Context) error {
	if b.disk == nil {
		return nil
	}
	if err := b.disk.prepare(ctx); err != nil {
		return err
	}
	return b.disk.removeOrphans(ctx)
}

func (b *build) startDocker(ctx context.Context) error {
	if b.disk == nil {
		return nil
	}
	host, err := b.disk.startDaemon(ctx, b.config)
	if err != nil {
		return err
	}
	return b.connectDocker(ctx, host)
}

func (b *build) connectDocker(ctx context.Context, host string) (err error) {
	// One connection more than there are pulls, for everything else.
	if b.engine, err = connectEngine(ctx, b.vm, host, b.config.Concurrency+1); err != nil {
		return err
	}
	if err := b.engine.usable(); err != nil {
		return err
	}
	b.store = manifest.Store{Driver: manifest.DriverOverlay2, EngineVersion: b.engine.info.ServerVersion, Blobs: b.config.KeepBlobs}
	if b.disk != nil {
		b.store.Root = b.config.Disk.DockerRoot
	} else {
		mounts, err := mountTable(ctx, b.vm)
		if err != nil {
			return err
		}
		if b.root, b.store.Root, err = storeDisk(mounts, b.engine.info.DockerRootDir); err != nil {
			return err
		}
	}
	if err := b.removeTraced(ctx); err != nil {
		return err
	}
	b.say("Docker %s on the build VM fills %s", b.store.EngineVersion, path.Join(b.root, b.store.Root))
	return nil
}

func (b *build) readEarlier(ctx context.Context) (err error) {
	if b.disk == nil || !b.disk.blank {
		b.earlier, b.earlierData, err = readManifest(ctx, b.vm, b.root, b.say)
	}
	b.former = b.earlier
	b.mayRemove = func(string) bool { return true }
	if b.disk == nil {
		b.mayRemove = recordedNames(b.earlier)
	}
	return err
}

func (b *build) pull(ctx context.Context) error {
	if b.crowded {
		if _, err := b.makeRoom(ctx, true); err != nil {
			return err
		}
	}
	p := &puller{
		engine: b.engine, registries: b.registries, platform: b.config.platform, patience: b.patience(),
		progress: pullProgress(b.images, b.stored, time.Now()),
	}
	var pulled []*wanted
	var failures []failure
	var err error
	p.progress.during(ctx, b.say, func() {
		pulled, failures, err = b.makingRoom(ctx, func() ([]*wanted, []failure, error) {
			return p.pullAll(ctx, b.images, b.config.Concurrency)
		})
	})
	if err != nil {
		return err
	}
	done, _, kept := p.progress.counts()
	b.say("pulled %s, kept %s", units.HumanSize(float64(done)), units.HumanSize(float64(kept)))
	b.images, b.failures = pulled, append(b.failures, failures...)
	// What was pulled stays on the disk for the next try, and nothing that the layer
	// manifest names has gone.
	return b.failed()
}

func (b *build) patience() patience { return patience{attempts: b.config.MaxPullAttempts, say: b.say} }

// failed is one error that names every reference that could not be had.
func (b *build) failed() error {
	if len(b.failures) == 0 {
		return nil
	}
	lines := make([]string, len(b.failures))
	for i, f := range b.failures {
		lines[i] = oneLine(f.Error())
	}
	return fmt.Errorf("%d of %d references failed: %s", len(lines), len(b.references), strings.Join(lines, "; "))
}

// verifyLayers runs before anything is recorded or dropped on the word of the store.
func (b *build) verifyLayers(ctx context.Context) error {
	if !b.config.Verify {
		return nil
	}
	v := &verifier{
		engine: b.engine, say: b.say,
		remedy: "remove the image from the build VM's Docker and build again",
	}
	if b.disk != nil {
		v.remedy = `build once with disk.format = "always" to fill the disk anew`
	}
	return v.verify(ctx, b.images)
}

func (b *build) keepBlobs(ctx context.Context) error {
	if !b.config.KeepBlobs {
		return nil
	}
	kept, failures, err := b.makingRoom(ctx, func() ([]*wanted, []failure, error) {
		// Each blob takes a session of the SSH connection, as the engine's idle connections do.
		b.engine.hangUp(ctx)
		return newBlobStore(b.vm, b.root).keep(ctx, b.images, b.config.Concurrency, b.patience())
	})
	if err != nil {
		return err
	}
	b.images, b.failures = kept, append(b.failures, failures...)
	return b.failed()
}

func (b *build) record(ctx context.Context) error {
	r := &recorder{engine: b.engine, platform: b.config.platform, store: b.store, dataRoot: b.engine.info.DockerRootDir,
		concurrency: b.config.Concurrency}
	m, err := r.record(ctx, b.images, b.created(time.Now()))
	if err != nil {
		return err
	}
	if b.manifest, err = writeManifest(ctx, b.vm, b.root, m, b.earlier, b.earlierData); err != nil {
		return err
	}
	if b.config.ManifestOutput != "" {
		if err := writeLocal("manifest_output", b.config.ManifestOutput, b.manifest); err != nil {
			return err
		}
	}
	written, err := manifest.Decode(b.manifest)
	if err != nil {
		return err
	}
	id, err := written.ID()
	if err != nil {
		return err
	}
	b.say("recorded %d images with %d layers, cache ID %s", len(written.Images), len(written.Layers), id)
	return nil
}

// created is when a generation is recorded: by nodes, of two the later one counts, so it
// comes after the one before, also by a clock that was put back or is another host's.
func (b *build) created(now time.Time) time.Time {
	if b.earlier != nil && now.Before(b.earlier.Created.Add(time.Second)) {
		return b.earlier.Created.Add(time.Second)
	}
	return now
}

// prune runs when everything wanted is there: an image that is dropped earlier
// takes layers along that the new ones share. The layer manifest never names what
// is gone, whenever the build is cut off.
func (b *build) prune(ctx context.Context) error {
	if b.config.Prune.False() {
		return nil
	}
	if err := b.pruner().prune(ctx, b.images); err != nil {
		return err
	}
	blobs := newBlobStore(b.vm, b.root)
	if !b.config.KeepBlobs {
		return blobs.remove(ctx)
	}
	return blobs.prune(ctx, wantedBlobs(b.images))
}

func (b *build) pruner() *pruner {
	return &pruner{engine: b.engine, say: b.say, mayRemove: b.mayRemove, unnamed: b.disk != nil}
}

func (b *build) verifyDisk(ctx context.Context) error {
	return verifyDisk(ctx, b.vm, b.root, b.manifest)
}

// release leaves the disk clean: with a disk block unmounted, else flushed, since
// an image may be made of it at any moment from now.
func (b *build) release(ctx context.Context) error {
	b.engine.close()
	if b.disk == nil {
		if _, err := b.vm.run(ctx, "sync"); err != nil {
			return fmt.Errorf("flushing the disk: %w", err)
		}
		return nil
	}
	return b.disk.release(ctx)
}

// cleanUp takes back what a failed or cancelled build has on the VM. Should Packer
// not leave it the time, the VM does the same by itself; see lifeline.
func (b *build) cleanUp(ctx context.Context) {
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), cleanupTimeout)
	defer cancel()
	if b.engine != nil {
		b.engine.close()
	}
	if b.disk != nil {
		if err := b.disk.free(ctx); err != nil {
			b.ui.Error(shown(err.Error()))
		}
	}
}
