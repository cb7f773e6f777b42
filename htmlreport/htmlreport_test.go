package htmlreport

import (
	"bytes"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"html"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"

	"github.com/selkies-project/packer-plugin-selkies/e2e/report"
	"github.com/selkies-project/packer-plugin-selkies/manifest"
)

const MB = 1_000_000

func l(content string, size int64) report.Layer {
	return report.Layer{Content: content, MadeBy: "RUN make " + content, Size: size}
}

func day(n int) time.Time { return time.Date(2026, 11, n, 12, 0, 0, 0, time.UTC) }

// first and second are two generations of a small cache.
func first() *manifest.Manifest {
	g := report.NewGeneration(day(1))
	base := l("base", 100*MB)
	g.Add("example.com/app:1", base, l("app", 30*MB))
	g.Add("example.com/old:1", base, l("old", 7*MB))
	g.Add("example.com/base:1", base)
	return &g.Manifest
}

func second() *manifest.Manifest {
	g := report.NewGeneration(day(2))
	base := l("base", 100*MB)
	g.Add("example.com/app:1", base, l("libraries", 20*MB), l("app 2", 10*MB))
	g.Add("example.com/tool:1", base, l("libraries", 20*MB), l("tool", 5*MB))
	g.Add("example.com/base:1", base)
	g.Add("example.com/other:1", l("something", 50*MB), l("tool", 5*MB))
	return &g.Manifest
}

func TestView(t *testing.T) {
	m := second()
	r := Report{
		Manifest: m, Since: first(), Disk: &Disk{Size: 1000 * MB, Free: 700 * MB},
		Pulls: map[digest.Digest]Pull{
			m.Images[0].Target().Digest: {4 * time.Second, 9 * MB},
			m.Images[3].Target().Digest: {time.Second, 20 * MB},
		},
	}
	v, err := r.view()
	if err != nil {
		t.Fatal(err)
	}
	type row struct {
		Title                string
		Size, Own            int64
		Layers, SharedLayers int
		Change               changeKind
		New                  int64
		Share                int
	}
	var rows []row
	for _, i := range v.Images {
		rows = append(rows, row{i.Title, i.Size / MB, i.Own / MB, i.Layers, i.SharedLayers(), i.Change.Kind, i.Change.Bytes / MB, i.Share})
	}
	if diff := cmp.Diff([]row{
		{"example.com/app:1", 130, 10, 3, 2, updated, 30, 100},
		{"example.com/tool:1", 125, 5, 3, 2, added, 25, 0},
		{"example.com/base:1", 100, 0, 1, 1, kept, 0, 0},
		{"example.com/other:1", 55, 55, 2, 0, added, 55, 25},
	}, rows); diff != "" {
		t.Error(diff)
	}
	if v.Size != 190*MB || v.Saved != 220*MB || v.Compressed != 74*MB {
		t.Errorf("size %d, saved %d, compressed %d", v.Size, v.Saved, v.Compressed)
	}
	if diff := cmp.Diff(amount{1, 5 * MB}, v.Again); diff != "" {
		t.Errorf("stored again: %s", diff)
	}
	c := v.Changes
	if want := "2 images are new, 1 has been updated, 1 is gone and 1 is as it was"; c.Sentence() != want {
		t.Errorf("changes: %s, want %s", c.Sentence(), want)
	}
	if diff := cmp.Diff([]removed{{"example.com/old:1", 107 * MB}}, c.Removed); diff != "" {
		t.Error(diff)
	}
	if diff := cmp.Diff([]amount{{5, 90 * MB}, {2, 37 * MB}, {1, 100 * MB}}, []amount{c.NewLayers, c.GoneLayers, c.KeptLayers}); diff != "" {
		t.Errorf("layers that came, went, stayed: %s", diff)
	}
	if r := v.Room; r.Other != 110*MB || r.Compressed/MB != 272 || r.Largest.Title != "example.com/other:1" || r.Times != 12 {
		t.Errorf("room: %+v", r)
	}
	var tree strings.Builder
	for _, r := range v.Picture.Runs {
		writeRun(&tree, r, "")
	}
	if diff := cmp.Diff(`1 layer shared by 3 images: 1 layers, 100 MB of 135 MB
  1 layer shared by 2 images: 1 layers, 20.0 MB of 35.0 MB
    example.com/app:1: 1 layers, 10.0 MB of 10.0 MB
    example.com/tool:1: 1 layers, 5.00 MB of 5.00 MB
example.com/other:1: 2 layers, 55.0 MB of 55.0 MB
`, tree.String()); diff != "" {
		t.Error(diff)
	}
}

func writeRun(w *strings.Builder, r run, indent string) {
	fmt.Fprintf(w, "%s%s: %d layers, %s of %s\n", indent, r.Label, len(r.Layers), r.Size, r.Whole)
	for _, on := range r.Runs {
		writeRun(w, on, indent+"  ")
	}
}

func TestUnchanged(t *testing.T) {
	v, err := Report{Manifest: first(), Since: first()}.view()
	if err != nil {
		t.Fatal(err)
	}
	if !v.Changes.Same || v.Changes.Kept != 3 || v.Changes.NewLayers.Count != 0 {
		t.Errorf("changes: %+v", v.Changes)
	}
}

