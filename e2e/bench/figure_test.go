package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/errdefs"
	"github.com/opencontainers/go-digest"

	"github.com/selkies-project/packer-plugin-selkies/manifest"
)

func TestMedian(t *testing.T) {
	for _, tt := range []struct {
		runs series
		want float64
	}{
		{series{3}, 3},
		{series{5, 1, 3}, 3},
		{series{4, 1, 3, 2}, 2.5},
	} {
		if got := tt.runs.median(); got != tt.want {
			t.Errorf("median of %v is %v, want %v", tt.runs, got, tt.want)
		}
	}
}

// TestOver has a machine that is twice as slow in the second round: a ratio does not
// tell, where one of medians would.
func TestOver(t *testing.T) {
	r := series{1, 2, 1.5}.over(series{2, 4, 3})
	for _, v := range r {
		if v != 0.5 {
			t.Errorf("ratios are %v, want 0.5 all", r)
		}
	}
}

var sample = []group{{title: "group: of a test", name: "group", figures: []figure{
	{name: "quick", unit: seconds, bound: 0.1, runs: series{0.2, 0.05, 0.09},
		ratios: []ratio{{"slow", 0.01, series{0.2, 0.05, 0.09}}, {"slower", 0, series{1, 2, 3}}}},
	{name: "big", unit: bytes, runs: series{40e6, 40e6, 40e6}},
}}}

func TestTable(t *testing.T) {
	var b strings.Builder
	printTable(&b, sample)
	const want = `group: of a test
  quick  90 ms (50 ms–200 ms)  ≤ 100 ms met  0.09 (0.05–0.2)  × slow    ≤ 0.01 MISSED
                                             2 (1–3)          × slower  
  big    40MB                                

`
	if b.String() != want {
		t.Errorf("the table is\n%s, want\n%s", b.String(), want)
	}
}

func TestJSON(t *testing.T) {
	file := filepath.Join(t.TempDir(), "build", "bench.json")
	if err := writeJSON(file, sample); err != nil {
		t.Fatal(err)
	}
	got, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	const want = `[
  {
    "name": "group: quick",
    "value": 0.09,
    "unit": "s",
    "bound": 0.1,
    "min": 0.05,
    "max": 0.2,
    "runs": 3
  },
  {
    "name": "group: quick ÷ slow",
    "value": 0.09,
    "unit": "ratio",
    "bound": 0.01,
    "min": 0.05,
    "max": 0.2,
    "runs": 3
  },
  {
    "name": "group: quick ÷ slower",
    "value": 2,
    "unit": "ratio",
    "min": 1,
    "max": 3,
    "runs": 3
  },
  {
    "name": "group: big",
    "value": 40000000,
    "unit": "bytes",
    "min": 40000000,
    "max": 40000000,
    "runs": 3
  }
]
`
	if string(got) != want {
		t.Errorf("the file is\n%s, want\n%s", got, want)
	}
}

// TestTransactions counts what floor has made.
func TestTransactions(t *testing.T) {
	root := t.TempDir()
	for _, db := range databases {
		dir := filepath.Join(root, filepath.Dir(db))
		if err := os.MkdirAll(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		before, err := lastTransaction(filepath.Join(root, db))
		if err != nil || before != 0 {
			t.Fatalf("without a file: %d, %v", before, err)
		}
	}
	db, err := openFloor(filepath.Join(root, databases[0]))
	if err != nil {
		t.Fatal(err)
	}
	defer db.Close() // open, as containerd's is, while they are counted
	first, err := transactions(root)
	if err != nil {
		t.Fatal(err)
	}
	for v := range 7 {
		if err := put(db, v); err != nil {
			t.Fatal(err)
		}
	}
	second, err := transactions(root)
	if err != nil {
		t.Fatal(err)
	}
	if got := second[0] - first[0]; got != 7 || second[1] != 0 {
		t.Errorf("counted %d transactions after %v, want 7", got, first)
	}
}

// TestCalls has containerd's own code register layers.
func TestCalls(t *testing.T) {
	base, top := digest.FromString("base"), digest.FromString("top")
	m := &manifest.Manifest{Layers: []manifest.Layer{{ChainID: base}, {ChainID: top, Parent: base}}}
	dir := t.TempDir()
	if took, err := calls(dir, m); err != nil || took <= 0 {
		t.Errorf("took %v, %v", took, err)
	}
	m.Layers[1].Parent = digest.FromString("another")
	if _, err := calls(dir, m); !errdefs.IsNotFound(err) {
		t.Errorf("with a parent that is not there: %v", err)
	}
}
