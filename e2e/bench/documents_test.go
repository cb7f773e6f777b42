package main

import (
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

var update = flag.Bool("update", false, "write the figures into the documents")

// TestDocuments compares the tables of figures in the documents with docs/bench.json, which
// is what a run wrote.
func TestDocuments(t *testing.T) {
	data, err := os.ReadFile("../../docs/bench.json")
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
			t.Errorf("docs/bench.json has %q twice", r.Name)
		}
		known[r.Name] = r
	}
	checkTable(t, "../../README.md", "figures", desktopTable(t, known))
	checkTable(t, "../../docs/performance.md", "figures", boundsTable(records))
	checkTable(t, "../../docs/performance.md", "first-read", firstReadTable(t, known))
}

// desktopTable is what it takes to have a desktop's image, and its browser at work.
func desktopTable(t *testing.T, known map[string]record) string {
	t.Helper()
	const drawn = ", started, and a page drawn by the browser"
	var b strings.Builder
	b.WriteString("| | pull | inject | pull, until its browser has drawn a page | inject, the same |\n|---|---|---|---|---|\n")
	for _, runtime := range []struct{ name, title string }{{"containerd", "containerd 2.4"}, {"docker", "Docker 20.10"}} {
		fmt.Fprintf(&b, "| %s |", runtime.title)
		for _, what := range []string{"pull", "inject", "pull" + drawn, "inject" + drawn} {
			name := "desktop-" + runtime.name + ": " + what
			r, ok := known[name]
			if !ok {
				t.Errorf("docs/bench.json has no %q", name)
			}
			fmt.Fprintf(&b, " %s |", format(r.Unit, r.Value))
		}
		b.WriteString("\n")
	}
	return b.String()
}

// firstReadTable is first starts from slow disks.
func firstReadTable(t *testing.T, known map[string]record) string {
	t.Helper()
	starts := []string{"browser, 1 ms, 140 MB/s", "browser, 2 ms, 30 MB/s", "display, 1 ms, 140 MB/s"}
	var b strings.Builder
	fmt.Fprintf(&b, "| | %s | bound |\n|---|---|---|---|---|\n", strings.Join(starts, " | "))
	for _, what := range []string{
		"cold start", "start again, all in memory ÷ cold", "reading ahead", "start after it ÷ cold", "start after it ÷ start again",
		"both, one after the other ÷ cold", "both at once ÷ cold", "at once with a wrong trace ÷ cold",
	} {
		fmt.Fprintf(&b, "| %s |", what)
		bound := ""
		for _, start := range starts {
			r, ok := known["first-read: "+start+": "+what]
			if !ok {
				t.Errorf("docs/bench.json has no %q of %q", what, start)
			}
			if r.Bound > 0 {
				bound = format(r.Unit, r.Bound)
			}
			fmt.Fprintf(&b, " %s |", format(r.Unit, r.Value))
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

// checkTable compares what is between two marks of a document, or replaces it.
func checkTable(t *testing.T, file, name, want string) {
	t.Helper()
	begin, end := "<!-- "+name+" of docs/bench.json -->\n\n", "\n<!-- end of "+name+" -->\n"
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
		if err := os.WriteFile(file, []byte(before+begin+want+end+after), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("%s has other figures than docs/bench.json; run make bench-docs (-want +got):\n%s", file, diff)
	}
}
