package main

import (
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "write the figures into the documents")

// TestDocuments compares the tables in the documents with docs/bench.json and
// docs/bench.txt, which a run of all benchmarks wrote. To update, it takes those of the last run.
func TestDocuments(t *testing.T) {
	dir := "../../docs"
	if *update {
		dir = "../../build"
	}
	data, err := os.ReadFile(filepath.Join(dir, "bench.json"))
	if err != nil {
		t.Fatal(err)
	}
	printed, err := os.ReadFile(filepath.Join(dir, "bench.txt"))
	if err != nil {
		t.Fatal(err)
	}
	var records []record
	if err := json.Unmarshal(data, &records); err != nil {
		t.Fatal(err)
	}
	known := map[string]record{}
	for _, r := range records {
		if _, ok := known[r.Name]; ok {
			t.Errorf("%s has %q twice", dir, r.Name)
		}
		known[r.Name] = r
	}
	for _, b := range benchmarks {
		if !slices.ContainsFunc(records, func(r record) bool { return strings.HasPrefix(r.Name, b.name+": ") }) {
			t.Errorf("%s has nothing of %s: make bench measures all", dir, b.name)
		}
	}
	header, _, _ := strings.Cut(string(printed), "\n\n")
	tables := []table{
		{"README.md", "figures", desktopTable(t, known)},
		{"docs/performance.md", "machine", "- " + strings.ReplaceAll(header, "\n", "\n- ") + "\n"},
		{"docs/performance.md", "figures", boundsTable(records)},
		{"docs/performance.md", "peers", peersTable(records)},
		{"docs/performance.md", "node-boot", nodeBootTable(t, known)},
		{"docs/performance.md", "cold disk", coldTable(t, known)},
		{"docs/performance.md", "first-read", firstReadTable(t, known)},
	}
	if t.Failed() {
		return
	}
	if *update {
		for name, data := range map[string][]byte{"bench.json": data, "bench.txt": printed} {
			if err := os.WriteFile(filepath.Join("../../docs", name), data, 0o644); err != nil {
				t.Fatal(err)
			}
		}
	}
	for _, table := range tables {
		table.check(t)
	}
}

// value is a figure as the tables have it.
func value(t *testing.T, known map[string]record, name string) string {
	t.Helper()
	r, ok := known[name]
	if !ok {
		t.Errorf("there is no %q", name)
	}
	return format(r.Unit, r.Value)
}

// desktopTable is what it takes to have a desktop's image, and its browser at work, on a node
// that runs and on one that boots.
func desktopTable(t *testing.T, known map[string]record) string {
	t.Helper()
	const drawn = ", started, and a page drawn by the browser"
	var b strings.Builder
	b.WriteString("| | pull | inject | pull, until its browser has drawn a page | inject, until its browser has drawn a page |\n|---|---|---|---|---|\n")
	for _, row := range []struct{ runtime, title, pull string }{
		{"containerd", "containerd 2.4", "pull"},
		{"containerd", "the same, unpacking four layers at once", "pull, unpacking 4 at once"},
		{"docker", "Docker 20.10", "pull"},
	} {
		fmt.Fprintf(&b, "| %s |", row.title)
		for _, what := range []string{row.pull, "inject", row.pull + drawn, "inject" + drawn} {
			fmt.Fprintf(&b, " %s |", value(t, known, "desktop-"+row.runtime+": "+what))
		}
		b.WriteString("\n")
	}
	fmt.Fprintf(&b, "\nFrom the boot of a cluster's node until a pod of that image has started: %s with the pull, %s with the\ncache disk; until its browser has drawn a page: %s and %s.\n",
		value(t, known, "node-boot: pull: application started"), value(t, known, "node-boot: cache disk: application started"),
		value(t, known, "node-boot: pull: page drawn by the browser"), value(t, known, "node-boot: cache disk: page drawn by the browser"))
	fmt.Fprintf(&b, "\nAll of that is with a local disk. From a network disk that takes 1 ms for each read and gives 140 MB/s, the browser's first\npage takes %s; from one with 2 ms and 30 MB/s, %s.\n",
		value(t, known, "first-read: browser, 1 ms, 140 MB/s: cold start"), value(t, known, "first-read: browser, 2 ms, 30 MB/s: cold start"))
	return b.String()
}

