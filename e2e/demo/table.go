package main

import (
	"fmt"
	"io"
	"text/tabwriter"
	"time"

	"github.com/docker/go-units"
)

// print writes what was measured, a pull and an injection of each runtime side by
// side.
func (d *demo) print(w io.Writer, runtimes ...*runtime) {
	packed := int64(0)
	for _, i := range d.images {
		packed += i.Packed
	}
	fmt.Fprintf(w, "%d images, %s compressed, from a registry on loopback; each on a new node with cold caches.\n", len(d.images), size(packed))
	fmt.Fprintf(w, "A start after a pull is quick because the pull has just written the files to memory.\n\n")
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(t, "\tpull\tstart\ttotal\tserved\t  |\tinject\tstart\ttotal\tserved\t  |\tratio\t")
	for _, r := range runtimes {
		pull, inject := r.result.pull, r.result.inject
		fmt.Fprintf(t, "%s\t%s%s%.1f\t\n", r.name, pull.cells(), inject.cells(), pull.total().Seconds()/inject.total().Seconds())
	}
	t.Flush()
}

func (m measurement) total() time.Duration { return m.get + m.start }

func (m measurement) cells() string {
	return fmt.Sprintf("%s\t%s\t%s\t%s\t  |\t", seconds(m.get), seconds(m.start), seconds(m.total()),
		size(m.served.BlobBytes+m.served.ManifestBytes))
}

func seconds(d time.Duration) string { return fmt.Sprintf("%.2f s", d.Seconds()) }

func size(n int64) string { return units.HumanSizeWithPrecision(float64(n), 3) }
