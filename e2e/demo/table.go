package main

import (
	"fmt"
	"io"
	"text/tabwriter"
	"time"

	"github.com/docker/go-units"
)

// print writes what was measured, a pull and an injection of each runtime side by
// side. The registry is on loopback: a network in between makes pulls slower still.
func (d *demo) print(w io.Writer) {
	packed := int64(0)
	for _, i := range d.images {
		packed += i.packed
	}
	fmt.Fprintf(w, "%d images, %s compressed, from a registry on loopback; a new node each time, with cold caches.\n",
		len(d.images), size(packed))
	fmt.Fprintf(w, "Starting is slower after inject, since what a pull has just written is in memory.\n\n")
	t := tabwriter.NewWriter(w, 0, 0, 3, ' ', tabwriter.AlignRight)
	fmt.Fprintln(t, "runtime\tway\tget\tstart\ttotal\tregistry served\trequests\t")
	var pull measurement
	for _, m := range d.measurements {
		fmt.Fprintf(t, "%s\t%s\t%s\t%s\t%s\t%s\t%d\t\n", m.runtime, m.way, seconds(m.get), seconds(m.start), seconds(m.total()),
			size(m.served.BlobBytes+m.served.ManifestBytes),
			m.served.ManifestHeads+m.served.ManifestGets+m.served.BlobHeads+m.served.BlobGets)
		if m.way == "pull" {
			pull = m
			continue
		}
		fmt.Fprintf(t, "\tpull / inject\t\t\t%.1f\t\t\t\n", pull.total().Seconds()/m.total().Seconds())
	}
	t.Flush()
}

func (m measurement) total() time.Duration { return m.get + m.start }

func seconds(d time.Duration) string { return fmt.Sprintf("%.2f s", d.Seconds()) }

func size(n int64) string { return units.HumanSizeWithPrecision(float64(n), 3) }
