package agent

import (
	"encoding/json"
	"os"
	"regexp"
	"strings"
	"testing"
)

// notShown are metrics that the example's dashboard leaves out, by how they begin, and why.
var notShown = map[string]string{
	namespace + "_layers_verified": "it grows on nodes that verify, and no value of it is a fault: the dashboard has layers_damaged",
	"go_":                          "of Go's runtime, for whoever looks for a leak",
	"process_":                     "of the process, likewise, but for its CPU",
}

// TestDocumentedMetrics compares the metrics with the table of docs/agent.md, has the
// rules and the dashboard of example use none that are not there, and finds those that the
// dashboard lacks.
func TestDocumentedMetrics(t *testing.T) {
	m := newMetrics()
	m.found = found{
		images:   map[string]int{"registered": 1},
		ratio:    map[string]float64{"a": 1},
		readable: map[string]bool{"b": true},
		built:    map[string]int64{"b": 1},
		proved:   map[string]int{"b": 1},
		broken:   map[string]int{"b": 1},
	}
	families, err := m.registry.Gather()
	if err != nil {
		t.Fatal(err)
	}
	metrics := map[string]bool{} // whether documented
	for _, f := range families {
		metrics[f.GetName()] = false
	}

	read := func(file string) string {
		data, err := os.ReadFile("../../" + file)
		if err != nil {
			t.Fatal(err)
		}
		return string(data)
	}
	_, table, ok := strings.Cut(read("docs/agent.md"), "| metric |")
	if !ok {
		t.Fatal("docs/agent.md has no table of metrics")
	}
	table, _, _ = strings.Cut(table, "\n\n")
	for _, row := range regexp.MustCompile("(?m)^\\| `([a-z_]+)").FindAllStringSubmatch(table, -1) {
		name := namespace + "_" + row[1]
		if _, ok := metrics[name]; !ok {
			t.Errorf("docs/agent.md has the metric %s, the agent has not", name)
		}
		metrics[name] = true
	}
	for name, documented := range metrics {
		if strings.HasPrefix(name, namespace) && !documented {
			t.Errorf("docs/agent.md has no metric %s", name)
		}
	}

	const dashboard = "example/grafana/image-cache.json"
	if err := json.Unmarshal([]byte(read(dashboard)), new(map[string]any)); err != nil {
		t.Errorf("%s: %v", dashboard, err)
	}
	used := regexp.MustCompile(`\b(` + namespace + `|process|go)_[a-z0-9_]+`)
	for _, file := range []string{dashboard, "example/prometheus/rules.yaml", "docs/agent.md"} {
		names := used.FindAllString(read(file), -1)
		if len(names) == 0 {
			t.Errorf("%s uses no metric", file)
		}
		for _, name := range names {
			if _, ok := metrics[name]; !ok && name != namespace+"_" {
				t.Errorf("%s uses %s, which the agent has not", file, name)
			}
		}
	}
	shown := map[string]bool{}
	for _, name := range used.FindAllString(read(dashboard), -1) {
		shown[name] = true
	}
	exempt := map[string]bool{}
	for name := range metrics {
		excused := shown[name]
		for begin := range notShown {
			if strings.HasPrefix(name, begin) {
				excused, exempt[begin] = true, true
			}
		}
		if !excused {
			t.Errorf("%s does not show %s", dashboard, name)
		}
	}
	for begin := range notShown {
		if !exempt[begin] || shown[begin] {
			t.Errorf("the agent has no %s, or the dashboard shows it: it needs no exemption", begin)
		}
	}
}
