package agent

import (
	"context"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"sync"

	"github.com/opencontainers/go-digest"

	"github.com/selkies-project/packer-plugin-selkies/injector/cachedisk"
	"github.com/selkies-project/packer-plugin-selkies/injector/report"
	"github.com/selkies-project/packer-plugin-selkies/injector/verify"
	"github.com/selkies-project/packer-plugin-selkies/internal/printable"
)

// notesDir is the host's directory of what is to be known until the next boot, which
// empties it: here, which layers are proved, for the agent's next start to go on.
const notesDir = "/run/selkies-image-injector"

// notePrefix is that of a note's name, which ends with the cache ID.
const notePrefix = "verified-"

// proofs is what is known of the disks' layers, by cache ID.
type proofs struct {
	dir string // of the notes, as this process sees it
	mu  sync.Mutex
	// at is the disk that is being verified, "" while none is.
	at     digest.Digest
	begun  map[digest.Digest]bool
	proved map[string]int
	broken map[string]int
}

func newProofs(dir string) *proofs {
	return &proofs{dir: dir, begun: map[digest.Digest]bool{}, proved: map[string]int{}, broken: map[string]int{}}
}

// file notes which layers of a disk are proved.
func (p *proofs) file(cache digest.Digest) string {
	return filepath.Join(p.dir, notePrefix+cache.Encoded())
}

// forget removes the notes of disks that are away: what comes back may be another copy.
func (p *proofs) forget(disks []*cachedisk.Disk) error {
	notes, err := filepath.Glob(filepath.Join(p.dir, notePrefix+"*"))
	if err != nil {
		return err
	}
	var keep []string
	if p.at != "" {
		keep = append(keep, p.file(p.at))
	}
	for _, d := range disks {
		keep = append(keep, p.file(d.ID))
	}
	for _, note := range notes {
		if !slices.Contains(keep, note) {
			err = errors.Join(err, os.Remove(note))
		}
	}
	return err
}

// next is a disk that is to be verified now, nil if there is none. One that was away is
// to be verified again, from the beginning.
func (p *proofs) next(disks []*cachedisk.Disk) (*cachedisk.Disk, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for id := range p.begun {
		if id != p.at && !has(disks, id) {
			delete(p.begun, id)
			delete(p.proved, id.String())
			delete(p.broken, id.String())
		}
	}
	if err := p.forget(disks); err != nil || p.at != "" {
		return nil, err
	}
	for _, d := range disks {
		if !p.begun[d.ID] {
			p.at, p.begun[d.ID] = d.ID, true
			return d, nil
		}
	}
	return nil, nil
}

func (p *proofs) note(cache digest.Digest, proved, broken int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.proved[cache.String()], p.broken[cache.String()] = proved, broken
}

// layers are how many are proved and damaged.
func (p *proofs) layers() (proved, broken map[string]int) {
	p.mu.Lock()
	defer p.mu.Unlock()
	return maps.Clone(p.proved), maps.Clone(p.broken)
}

func (p *proofs) end() {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.at = ""
}

// verify proves the layers of a disk, in the background, if that is wanted. Pods do not
// wait for it: it begins when the gate is open.
func (a *Agent) verify(ctx context.Context) {
	if a.VerifyRate == 0 || !a.gate.isOpen() || a.registered == nil {
		return
	}
	d, err := a.proofs.next(a.disks)
	if err != nil {
		a.Log.Error("verifying layers", "error", err)
	}
	if d == nil {
		return
	}
	go func() {
		defer a.proofs.end()
		a.verifyDisk(ctx, d)
	}()
}

func (a *Agent) verifyDisk(ctx context.Context, d *cachedisk.Disk) {
	r, err := verify.Disk(ctx, d, verify.Options{
		Rate:     a.VerifyRate,
		Resume:   a.proofs.file(d.ID),
		Progress: func(p verify.Progress) { a.proofs.note(d.ID, p.Layers-p.Damaged, p.Damaged) },
	})
	switch {
	case errors.Is(err, context.Canceled):
		return
	case err != nil:
		a.Log.Error("verifying layers", "error", err)
		return
	}
	a.proofs.note(d.ID, r.Layers-len(r.Damaged), len(r.Damaged))
	a.Log.Info("verified", "cache", report.Short(d.ID), "layers", r.Layers, "damaged", len(r.Damaged), "bytes", r.Bytes)
	for _, l := range r.Damaged {
		a.warn(eventDamaged, "cache %s: layer %s is damaged: %s: build the disk again, and remove its images with eject",
			report.Short(d.ID), report.Short(l.DiffID), printable.Line(l.Problems[0], 500))
	}
}
