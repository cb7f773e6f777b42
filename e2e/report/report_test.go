//go:build e2e

package report

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/chromedp/cdproto/accessibility"
	"github.com/chromedp/chromedp"
	"github.com/chromedp/chromedp/kb"
	"github.com/opencontainers/go-digest"

	"github.com/selkies-project/packer-plugin-selkies/e2e/host"
	"github.com/selkies-project/packer-plugin-selkies/htmlreport"
)

var screenshots = flag.String("screenshots", "", "folder to keep a screenshot of each page in")

// world is what the tests share: the folder with the pages, and a browser.
var world struct {
	dir     string
	browser context.Context
}

func TestMain(m *testing.M) {
	flag.Parse()
	host.Main(func(ctx context.Context, dir string) (int, error) {
		world.dir = dir
		injector := filepath.Join(dir, "selkies-image-injector")
		if err := host.Build(ctx, "./injector", injector); err != nil {
			return 1, err
		}
		for _, images := range sizes {
			write := writePage
			if images == built {
				write = writeBuilt
			}
			if err := write(ctx, injector, images); err != nil {
				return 1, err
			}
		}
		browser, stop, err := startBrowser(ctx, dir)
		if err != nil {
			return 1, err
		}
		defer stop()
		world.browser = browser
		return m.Run(), nil
	})
}

// built is the size of the cache whose page is the one that a build writes.
const built = 12

// sizes are those of the caches, in images.
var sizes = []int{3, built, 300}

// writePage has the injector draw a cache of so many images from layer manifests alone.
func writePage(ctx context.Context, injector string, images int) error {
	var files []string
	for number := range 2 {
		data, err := Cache(images, number+1).Encode()
		if err != nil {
			return err
		}
		files = append(files, filepath.Join(world.dir, fmt.Sprintf("manifest-%d-%d.json", images, number)))
		if err := os.WriteFile(files[number], data, 0o600); err != nil {
			return err
		}
	}
	_, err := host.Output(exec.CommandContext(ctx, injector, "report", "--html", page(images), "--since", files[0], files[1]))
	return err
}

// writeBuilt draws what a build knows besides: how full the disk is and how long each image took.
func writeBuilt(_ context.Context, _ string, images int) error {
	m, since := Cache(images, 2), Cache(images/2, 1)
	r := htmlreport.Report{
		Manifest: m, Since: since,
		Disk:  &htmlreport.Disk{Size: 52_521_566_208, Free: 45_830_000_000},
		Pulls: map[digest.Digest]htmlreport.Pull{},
	}
	there := map[digest.Digest]bool{}
	for _, img := range since.Images {
		there[img.Target().Digest] = true
	}
	for i, img := range m.Images {
		if d := img.Target().Digest; !there[d] {
			r.Pulls[d] = htmlreport.Pull{Took: time.Duration(83-7*i) * time.Second, Bytes: 740_000_000 - 41_000_000*int64(i)}
		}
	}
	f, err := os.Create(page(images))
	if err != nil {
		return err
	}
	defer f.Close()
	return r.Write(f)
}

func page(images int) string { return filepath.Join(world.dir, fmt.Sprintf("%d.html", images)) }

// view is how a page is looked at.
type view struct {
	images int
	scheme string
	width  int64
}

func (v view) String() string { return fmt.Sprintf("%d-%s-%d", v.images, v.scheme, v.width) }

// TestPage looks at pages of few and of many images, by day and by night, on a desk and on a phone.
func TestPage(t *testing.T) {
	for _, images := range sizes {
		for _, scheme := range []string{"light", "dark"} {
			for _, width := range []int64{1280, 360} {
				v := view{images, scheme, width}
				t.Run(v.String(), func(t *testing.T) { testPage(t, v) })
			}
		}
	}
}

func testPage(t *testing.T, v view) {
	tab := open(t, v)
	got := evaluate[looks](tab, look)
	if got.Width > int(v.width) {
		t.Errorf("the page is %d wide", got.Width)
	}
	m := Cache(v.images, 2)
	names := 0
	for _, img := range m.Images {
		names += len(img.Names)
	}
	if got.Rows != len(m.Images) || got.Layers != len(m.Layers) || got.Names != names {
		t.Errorf("%d rows of images with %d names, %d of layers; want %d, %d, %d", got.Rows, got.Names, got.Layers, len(m.Images), names, len(m.Layers))
	}
	if got.Boxes < 20 || got.Frames < 2 || got.Named != got.Boxes {
		t.Errorf("the picture has %d boxes, %d of them frames, %d with names", got.Boxes, got.Frames, got.Named)
	}
	if want := map[string]string{"light": "rgb(246, 247, 249)", "dark": "rgb(16, 20, 27)"}[v.scheme]; got.Background != want {
		t.Errorf("background is %s, want %s", got.Background, want)
	}
	if v.images == built {
		if want := "layers 5.45 GB, Docker's own, blobs, file system 1.24 GB, free 45.8 GB of 52.5 GB"; got.Room != want {
			t.Errorf("the room is %q, want %q", got.Room, want)
		}
		if got.Took != 7 || got.There != built-7 {
			t.Errorf("%d images took a time and %d were there", got.Took, got.There)
		}
	}
	if len(got.Outside) > 0 {
		t.Errorf("what leaves its box:\n%s", strings.Join(got.Outside, "\n"))
	}
	if len(got.Low) > 0 {
		t.Errorf("contrast is too low:\n%s", strings.Join(got.Low, "\n"))
	}
	if *screenshots != "" {
		height := map[int64]int64{1280: 2200, 360: 5600}[v.width]
		tab.do(chromedp.EmulateViewport(v.width, height))
		png, err := chromedp.Run(tab.ctx, chromedp.CaptureScreenshot())
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(*screenshots, v.String()+".png"), png, 0o644); err != nil {
			t.Error(err)
		}
	}
}

