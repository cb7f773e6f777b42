//go:build e2e

package agent_test

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/selkies-project/packer-plugin-selkies/e2e/cachedisk"
	"github.com/selkies-project/packer-plugin-selkies/e2e/host"
	"github.com/selkies-project/packer-plugin-selkies/manifest"
	"github.com/selkies-project/packer-plugin-selkies/trace"
)

// traced is a copy of the disk with access traces: of the first image one of 64 KiB of
// busybox, of the second one that leads through a symbolic link.
func traced(t *testing.T) (disk string) {
	t.Helper()
	return cachedisk.Changed(t, world.disk, func(dir string) error {
		return errors.Join(
			writeTrace(dir, world.refs[0], "bin/busybox"),
			writeTrace(dir, world.refs[1], "bin/sh"))
	})
}

func writeTrace(dir, ref, file string) error {
	config := world.cache.Images[imageNamed(ref)].Config.Digest
	data, err := (&trace.Trace{
		SchemaVersion: trace.SchemaVersion,
		Image:         config,
		Files:         []trace.File{{Path: file}},
		Ranges:        []trace.Range{{Offset: 128 << 10, Length: 64 << 10}},
	}).Encode()
	if err != nil {
		return err
	}
	name := filepath.Join(dir, trace.Path(config))
	return errors.Join(os.MkdirAll(filepath.Dir(name), 0o755), os.WriteFile(name, data, 0o644))
}

func imageNamed(ref string) int {
	return slices.IndexFunc(world.cache.Images, func(img manifest.Image) bool { return slices.Contains(img.Names, ref) })
}

// busybox is what the page cache has of the busybox that the trace is about, in bytes.
func (n *node) busybox(t *testing.T) int64 {
	t.Helper()
	chain, err := world.cache.Images[imageNamed(world.refs[0])].ChainIDs()
	if err != nil {
		t.Fatal(err)
	}
	i := slices.IndexFunc(world.cache.Layers, func(l manifest.Layer) bool { return l.ChainID == chain[0] })
	file := n.Path(filepath.Join(cacheDir, world.cache.LayerPath(world.cache.Layers[i]), "bin/busybox"))
	fi, err := os.Stat(file)
	if err != nil {
		t.Fatal(err)
	}
	resident, err := host.Resident(file, 0, fi.Size())
	if err != nil {
		t.Fatal(err)
	}
	return resident
}

// checkReadAhead finds in memory what the good trace has and no more, and one line of log
// about the bad one.
func (n *node) checkReadAhead(t *testing.T, a *agent) {
	t.Helper()
	wait(t, "the reading ahead", func() error {
		if log := a.log.String(); !strings.Contains(log, `msg="not read ahead"`) || !strings.Contains(log, `msg="read ahead"`) {
			return fmt.Errorf("the log is %s", log)
		}
		return nil
	})
	if got := n.busybox(t); got != 64<<10 {
		t.Errorf("%d bytes of busybox are in memory", got)
	}
	for line := range strings.Lines(a.log.String()) {
		if strings.Contains(line, "not read ahead") && (!strings.Contains(line, world.refs[1]) || !strings.Contains(line, "not a regular file")) {
			t.Errorf("the log says %s", line)
		}
	}
}
