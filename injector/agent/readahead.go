package agent

import (
	"context"
	"errors"
	"os"
	"path/filepath"

	"github.com/selkies-project/packer-plugin-selkies/injector/cachedisk"
	"github.com/selkies-project/packer-plugin-selkies/injector/readahead"
)

// readAhead reads what the starts of the disks' images are going to read, in the background
// and once a boot and disk: pods may be waiting for the registration, and they start right
// after it.
func (a *Agent) readAhead(ctx context.Context) {
	if !a.ReadAhead {
		return
	}
	for _, d := range a.disks {
		if a.readBegun[d.ID] {
			continue
		}
		a.readBegun[d.ID] = true
		note := cachedisk.HostPath(a.HostRoot, notesDir+"/read-ahead-"+d.ID.Encoded())
		if _, err := os.Stat(note); err == nil {
			continue
		}
		go func() {
			// Two disks at once would be two that wait for each other's images.
			a.reading.Lock()
			defer a.reading.Unlock()
			a.readDisk(ctx, d, note)
		}()
	}
}

func (a *Agent) readDisk(ctx context.Context, d *cachedisk.Disk, note string) {
	opt := readahead.Options{First: a.wanted(ctx), Bytes: a.ReadAheadBytes, Rate: a.ReadAheadRate}
	err := readahead.Disk(ctx, d, opt, readahead.Log(a.Log))
	if err == nil {
		err = errors.Join(os.MkdirAll(filepath.Dir(note), 0o700), os.WriteFile(note, nil, 0o600))
	}
	if err != nil && ctx.Err() == nil {
		a.Log.Warn("reading ahead", "disk", d.Dir, "error", err)
	}
}
