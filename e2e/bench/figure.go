package main

import (
	"encoding/json"
	"os"
	"path/filepath"
	"slices"
	"time"
)

// series is what was measured of one thing, a value for each round.
type series []float64

func (s *series) add(v float64) { *s = append(*s, v) }

// took adds a time in seconds.
func (s *series) took(d time.Duration) { s.add(d.Seconds()) }

func (s series) median() float64 {
	sorted := slices.Sorted(slices.Values(s))
	n := len(sorted)
	if n%2 == 1 {
		return sorted[n/2]
	}
	return (sorted[n/2-1] + sorted[n/2]) / 2
}

// over is the ratio to o in each round.
func (s series) over(o series) series {
	var r series
	for i := range min(len(s), len(o)) {
		r.add(s[i] / o[i])
	}
	return r
}

// per is each value divided by n.
func (s series) per(n int) series {
	var r series
	for _, v := range s {
		r.add(v / float64(n))
	}
	return r
}

// The units of figures.
const (
	seconds = "s"
	bytes   = "bytes"
	count   = "count"
	times   = "ratio"
)

// figure is one thing that was measured, and its ratios to others.
type figure struct {
	name   string
	unit   string
	bound  float64 // what the median may be at most; 0 for no bound
	runs   series
	ratios []ratio
}

// ratio is that of a figure to another thing.
type ratio struct {
	to    string
	bound float64
	runs  series
}

// group is what one benchmark measured.
type group struct {
	title   string
	name    string // begins the names of its figures
	figures []figure
}

// record is a figure, or a ratio, in the JSON file.
type record struct {
	Name  string  `json:"name"`
	Value float64 `json:"value"`
	Unit  string  `json:"unit"`
	Bound float64 `json:"bound,omitempty"`
	Min   float64 `json:"min"`
	Max   float64 `json:"max"`
	Runs  int     `json:"runs"`
}

func newRecord(name, unit string, bound float64, runs series) record {
	return record{name, runs.median(), unit, bound, slices.Min(runs), slices.Max(runs), len(runs)}
}

func writeJSON(file string, groups []group) error {
	var records []record
	for _, g := range groups {
		for _, f := range g.figures {
			name := g.name + ": " + f.name
			records = append(records, newRecord(name, f.unit, f.bound, f.runs))
			for _, r := range f.ratios {
				records = append(records, newRecord(name+" ÷ "+r.to, times, r.bound, r.runs))
			}
		}
	}
	data, err := json.MarshalIndent(records, "", "  ")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
		return err
	}
	return os.WriteFile(file, append(data, '\n'), 0o644)
}
