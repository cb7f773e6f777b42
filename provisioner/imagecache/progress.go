package imagecache

import (
	"context"
	"fmt"
	"sync"
	"time"

	"github.com/docker/go-units"
	"github.com/opencontainers/go-digest"
)

// progressInterval is how often it is told how far a long step is.
const progressInterval = 10 * time.Second

// progress counts what moves, each blob once however many images share it.
type progress struct {
	// doing is what is done with the images.
	doing string
	// unpacks is true where a blob that has come is unpacked yet.
	unpacks bool

	mu     sync.Mutex
	blobs  map[digest.Digest]*blobProgress
	images []*imageProgress

	lastTime  time.Time
	lastBytes int64

	toldAt time.Time // when Docker last told of a pull
}

type blobProgress struct {
	size int64
	// wanted blobs have to move.
	wanted bool
	done   int64
	// extracted is how many of the compressed bytes have been unpacked.
	extracted int64
}

type imageProgress struct {
	image    *wanted
	byID     map[string]digest.Digest
	running  bool
	finished bool
	// shown is the line last told, so that nothing is told twice.
	shown string
}

func newProgress(doing string, now time.Time) *progress {
	return &progress{doing: doing, blobs: map[digest.Digest]*blobProgress{}, lastTime: now}
}

// pullProgress counts the bytes of the compressed layers, as the registry has them. A
// layer is wanted if the store lacks its chain.
func pullProgress(images []*wanted, stored map[digest.Digest]bool, now time.Time) *progress {
	p := newProgress("pulling", now)
	p.unpacks = true
	for _, w := range images {
		ip := p.add(w)
		for i, b := range w.blobs {
			p.addBlob(ip, b.Digest, b.Size, !stored[w.chain[i]])
		}
	}
	return p
}

func (p *progress) add(w *wanted) *imageProgress {
	ip := &imageProgress{image: w, byID: map[string]digest.Digest{}}
	p.images = append(p.images, ip)
	return ip
}

func (p *progress) addBlob(ip *imageProgress, d digest.Digest, size int64, wanted bool) {
	if p.blobs[d] == nil {
		p.blobs[d] = &blobProgress{size: size}
	}
	if wanted {
		p.blobs[d].wanted = true
	}
	ip.byID[shortID(d)] = d
}

// shortID is how the daemon names a layer in its progress events.
func shortID(d digest.Digest) string { return d.Encoded()[:12] }

func (p *progress) find(w *wanted) *imageProgress {
	for _, ip := range p.images {
		if ip.image == w {
			return ip
		}
	}
	return &imageProgress{}
}

func (p *progress) start(w *wanted) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.find(w).running = true
}

func (p *progress) finish(w *wanted, ok bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	ip := p.find(w)
	ip.running, ip.finished = false, ok
}

// moved notes how many bytes of a blob have moved. Another attempt begins again.
func (p *progress) moved(d digest.Digest, n int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	b := p.blobs[d]
	b.done = max(b.done, min(n, b.size))
}

func (p *progress) event(w *wanted, e event) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.toldAt = time.Now()
	b := p.blobs[p.find(w).byID[e.ID]]
	if b == nil {
		return
	}
	switch e.Status {
	case "Downloading":
		// Two pulls of one layer share one download; a retry begins again.
		b.done = max(b.done, min(e.Progress.Current, b.size))
		b.wanted = true
	case "Verifying Checksum", "Download complete":
		b.done, b.wanted = b.size, true
	case "Extracting":
		b.extracted = max(b.extracted, min(e.Progress.Current, b.size))
	case "Pull complete":
		// A layer that another pull is downloading shows nothing but this.
		if b.wanted {
			b.done, b.extracted = b.size, b.size
		}
	case "Already exists":
		// Kept from before, or pulled a moment ago by another image.
		if b.done == 0 {
			b.wanted = false
		}
	}
}

// counts are the bytes downloaded, the bytes to download in all, and the bytes of
// layers that were there before.
func (p *progress) counts() (done, total, kept int64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.countsLocked()
}

func (p *progress) countsLocked() (done, total, kept int64) {
	for _, b := range p.blobs {
		if b.wanted {
			done += b.done
			total += b.size
		} else {
			kept += b.size
		}
	}
	return done, total, kept
}

// downloaded is the number of bytes of w's layers that have been downloaded, by
// this pull or one that shares them.
func (p *progress) downloaded(w *wanted) int64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	done, _, _ := p.imageLocked(p.find(w))
	return done
}

func (p *progress) imageLocked(ip *imageProgress) (done, extracted, total int64) {
	for _, d := range ip.byID {
		if b := p.blobs[d]; b.wanted {
			done += b.done
			extracted += b.extracted
			total += b.size
		}
	}
	return done, extracted, total
}

// lines says where it stands: the total first, then the images in progress
// that have moved since the last time.
func (p *progress) lines(now time.Time) []string {
	p.mu.Lock()
	defer p.mu.Unlock()
	done, total, _ := p.countsLocked()
	finished := 0
	var images []string
	for _, ip := range p.images {
		d, x, t := p.imageLocked(ip)
		done, running := ip.finished, ip.running
		if !p.unpacks {
			done, running = d == t, 0 < d && d < t
		}
		if done {
			finished++
		}
		if !running {
			continue
		}
		line := fmt.Sprintf("  %s: %s of %s", ip.image, units.HumanSize(float64(d)), units.HumanSize(float64(t)))
		if d == t {
			line = fmt.Sprintf("  %s: %s downloaded, %s of it extracted", ip.image, units.HumanSize(float64(t)), units.HumanSize(float64(x)))
		}
		if line != ip.shown {
			ip.shown = line
			images = append(images, line)
		}
	}
	line := fmt.Sprintf("%s: %d of %d images, %s of %s", p.doing, finished, len(p.images), units.HumanSize(float64(done)), units.HumanSize(float64(total)))
	if seconds := now.Sub(p.lastTime).Seconds(); seconds > 0 && done > p.lastBytes {
		rate := float64(done-p.lastBytes) / seconds
		line += fmt.Sprintf(", %s/s", units.HumanSize(rate))
		if left := time.Duration(float64(total-done)/rate) * time.Second; left > 0 {
			line += fmt.Sprintf(", about %s left", left)
		}
	}
	p.lastTime, p.lastBytes = now, done
	return append([]string{line}, images...)
}

// during runs f and says meanwhile where it stands.
func (p *progress) during(ctx context.Context, say func(format string, a ...any), f func()) {
	telling, stop := context.WithCancel(ctx)
	var teller sync.WaitGroup
	teller.Go(func() { p.tell(telling, say) })
	f()
	stop()
	teller.Wait()
}

// tell says where it stands, until ctx ends.
func (p *progress) tell(ctx context.Context, say func(format string, a ...any)) {
	tick := time.NewTicker(progressInterval)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case now := <-tick.C:
			for _, line := range p.lines(now) {
				say("%s", line)
			}
		}
	}
}
