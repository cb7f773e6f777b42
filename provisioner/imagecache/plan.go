package imagecache

import (
	"bytes"
	"context"
	"fmt"
	"path"
	"slices"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/docker/go-units"
	"github.com/opencontainers/go-digest"

	"github.com/selkies-project/packer-plugin-selkies/manifest"
)

// plan says what is to be pulled, before anything is, and whether it fits.
func (b *build) plan(ctx context.Context) error {
	room, err := b.takeStock(ctx)
	if err != nil {
		return err
	}
	if err := b.refuseZstd(); err != nil {
		return err
	}
	p := pullProgress(b.images, b.stored, time.Now())
	for _, line := range p.table() {
		b.say("%s", line)
	}
	_, pull, _ := p.counts()
	var warning string
	if b.crowded, warning, err = checkRoom(pull, room, b.unlisted(), b.config.KeepBlobs); err != nil {
		return err
	}
	if warning != "" {
		b.say("%s", warning)
	}
	if b.config.DryRun {
		b.say("dry_run is set: nothing was pulled, and the disk is as it was")
		return b.failed()
	}
	return nil
}

// zstdSince is the first major version of Docker that unpacks zstd layers.
const zstdSince = 23

// refuseZstd fails the images of which layers are to be pulled that Docker cannot unpack.
func (b *build) refuseZstd() error {
	version := b.dockerVersion()
	if unpacksZstd(version) {
		return nil
	}
	err := fmt.Errorf("its layers are zstd, which Docker %s cannot unpack; install Docker %d or newer on the build VM", version, zstdSince)
	var failures []failure
	b.images = slices.DeleteFunc(b.images, func(w *wanted) bool {
		for i, l := range w.blobs {
			if strings.HasSuffix(l.MediaType, "+zstd") && !b.stored[w.chain[i]] {
				failures = append(failures, w.failures(err)...)
				return true
			}
		}
		return false
	})
	b.failures = append(b.failures, failures...)
	if len(b.images) == 0 {
		return b.failed()
	}
	b.sayFailures(failures)
	return nil
}

// dockerVersion is that of the daemon that pulls, which with a disk block does not run yet.
func (b *build) dockerVersion() string {
	if b.disk != nil {
		return b.disk.dockerVersion
	}
	return b.engine.info.ServerVersion
}

// unpacksZstd is also true of versions without a number, as builds from source have.
func unpacksZstd(version string) bool {
	major, _, _ := strings.Cut(version, ".")
	n, err := strconv.Atoi(major)
	return err != nil || n >= zstdSince
}

// takeStock finds out which layers are there, and for how many bytes there is room
// beside them.
func (b *build) takeStock(ctx context.Context) (room int64, err error) {
	if b.disk == nil {
		if b.stored, err = storedLayers(ctx, b.vm, b.engine.info.DockerRootDir); err != nil {
			return 0, err
		}
		return freeBytes(ctx, b.vm, b.engine.info.DockerRootDir)
	}
	if !b.disk.blank {
		if b.stored, err = storedLayers(ctx, b.vm, path.Join(b.config.Disk.MountPoint, b.config.Disk.DockerRoot)); err != nil {
			return 0, err
		}
	}
	return b.disk.room(ctx)
}

// storedLayers are the chain IDs that Docker's metadata in a data root has: also those
// that a build left there which did not get as far as to write a layer manifest. A pull
// takes them for present.
func storedLayers(ctx context.Context, r *vm, dataRoot string) (map[digest.Digest]bool, error) {
	dir := path.Join(dataRoot, "image", manifest.DriverOverlay2, "layerdb", digest.SHA256.String())
	chains := map[digest.Digest]bool{}
	if _, err := r.run(ctx, "stat", "--format=%F", dir); exitStatus(err) > 0 {
		return chains, nil // no store yet
	} else if err != nil {
		return nil, err
	}
	out, err := r.run(ctx, "find", dir, "-mindepth", "1", "-maxdepth", "1", "-type", "d", "-printf", `%f\0`)
	if err != nil {
		return nil, fmt.Errorf("listing the layers that are there: %w", err)
	}
	for encoded := range strings.SplitSeq(string(out), "\x00") {
		chains[digest.NewDigestFromEncoded(digest.SHA256, encoded)] = true
	}
	return chains, nil
}

// table lists the images with the compressed sizes of their layers. A layer that several
// images share is in the row of each, and once in the total.
func (p *progress) table() []string {
	_, pull, kept := p.counts()
	p.mu.Lock()
	defer p.mu.Unlock()
	var b bytes.Buffer
	w := tabwriter.NewWriter(&b, 0, 0, 3, ' ', 0)
	row := func(name string, pull, kept int64) {
		fmt.Fprintf(w, "%s\t%s\t%s\t%s\n", name, units.HumanSize(float64(pull+kept)), units.HumanSize(float64(kept)), units.HumanSize(float64(pull)))
	}
	fmt.Fprintln(w, "IMAGE\tCOMPRESSED\tON THE DISK\tTO PULL")
	for _, ip := range p.images {
		_, _, pull := p.imageLocked(ip)
		var size int64
		for _, d := range ip.byID {
			size += p.blobs[d].size
		}
		row(ip.image.String(), pull, size-pull)
	}
	row("total, shared layers once", pull, kept)
	w.Flush()
	return slices.Collect(strings.SplitSeq(strings.TrimSuffix(b.String(), "\n"), "\n"))
}
