package tracer

import (
	"testing"

	"github.com/google/go-cmp/cmp"

	"github.com/selkies-project/packer-plugin-selkies/trace"
)

func TestJoined(t *testing.T) {
	const page = 4096
	at := func(file int, offset, length int64) trace.Range {
		return trace.Range{File: file, Offset: offset, Length: length}
	}
	for name, c := range map[string]struct{ seen, want []trace.Range }{
		"nothing": {},
		"in order, and backwards": {
			[]trace.Range{at(0, 4*page, page), at(1, 0, page), at(0, 5*page, page), at(0, 3*page, page)},
			[]trace.Range{at(0, 3*page, 3*page), at(1, 0, page)},
		},
		"a gap": {
			[]trace.Range{at(0, 0, page), at(0, page+gap, 10)},
			[]trace.Range{at(0, 0, page+gap+10)},
		},
		"a larger gap": {
			[]trace.Range{at(0, 0, page), at(0, 2*page+gap, 10)},
			[]trace.Range{at(0, 0, page), at(0, 2*page+gap, 10)},
		},
		"what a gap had": {
			[]trace.Range{at(0, 0, page), at(0, 2*page, page), at(0, page, page)},
			[]trace.Range{at(0, 0, 3*page)},
		},
		"too long": {
			[]trace.Range{at(0, 0, longest), at(0, longest, page), at(0, longest+page, page)},
			[]trace.Range{at(0, 0, longest), at(0, longest, 2*page)},
		},
	} {
		t.Run(name, func(t *testing.T) {
			if diff := cmp.Diff(c.want, joined(c.seen)); diff != "" {
				t.Error(diff)
			}
		})
	}
}
