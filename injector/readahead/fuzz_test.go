package readahead

import (
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/selkies-project/packer-plugin-selkies/injector/cachedisk"
	"github.com/selkies-project/packer-plugin-selkies/trace"
)

// FuzzSplit splits the traces of a disk: what is read is the ranges from the first on,
// without a gap, in pieces, and no more pages than the limit.
func FuzzSplit(f *testing.F) {
	encoded := func(ranges ...trace.Range) []byte {
		t := trace.Trace{
			SchemaVersion: trace.SchemaVersion, Image: digest.FromString("image"), Ranges: ranges,
			Files: []trace.File{{Layer: 0, Path: "a"}, {Layer: 1, Path: "b"}},
		}
		data, err := t.Encode()
		if err != nil {
			f.Fatal(err)
		}
		return data
	}
	f.Add(encoded(trace.Range{File: 0, Offset: 1, Length: 300_000}, trace.Range{File: 1, Offset: 4095, Length: 2}), uint32(1<<20))
	f.Add(encoded(trace.Range{File: 0, Offset: 1 << 62, Length: 1<<62 - 1}), uint32(100_000))
	f.Add(encoded(trace.Range{File: 1, Offset: 1<<63 - 2, Length: 1}, trace.Range{File: 0, Offset: 4096, Length: 4096}), uint32(8192))
	f.Add([]byte(`{"schemaVersion":1,"image":"`+digest.FromString("image")+`","files":[{"layer":9,"path":"a"}],"ranges":[[0,0,1]]}`), uint32(4096))
	f.Fuzz(func(t *testing.T, data []byte, limit uint32) {
		tr, err := trace.Decode(data)
		if err != nil {
			return
		}
		most := int64(limit) % (64 << 20) // as many pieces as fit into memory
		o := &opener{layers: make([]*cachedisk.Root, 2)}
		parts, err := o.split(tr, most)
		if err != nil {
			return
		}
		var pages int64
		for _, r := range tr.Ranges {
			for at := r.Offset; len(parts) > 0 && at < r.Offset+r.Length; parts = parts[1:] {
				p := parts[0]
				if p.offset != at || p.length <= 0 || p.length > piece || p.length > r.Offset+r.Length-at {
					t.Fatalf("of %v it reads %d bytes at %d, not at %d", r, p.length, p.offset, at)
				}
				at += p.length
				pages += (p.offset+p.length-1)/pageSize - p.offset/pageSize + 1
			}
		}
		if len(parts) > 0 {
			t.Fatalf("%d pieces are of no range", len(parts))
		}
		if pages > most/pageSize {
			t.Fatalf("%d pages of %d bytes, the limit is %d", pages, pageSize, most)
		}
	})
}
