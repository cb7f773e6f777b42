package agent

import (
	"errors"
	"io/fs"
	"os"
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/selkies-project/packer-plugin-selkies/injector/cachedisk"
)

// TestProofs has a disk that goes away and comes back, maybe as another copy: what was
// noted of it is forgotten.
func TestProofs(t *testing.T) {
	p := newProofs(t.TempDir())
	one, two := &cachedisk.Disk{ID: digest.FromString("one")}, &cachedisk.Disk{ID: digest.FromString("two")}
	next := func(want *cachedisk.Disk, disks ...*cachedisk.Disk) {
		t.Helper()
		if d, err := p.next(disks); d != want || err != nil {
			t.Fatalf("next is %v, %v, want %v", d, err, want)
		}
	}
	noted := func(d *cachedisk.Disk) bool {
		t.Helper()
		_, err := os.Stat(p.file(d.ID))
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			t.Fatal(err)
		}
		return err == nil
	}
	for _, d := range []*cachedisk.Disk{one, two} {
		if err := os.WriteFile(p.file(d.ID), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	// As the agent starts, two is away.
	next(one, one)
	if !noted(one) || noted(two) {
		t.Error("what is noted is not that of the disks that are there")
	}
	p.note(one.ID, 3, 0)
	next(nil)
	if !noted(one) {
		t.Error("forgotten while it is verified")
	}
	p.end()
	next(nil, one)
	if !noted(one) {
		t.Error("forgotten while it is there")
	}
	next(nil)
	if proved, _ := p.layers(); noted(one) || len(proved) > 0 {
		t.Errorf("one that is away is noted: %t, proved: %v", noted(one), proved)
	}
	next(one, one)
}