// looks are what look finds.
type looks struct {
	Width      int      `json:"width"`
	Rows       int      `json:"rows"`
	Layers     int      `json:"layers"`
	Names      int      `json:"names"`
	Boxes      int      `json:"boxes"`
	Named      int      `json:"named"`
	Frames     int      `json:"frames"`
	Background string   `json:"background"`
	Room       string   `json:"room"`
	Took       int      `json:"took"`
	There      int      `json:"there"`
	Outside    []string `json:"outside"`
	Low        []string `json:"low"`
}

// look finds out what a person sees. The contrast is WCAG's; what lies behind a text is
// the nearest colour, of a hatched box both.
const look = `(() => {
	const parse = c => c.match(/[\d.]+/g).map(Number);
	const luminance = c => {
		const [r, g, b] = parse(c).map(v => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4);
		return .2126 * r + .7152 * g + .0722 * b;
	};
	const contrast = (a, b) => {
		const [x, y] = [luminance(a), luminance(b)];
		return (Math.max(x, y) + .05) / (Math.min(x, y) + .05);
	};
	const behind = e => {
		for (; e; e = e.parentElement) {
			const s = getComputedStyle(e);
			if (s.backgroundImage.includes("gradient")) return s.backgroundImage.match(/rgb\([^)]*\)/g);
			if (!/, 0\)$/.test(s.backgroundColor)) return [s.backgroundColor];
		}
	};
	const details = document.querySelector("#layers details");
	details.open = true;
	const low = [];
	for (const e of document.querySelectorAll("body *:not(script):not(style):not(noscript)")) {
		if (e.closest("tr")?.rowIndex > 20) continue; // the others are the same
		if (![...e.childNodes].some(n => n.nodeType === 3 && n.textContent.trim()) || !e.getClientRects().length) continue;
		for (const b of behind(e)) {
			const c = contrast(getComputedStyle(e).color, b);
			if (c < 4.5 && low.length < 9) low.push(c.toFixed(2) + " " + e.outerHTML.slice(0, 99));
		}
	}
	const outside = [];
	for (const e of document.querySelectorAll("td, th, dd, rect, .legend li, .changes li, p")) {
		if (e.closest("tr")?.rowIndex > 20 || !e.getClientRects().length) continue;
		const box = (e.localName === "rect" ? e.closest("svg") : e.closest("section") ?? e).getBoundingClientRect(), own = e.getBoundingClientRect();
		if ((e.scrollWidth > e.clientWidth + 1 && e.clientWidth || own.left < box.left - 1 || own.right > box.right + 1) && outside.length < 9)
			outside.push(e.outerHTML.slice(0, 99));
	}
	const width = document.documentElement.scrollWidth;
	details.open = false;
	const n = s => document.querySelectorAll(s).length;
	return {
		width,
		rows: n("#images tbody tr"), names: n("#images tbody .ref"), layers: n("#layers tbody tr"),
		boxes: n("#picture [role=treeitem]"), named: n("#picture [role=treeitem][aria-label]"), frames: n("#picture .frame"),
		background: getComputedStyle(document.body).backgroundColor,
		room: [...document.querySelectorAll("[aria-labelledby=room-title] .legend li")].map(e => e.textContent).join(", "),
		took: n("#images td[data-name='Build time'] svg"),
		there: n("#images td[data-name='Build time']:not(:has(svg))"),
		outside, low,
	};
})()`

// TestAccessibility asks the browser what it tells a screen reader, on a desk and on a phone, where
// tables look like none.
func TestAccessibility(t *testing.T) {
	for _, width := range []int64{1280, 360} {
		v := view{built, "light", width}
		t.Run(v.String(), func(t *testing.T) { testAccessibility(t, v) })
	}
}