// TestPage finds what the page says, and why something is missing.
func TestPage(t *testing.T) {
	why := Report{Manifest: second(), NoSince: "no since", NoDisk: "no disk", NoPulls: "no pulls"}
	full := Report{Manifest: second(), Since: first(), Disk: &Disk{1000 * MB, 700 * MB}, Pulls: map[digest.Digest]Pull{}}
	empty := Report{Manifest: &report.NewGeneration(day(1)).Manifest, Disk: &Disk{}}
	for _, tt := range []struct {
		name          string
		report        Report
		want, without []string
	}{
		{"manifest alone", why, []string{"no since", "no disk", "no pulls", "example.com/app:1", "RUN make tool"}, []string{"Build time", ">updated<"}},
		{"all", full, []string{"Build time", "was there", ">updated<", "example.com/old:1", "12 times the ", "About 273 MB more"}, []string{"no since"}},
		{"empty", empty, []string{"<dd>0</dd>"}, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			page := write(t, tt.report)
			for _, w := range tt.want {
				if !strings.Contains(page, w) {
					t.Errorf("the page lacks %q", w)
				}
			}
			for _, w := range tt.without {
				if strings.Contains(page, w) {
					t.Errorf("the page has %q", w)
				}
			}
		})
	}
}

func write(t *testing.T, r Report) string {
	t.Helper()
	var b bytes.Buffer
	if err := r.Write(&b); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

// TestHostile has texts that would be HTML in every place. The layer manifest refuses some
// of them as names before.
func TestHostile(t *testing.T) {
	const hostile = `x</script></style><img src=x onerror=alert(1)>"'&{{.}}` + "\u2028"
	v, err := Report{Manifest: second(), NoDisk: hostile, NoPulls: hostile, Since: first()}.view()
	if err != nil {
		t.Fatal(err)
	}
	for _, text := range []*string{
		&v.Tool, &v.Engine, &v.Platform, &v.Store, &v.Images[0].Title, &v.Images[0].Names[0], &v.Layers[0].MadeBy, &v.Layers[0].Title,
		&v.Changes.Removed[0].Title, &v.Picture.Images[0].Title, &v.Picture.Layers[0].Label, &v.Picture.Runs[0].Label,
	} {
		*text = hostile
	}
	v.Images[0].Target, v.Layers[0].DiffID, v.Layers[0].ChainID = hostile, hostile, hostile
	html, err := v.html()
	if err != nil {
		t.Fatal(err)
	}
	page := string(html)
	if n := strings.Count(page, "<script"); n != 2 || strings.Contains(page, "<img") {
		t.Errorf("the page has %d scripts, or an image", n)
	}
	data := regexp.MustCompile(`(?s)<script type="application/json" id="data">(.*?)</script>`).FindStringSubmatch(page)
	var p picture
	if err := json.Unmarshal([]byte(data[1]), &p); err != nil {
		t.Fatal(err)
	}
	if got := p.Images[0].Title; got != hostile {
		t.Errorf("the title became %q", got)
	}
}

// TestPolicy computes the hashes that the page's policy allows, as a browser does.
func TestPolicy(t *testing.T) {
	page := write(t, Report{Manifest: second()})
	policy := html.UnescapeString(regexp.MustCompile(`Content-Security-Policy" content="([^"]*)"`).FindStringSubmatch(page)[1])
	for directive, text := range map[string]string{
		"script-src": `(?s)<script>(.*?)</script>`,
		"style-src":  `(?s)<style>(.*?)</style>`,
	} {
		m := regexp.MustCompile(text).FindAllStringSubmatch(page, -1)
		if len(m) != 1 {
			t.Fatalf("%d of %s", len(m), text)
		}
		sum := sha256.Sum256([]byte(m[0][1]))
		if want := directive + " 'sha256-" + base64.StdEncoding.EncodeToString(sum[:]) + "';"; !strings.Contains(policy, want) {
			t.Errorf("the policy %s lacks %s", policy, want)
		}
	}
	if !strings.HasPrefix(policy, "default-src 'none';") {
		t.Errorf("the policy allows more: %s", policy)
	}
	if !strings.Contains(page, d3License) {
		t.Error("the page has the library without its license")
	}
}

// TestLibrary compares the library with the sums that it was fetched by.
func TestLibrary(t *testing.T) {
	sums, err := os.ReadFile("d3-hierarchy/SHA256SUMS")
	if err != nil {
		t.Fatal(err)
	}
	want := fmt.Sprintf("%x  LICENSE\n%x  d3-hierarchy.min.js\n", sha256.Sum256([]byte(d3License)), sha256.Sum256([]byte(d3)))
	if diff := cmp.Diff(want, string(sums)); diff != "" {
		t.Errorf("run make d3-hierarchy (-embedded +sums):\n%s", diff)
	}
}

func TestSize(t *testing.T) {
	for n, want := range map[int64]string{
		0: "0 B", 999: "999 B", 1000: "1.00 kB", 9_994: "9.99 kB", 9_996: "10.0 kB", 99_960: "100 kB",
		999_499: "999 kB", 999_500: "1.00 MB", 1_532_000_000: "1.53 GB", 2_000 * 1_000_000 * MB: "2000 TB",
	} {
		if got := size(n); got != want {
			t.Errorf("%d is %q, want %q", n, got, want)
		}
	}
}
