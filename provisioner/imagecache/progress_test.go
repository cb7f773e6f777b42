package imagecache

import (
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// TestProgressOfBlobs moves two images' blobs without unpacking them.
func TestProgressOfBlobs(t *testing.T) {
	image := func(name string) *wanted {
		ref, err := parseReference("images[0]", name)
		if err != nil {
			t.Fatal(err)
		}
		return &wanted{refs: []reference{ref}}
	}
	start := time.Now()
	p := newProgress("keeping blobs", start)
	own, shared, there := digest.FromString("own"), digest.FromString("shared"), digest.FromString("there")
	a, b := p.add(image("a:1")), p.add(image("b:1"))
	p.addBlob(a, own, 10e6, true)
	p.addBlob(a, shared, 100e6, true)
	p.addBlob(b, shared, 100e6, true)
	p.addBlob(b, there, 7e6, false)
	want := func(after time.Duration, lines ...string) {
		t.Helper()
		if diff := cmp.Diff(strings.Join(lines, "\n"), strings.Join(p.lines(start.Add(after)), "\n")); diff != "" {
			t.Error(diff)
		}
	}
	p.moved(own, 10e6)
	want(time.Second, "keeping blobs: 0 of 2 images, 10MB of 110MB, 10MB/s, about 10s left", "  a:1: 10MB of 110MB")
	p.moved(shared, 50e6)
	p.moved(shared, 20e6) // another attempt
	want(2*time.Second, "keeping blobs: 0 of 2 images, 60MB of 110MB, 50MB/s, about 1s left", "  a:1: 60MB of 110MB", "  b:1: 50MB of 100MB")
	p.moved(shared, 200e6)
	want(3*time.Second, "keeping blobs: 2 of 2 images, 110MB of 110MB, 50MB/s")
}

// TestProgress pulls two images that share a layer onto a disk that has their base.
func TestProgress(t *testing.T) {
	blob := func(name string, size int64) ocispec.Descriptor {
		return ocispec.Descriptor{Digest: digest.FromString(name), Size: size}
	}
	base, shared, top := blob("base", 50e6), blob("shared", 100e6), blob("top", 20e6)
	image := func(name string, blobs ...ocispec.Descriptor) *wanted {
		ref, err := parseReference("images[0]", name)
		if err != nil {
			t.Fatal(err)
		}
		w := &wanted{refs: []reference{ref}, blobs: blobs}
		for _, b := range blobs {
			w.chain = append(w.chain, "chain-"+b.Digest)
		}
		return w
	}
	a, b := image("a:1", base, shared), image("b:1", base, shared, top)
	start := time.Now()
	p := pullProgress([]*wanted{a, b}, map[digest.Digest]bool{"chain-" + base.Digest: true}, start)
	send := func(w *wanted, layer ocispec.Descriptor, status string, current int64) {
		e := event{ID: shortID(layer.Digest), Status: status}
		e.Progress.Current = current
		p.event(w, e)
	}
	want := func(after time.Duration, lines ...string) {
		t.Helper()
		if diff := cmp.Diff(strings.Join(lines, "\n"), strings.Join(p.lines(start.Add(after)), "\n")); diff != "" {
			t.Error(diff)
		}
	}

	p.start(a)
	p.start(b)
	send(a, base, "Already exists", 0)
	send(b, base, "Already exists", 0)
	// Both pulls tell of the one download of the shared layer.
	send(a, shared, "Downloading", 60e6)
	send(b, shared, "Downloading", 60e6)
	want(5*time.Second, "pulling: 0 of 2 images, 60MB of 120MB, 12MB/s, about 5s left", "  a:1: 60MB of 100MB", "  b:1: 60MB of 120MB")
	send(a, shared, "Download complete", 0)
	send(b, top, "Downloading", 5e6)
	want(10*time.Second, "pulling: 0 of 2 images, 105MB of 120MB, 9MB/s, about 1s left", "  a:1: 100MB downloaded, 0B of it extracted", "  b:1: 105MB of 120MB")
	send(a, shared, "Extracting", 80e6)
	want(11*time.Second, "pulling: 0 of 2 images, 105MB of 120MB", "  a:1: 100MB downloaded, 80MB of it extracted")
	send(a, shared, "Pull complete", 0)
	p.finish(a, true)
	// Nothing has moved, so nothing of b is told again.
	want(15*time.Second, "pulling: 1 of 2 images, 105MB of 120MB")
	// A retry counts no byte twice.
	send(b, shared, "Already exists", 0)
	send(b, top, "Downloading", 1e6)
	send(b, top, "Download complete", 0)
	send(b, top, "Pull complete", 0)
	p.finish(b, true)
	want(20*time.Second, "pulling: 2 of 2 images, 120MB of 120MB, 3MB/s")
	if done, total, kept := p.counts(); done != 120e6 || total != 120e6 || kept != 50e6 {
		t.Errorf("done %d, total %d, kept %d", done, total, kept)
	}
}
