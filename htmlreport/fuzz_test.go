package htmlreport

import (
	"bytes"
	"testing"

	"github.com/selkies-project/packer-plugin-selkies/e2e/report"
	"github.com/selkies-project/packer-plugin-selkies/manifest"
)

// FuzzPage draws manifests of which a stranger chose all that a page shows: it stays a text.
func FuzzPage(f *testing.F) {
	f.Add("example.com/a:1", "RUN make", int64(MB), int64(1))
	f.Add("example.com/a:1", "</script><script>alert(1)</script>", int64(0), int64(0))
	f.Add("example.com/a:1", "\x00\xff\u2028<!--<script>", int64(1<<62), int64(1<<62))
	f.Add("a:1", "`${x}`'\"><img src=x onerror=alert(1)>", int64(-1), int64(-1<<63))
	scripts := 0
	f.Fuzz(func(t *testing.T, name, madeBy string, size, other int64) {
		g := report.NewGeneration(day(1))
		g.Add("example.com/first:1", l("base", size), report.Layer{Content: "a", MadeBy: madeBy, Size: other})
		if len(name) > 2 && name[len(name)-2] == ':' {
			g.Add(name, l("base", size), report.Layer{Content: "b", MadeBy: madeBy + name, Size: other})
		}
		data, err := g.Manifest.Encode()
		if err != nil {
			return
		}
		m, err := manifest.Decode(data)
		if err != nil {
			return
		}
		var page bytes.Buffer
		if err := (Report{Manifest: m, Since: second()}).Write(&page); err != nil {
			t.Fatal(err)
		}
		n := bytes.Count(bytes.ToLower(page.Bytes()), []byte("<script"))
		if scripts == 0 {
			scripts = n
		}
		if n != scripts || bytes.Contains(page.Bytes(), []byte("<img")) {
			t.Fatalf("the page has %d scripts, not %d, or a picture", n, scripts)
		}
	})
}