func testAccessibility(t *testing.T, v view) {
	tab := open(t, v)
	tree, err := chromedp.Call(tab.ctx, accessibility.GetFullAXTree, accessibility.GetFullAXTreeParams{})
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, n := range tree.Nodes {
		role, name := text(n.Role), text(n.Name)
		got = append(got, role+" "+name)
		if slices.Contains([]string{"button", "searchbox", "link", "treeitem", "tree", "table", "image", "heading", "DisclosureTriangle"}, role) && name == "" && !n.Ignored {
			t.Errorf("a %s has no name", role)
		}
	}
	for _, want := range []string{
		"searchbox Find images", "button Image", "button Size", "button Of its own", "button Build time", "button Change",
		"image 52.5 GB in all: 5.45 GB layers, 1.24 GB other, 45.8 GB free", "list Images that have changed", "columnheader Build time", map[int64]string{1280: "cell 1m16s 699 MB pulled", 360: "cell Build time 1m16s 699 MB pulled"}[v.width],
		"table Images", "tree What the disk holds", "complementary The chosen box", "status ",
		"heading Images", "heading Layers", "heading What still fits", "heading Since the last generation",
		"treeitem 9 layers shared by 6 images, ",
		"rowheader docker.io/library/debian:12 docker.io/library/debian@sha256:",
		"link Skip to the list of images",
	} {
		if !slices.ContainsFunc(got, func(g string) bool { return strings.HasPrefix(g, want) }) {
			t.Errorf("there is no %q in\n%s", want, strings.Join(got, "\n"))
		}
	}
}

func text(v *accessibility.Value) string {
	if v == nil {
		return ""
	}
	return strings.Trim(string(v.Value), `"`)
}

// TestKeyboard does with the keyboard what the page can do, where it can do most.
func TestKeyboard(t *testing.T) {
	tab := open(t, view{300, "light", 1280})

	tab.tabTo(`matches(".skip")`)
	tab.tabTo(`matches("#picture [role=treeitem]")`)
	first := tab.text(`document.activeElement.getAttribute("aria-label")`)
	tab.press(kb.ArrowDown)
	second := tab.text(`document.activeElement.getAttribute("aria-label")`)
	if second == first || second == "" {
		t.Errorf("arrow down leads from %q to %q", first, second)
	}
	tab.press(kb.Home, kb.Enter)
	inside := tab.text(`document.activeElement.getAttribute("aria-label")`)
	if path := tab.text(`document.querySelector("#path").textContent`); inside == first || !strings.HasPrefix(path, "Whole disk›") {
		t.Errorf("enter leads to %q, to be reached by %q", inside, path)
	}
	tab.press(kb.Escape)
	if path := tab.text(`document.querySelector("#path").textContent`); path != "Whole disk" {
		t.Errorf("escape leads to %q", path)
	}
	if chosen := tab.text(`document.querySelector("#chosen h3").textContent`); chosen == "" {
		t.Error("nothing is said of the chosen box")
	}

	tab.tabTo(`id === "find-images"`)
	tab.press("blender")
	if status := tab.text(`document.querySelector("#images [role=status]").textContent`); status != "1 of 300 images" {
		t.Errorf("status is %q", status)
	}
	if rows := tab.text(`[...document.querySelectorAll("#images tbody tr")].filter(r => r.checkVisibility()).map(r => r.querySelector(".ref").textContent).join()`); rows != "us-docker.pkg.dev/my-project/apps/blender:4.2" {
		t.Errorf("found %s", rows)
	}
	tab.press(strings.Repeat(kb.Backspace, len("blender")))

	const names = `[...document.querySelectorAll("#images tbody tr .ref:first-child")].map(e => e.textContent).join(" ")`
	tab.tabTo(`textContent === "Image" && e.closest("#images")`)
	for _, direction := range []string{"ascending", "descending"} {
		tab.press(kb.Enter)
		got := strings.Fields(tab.text(names))
		want := slices.Sorted(slices.Values(got))
		if direction == "descending" {
			slices.Reverse(want)
		}
		if sorted := tab.text(`document.activeElement.closest("th").ariaSort`); sorted != direction || !slices.Equal(got, want) || len(got) != 300 {
			t.Errorf("sorted %s, want %s: %d images from %s to %s", sorted, direction, len(got), got[0], got[len(got)-1])
		}
	}
	tab.tabTo(`tagName === "SUMMARY"`)
	tab.press(kb.Enter)
	tab.tabTo(`id === "find-layers"`)
	tab.press("blender-0")
	if status := tab.text(`document.querySelector("#layers [role=status]").textContent`); !strings.HasPrefix(status, "1 of ") {
		t.Errorf("status is %q", status)
	}
}

// tabTo presses Tab until the focus is where it is to be.
func (b *tab) tabTo(where string) {
	b.t.Helper()
	for range 60 {
		b.press(kb.Tab)
		if evaluate[bool](b, `(e => Boolean(e.`+where+`))(document.activeElement)`) {
			return
		}
	}
	b.t.Fatalf("Tab does not lead to %s", where)
}

func (b *tab) press(keys ...string) {
	b.t.Helper()
	for _, k := range keys {
		b.do(chromedp.KeyEvent(k))
	}
}

func (b *tab) text(expression string) string {
	b.t.Helper()
	return evaluate[string](b, expression)
}
