package main

import (
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestNodeBoot(t *testing.T) {
	b := newNodeBoot(nil).(*nodeBoot)
	for _, round := range []string{
		`{"pulled": {"ready": 5, "registered": 3, "started": 40, "drawn": 50}, "cached": {"ready": 6, "registered": 7, "started": 8, "drawn": 10}}`,
		`{"pulled": {"ready": 5, "registered": 3, "started": 20, "drawn": 25}, "cached": {"ready": 6, "registered": 8, "started": 10, "drawn": 10}}`,
	} {
		if err := b.add([]byte(round)); err != nil {
			t.Fatal(err)
		}
	}
	want := map[string]series{
		"cache disk: node ready": {6, 6}, "pull: node ready": {5, 5},
		"cache disk: images registered, taint gone": {7, 8},
		"cache disk: application started":           {8, 10}, "pull: application started": {40, 20},
		"cache disk: application started ÷ pull": {0.2, 0.5},
		"cache disk: page drawn by the browser":  {10, 10}, "pull: page drawn by the browser": {50, 25},
		"cache disk: page drawn by the browser ÷ pull": {0.2, 0.4},
	}
	got := map[string]series{}
	for _, f := range b.figures() {
		got[f.name] = f.runs
		for _, r := range f.ratios {
			got[f.name+" ÷ "+r.to] = r.runs
		}
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("the figures (-want +got):\n%s", diff)
	}
	if err := b.add([]byte(`{"pulled": {"ready": 5}}`)); err == nil {
		t.Error("a round without a moment is taken")
	}
}

// TestDocumentsNodeBoot compares the table of the whole way with docs/bench.json. It is
// empty if there are no figures of it.
func TestDocumentsNodeBoot(t *testing.T) {
	data, err := os.ReadFile("../../docs/bench.json")
	if err != nil {
		t.Fatal(err)
	}
	var records []record
	if err := json.Unmarshal(data, &records); err != nil {
		t.Fatal(err)
	}
	checkTable(t, "../../docs/performance.md", "node-boot", nodeBootTable(records))
}

// nodeBootTable is when a node was how far, with a pull and with a cache disk.
func nodeBootTable(records []record) string {
	value := func(name string) string {
		for _, r := range records {
			if r.Name == "node-boot: "+name {
				return format(r.Unit, r.Value)
			}
		}
		return ""
	}
	var b strings.Builder
	for _, m := range moments {
		disk := value("cache disk: " + m.title)
		if disk == "" {
			return ""
		}
		fmt.Fprintf(&b, "| %s | %s | %s | %s |\n", m.title, value("pull: "+m.title), disk, value("cache disk: "+m.title+" ÷ pull"))
	}
	return "| from the boot until | pull | cache disk | ratio |\n|---|---|---|---|\n" + b.String()
}
