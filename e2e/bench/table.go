package main

import (
	"fmt"
	"io"
	"slices"
	"text/tabwriter"
	"time"

	"github.com/docker/go-units"
)

// printTable writes medians, with the least and the greatest value in brackets.
func printTable(w io.Writer, groups []group) {
	for _, g := range groups {
		fmt.Fprintln(w, g.title)
		t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
		for _, f := range g.figures {
			fmt.Fprintf(t, "  %s\t%s\t%s\t", f.name, spread(f.unit, f.runs), verdict(f.unit, f.bound, f.runs))
			for i, r := range f.ratios {
				if i > 0 {
					fmt.Fprint(t, "\n  \t\t\t")
				}
				fmt.Fprintf(t, "%s\t× %s\t%s", spread(times, r.runs), r.to, verdict(times, r.bound, r.runs))
			}
			fmt.Fprintln(t)
		}
		t.Flush()
		fmt.Fprintln(w)
	}
}

func spread(unit string, s series) string {
	least, greatest := format(unit, slices.Min(s)), format(unit, slices.Max(s))
	if least == greatest {
		return least
	}
	return fmt.Sprintf("%s (%s–%s)", format(unit, s.median()), least, greatest)
}

func verdict(unit string, bound float64, s series) string {
	switch {
	case bound == 0:
		return ""
	case s.median() <= bound:
		return "≤ " + format(unit, bound) + " met"
	}
	return "≤ " + format(unit, bound) + " MISSED"
}

func format(unit string, v float64) string {
	switch unit {
	case seconds:
		d := time.Duration(v * float64(time.Second))
		switch {
		case d >= 10*time.Second:
			return fmt.Sprintf("%.1f s", v)
		case d >= time.Second:
			return fmt.Sprintf("%.2f s", v)
		case d >= 10*time.Millisecond:
			return fmt.Sprintf("%.0f ms", v*1e3)
		}
		return fmt.Sprintf("%.2f ms", v*1e3)
	case bytes:
		return units.HumanSizeWithPrecision(v, 3)
	case times:
		return fmt.Sprintf("%.3g", v)
	}
	return fmt.Sprintf("%.4g", v)
}
