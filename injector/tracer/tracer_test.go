package tracer

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"github.com/google/go-cmp/cmp"

	testdisk "github.com/selkies-project/packer-plugin-selkies/e2e/cachedisk"
	"github.com/selkies-project/packer-plugin-selkies/injector/cachedisk"
	"github.com/selkies-project/packer-plugin-selkies/trace"
)

// TestRecord sees files that are in memory since they were just written, each once, and
// those alone that a trace can name. That others are not there, and come, only a test on a
// disk of its own can show: e2e/provisioner has it.
func TestRecord(t *testing.T) {
	dir := t.TempDir()
	m := testdisk.Example(t, dir)
	img := m.Images[1] // of two layers
	lower, upper := filepath.Join(dir, m.LayerPath(m.Layers[0])), filepath.Join(dir, m.LayerPath(m.Layers[1]))
	for _, err := range []error{
		os.Mkdir(filepath.Join(lower, "bin"), 0o755),
		os.WriteFile(filepath.Join(lower, "bin/large"), make([]byte, 3*pageSize+10), 0o755),
		os.Link(filepath.Join(lower, "bin/large"), filepath.Join(lower, "bin/linked")),
		os.WriteFile(filepath.Join(lower, "bin/new\nline"), make([]byte, 10), 0o755),
		os.WriteFile(filepath.Join(lower, "empty"), nil, 0o755),
		os.Symlink("bin/large", filepath.Join(lower, "symbolic")),
		os.WriteFile(filepath.Join(upper, "small"), make([]byte, 10), 0o755),
	} {
		if err != nil {
			t.Fatal(err)
		}
	}
	d, err := cachedisk.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	tr, err := New(d, img)
	if err != nil {
		t.Fatal(err)
	}
	stopped := make(chan struct{})
	close(stopped)
	if err := errors.Join(tr.Record(stopped), tr.Record(stopped)); err != nil {
		t.Fatal(err)
	}
	want := &trace.Trace{
		SchemaVersion: trace.SchemaVersion,
		Image:         img.Config.Digest,
		Files:         []trace.File{{Layer: 0, Path: "bin/large"}, {Layer: 1, Path: "small"}},
		Ranges:        []trace.Range{{File: 0, Length: 3*pageSize + 10}, {File: 1, Length: 10}},
	}
	if diff := cmp.Diff(want, tr.Trace()); diff != "" {
		t.Error(diff)
	}
}
