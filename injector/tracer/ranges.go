package tracer

import "github.com/selkies-project/packer-plugin-selkies/trace"

const (
	// gap is what is read along with what is around it, in bytes: another request would
	// take longer.
	gap = 32 << 10
	// longest is what ranges are joined to at most, in bytes. A longer one would bring what
	// is needed late with what is needed early.
	longest = 256 << 10
)

// Trace is what was recorded.
func (t *Tracer) Trace() *trace.Trace {
	out := &trace.Trace{SchemaVersion: trace.SchemaVersion, Image: t.image.Config.Digest, Files: []trace.File{}, Ranges: []trace.Range{}}
	place := map[int]int{}
	for _, r := range joined(t.seen) {
		i, ok := place[r.File]
		if !ok {
			i = len(out.Files)
			place[r.File] = i
			out.Files = append(out.Files, t.files[r.File].at)
		}
		r.File = i
		out.Ranges = append(out.Ranges, r)
	}
	return out
}

// joined joins ranges of the same file that are next to each other, at the place of the
// first of them.
func joined(seen []trace.Range) []trace.Range {
	var out []trace.Range
	ofFile := map[int][]int{} // indexes in out
next:
	for _, r := range seen {
		for _, i := range ofFile[r.File] {
			start, end := min(out[i].Offset, r.Offset), max(out[i].Offset+out[i].Length, r.Offset+r.Length)
			if between := end - start - out[i].Length - r.Length; between <= gap && end-start <= longest {
				out[i].Offset, out[i].Length = start, end-start
				continue next
			}
		}
		ofFile[r.File] = append(ofFile[r.File], len(out))
		out = append(out, r)
	}
	return out
}
