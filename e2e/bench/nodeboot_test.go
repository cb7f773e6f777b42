package main

import (
	"fmt"
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

// nodeBootTable is when a node was how far, with a pull and with a cache disk.
func nodeBootTable(t *testing.T, known map[string]record) string {
	t.Helper()
	var b strings.Builder
	b.WriteString("| from the boot until | pull | cache disk | ratio |\n|---|---|---|---|\n")
	for _, m := range moments {
		pull, ratio := "", ""
		if m.name != "registered" {
			pull = value(t, known, "node-boot: pull: "+m.title)
		}
		if m.name == "started" || m.name == "drawn" {
			ratio = value(t, known, "node-boot: cache disk: "+m.title+" ÷ pull")
		}
		fmt.Fprintf(&b, "| %s | %s | %s | %s |\n", m.title, pull, value(t, known, "node-boot: cache disk: "+m.title), ratio)
	}
	return b.String()
}