// firstReadTable is first starts from slow disks.
func firstReadTable(t *testing.T, known map[string]record) string {
	t.Helper()
	starts := []string{"browser, 1 ms, 140 MB/s", "browser, 2 ms, 30 MB/s", "display, 1 ms, 140 MB/s"}
	var b strings.Builder
	fmt.Fprintf(&b, "| | %s | bound |\n|---|---|---|---|---|\n", strings.Join(starts, " | "))
	for _, what := range []string{
		"cold start", "start again, all in memory ÷ cold", "reading ahead", "start after reading ahead ÷ cold", "start after reading ahead ÷ start again",
		"reading ahead, then start ÷ cold", "reading ahead and start together ÷ cold", "start beside reading ahead of a wrong trace ÷ cold",
	} {
		fmt.Fprintf(&b, "| %s |", what)
		bound := ""
		for _, start := range starts {
			name := "first-read: " + start + ": " + what
			if r := known[name]; r.Bound > 0 {
				bound = format(r.Unit, r.Bound)
			}
			fmt.Fprintf(&b, " %s |", value(t, known, name))
		}
		fmt.Fprintf(&b, " %s |\n", bound)
	}
	return b.String()
}

// boundsTable is everything that has a bound.
func boundsTable(records []record) string {
	var b strings.Builder
	fmt.Fprintf(&b, "Rounds: %d.\n\n", records[0].Runs)
	b.WriteString("| figure | median | least to greatest | bound | |\n|---|---|---|---|---|\n")
	for _, r := range records {
		if r.Bound == 0 {
			continue
		}
		verdict := "met"
		if r.Value > r.Bound {
			verdict = "**missed**"
		}
		fmt.Fprintf(&b, "| %s | %s | %s to %s | %s | %s |\n", r.Name, format(r.Unit, r.Value),
			format(r.Unit, r.Min), format(r.Unit, r.Max), format(r.Unit, r.Bound), verdict)
	}
	return b.String()
}

// peersTable is what one would do without the injector, in terms of what it takes.
func peersTable(records []record) string {
	var b strings.Builder
	b.WriteString("| in place of `inject` | × inject | least to greatest |\n|---|---|---|\n")
	for _, r := range records {
		if what, ok := strings.CutSuffix(r.Name, " ÷ inject"); ok {
			fmt.Fprintf(&b, "| %s | %s | %s to %s |\n", what, format(r.Unit, r.Value), format(r.Unit, r.Min), format(r.Unit, r.Max))
		}
	}
	return b.String()
}

// coldTable is what inject reads from a disk that nothing was read of.
func coldTable(t *testing.T, known map[string]record) string {
	t.Helper()
	var b strings.Builder
	b.WriteString("| layers | read | × the layer manifest | requests | per layer |\n|---|---|---|---|---|\n")
	for _, layers := range []int{100, 600, 2000} {
		fmt.Fprintf(&b, "| %d |", layers+1)
		for _, what := range []string{"read from the cold cache disk", "read from the cold cache disk ÷ the layer manifest", "the same in requests", "the same in requests ÷ the layers"} {
			fmt.Fprintf(&b, " %s |", value(t, known, fmt.Sprintf("containerd-%d: %s", layers, what)))
		}
		b.WriteString("\n")
	}
	return b.String()
}

// table is what stands between two marks of a document.
type table struct{ file, name, want string }

// check compares, or replaces.
func (table table) check(t *testing.T) {
	t.Helper()
	file := filepath.Join("../..", table.file)
	begin, end := "<!-- "+table.name+" of docs/bench.json -->\n\n", "\n<!-- end of "+table.name+" -->\n"
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	before, rest, ok := strings.Cut(string(data), begin)
	got, after, ended := strings.Cut(rest, end)
	if !ok || !ended {
		t.Fatalf("%s has no table between %q and %q", file, begin, end)
	}
	if *update {
		if err := os.WriteFile(file, []byte(before+begin+table.want+end+after), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	if diff := cmp.Diff(table.want, got); diff != "" {
		t.Errorf("%s has other figures than docs/bench.json; run make bench-docs (-want +got):\n%s", file, diff)
	}
}
