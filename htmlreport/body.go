package htmlreport

import (
	"encoding/json"
	"time"
)

// html is the page.
func (v *view) html() ([]byte, error) {
	data, err := json.Marshal(v.Picture) // which has no "<"
	if err != nil {
		return nil, err
	}
	p := &page{}
	v.putHead(p)
	v.putFigures(p)
	v.putPicture(p)
	v.putRoom(p)
	v.putChanges(p)
	v.putImages(p)
	v.putLayers(p)
	p.put(`
</main>
<footer>
  <p>Cache ID <code>%s</code></p>
  <p>From the layer manifest that %s wrote; the Docker store is in %s. Sizes are those of the
    files as Docker counts them, 1 GB being 1000 MB. This page asks no other machine for anything.</p>
</footer>
<script type="application/json" id="data">%s</script>
<script>%s</script>
</body>
</html>
`, v.ID, v.Tool, v.Store, markup(data), markup(script))
	return p.Bytes(), nil
}

func date(t time.Time) string { return t.Format("2006-01-02 15:04 UTC") }

func (v *view) putHead(p *page) {
	p.put(`<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="%s">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>Image cache %s</title>
<link rel="icon" href="data:,">
<style>%s</style>
</head>
<body>
<a class="skip" href="#images">Skip to the list of images</a>
<header>
  <h1>Image cache <code>%s</code></h1>
  <p>Recorded <time datetime="%s">%s</time> for %s, filled by Docker %s.</p>
</header>
<main>
`, policy(), v.Short, markup(pageCSS), v.Short, v.Created.Format(time.RFC3339), date(v.Created), v.Platform, v.Engine)
}

func (v *view) putFigures(p *page) {
	p.put(`
<dl class="figures">
  <div><dt>Images</dt><dd>%d</dd></div>
  <div><dt>Layers</dt><dd>%d</dd></div>
  <div><dt>On the disk</dt><dd>%s</dd></div>
  <div><dt>Saved by sharing</dt><dd>%s</dd></div>
  <div><dt>A pull would fetch</dt><dd>%s</dd></div>
`, len(v.Images), len(v.Layers), size(v.Size), size(v.Saved), size(v.Compressed))
	if v.Changes != nil {
		p.put(`  <div><dt>New layers</dt><dd>%s</dd></div>
`, size(v.Changes.NewLayers.Size))
	}
	p.put("</dl>\n")
}

func (v *view) putPicture(p *page) {
	p.put(`
<section aria-labelledby="picture-title">
  <h2 id="picture-title">What the disk holds</h2>
  <p id="picture-hint">Each box is a layer, as large as its files. A frame holds layers together with what is
    built on them. Layers that several images share are on the disk once, and hatched here.</p>
  <ul class="legend">
    <li><span class="key shared"></span>shared by several images</li>
    <li><span class="key own"></span>of one image</li>
`)
	if v.Changes != nil {
		p.put(`    <li><span class="key own new"></span>new since the last generation</li>
`)
	}
	p.put(`  </ul>
  <noscript><p class="note">The picture needs scripts. All that it shows is in the tables below.</p></noscript>
  <div class="drawing" id="drawing" hidden>
    <nav id="path" aria-label="Part of the picture"></nav>
    <div id="picture" role="tree" aria-labelledby="picture-title" aria-describedby="keys"></div>
    <aside id="chosen" aria-label="The chosen box"></aside>
    <p class="note" id="keys">Arrow keys move from box to box, Enter enlarges a frame, Escape goes back.</p>
  </div>
`)
	if v.Again.Count > 0 {
		p.put(`  <p class="note">%s another's files (%s): the same diff ID on a different
    parent. Images built on the same base share them.</p>
`, count(v.Again.Count, "layer duplicates", "layers duplicate"), size(v.Again.Size))
	}
	p.put("</section>\n")
}

func (v *view) putRoom(p *page) {
	p.put(`
<section aria-labelledby="room-title">
  <h2 id="room-title">What still fits</h2>
`)
	if r := v.Room; r != nil {
		p.put(`  <svg class="bar" role="img" aria-label="%s in all: %s layers, %s other, %s free">
    <rect class="layers" width="%v%%"/>
    <rect class="other" x="%v%%" width="%v%%"/>
  </svg>
  <ul class="legend">
    <li><span class="key layers"></span>layers %s</li>
    <li><span class="key other"></span>Docker's own, blobs, file system %s</li>
    <li><span class="key free"></span>free %s of %s</li>
  </ul>
  <p>`, size(r.Size), size(r.Layers), size(r.Other), size(r.Free), r.Percent(r.Layers), r.Percent(r.Layers), r.Percent(r.Other),
			size(r.Layers), size(r.Other), size(r.Free), size(r.Size))
		if r.Compressed != 0 {
			p.put(`About %s more, as registries count it, compressed: what is here takes %.1f times
    that on the disk. `, size(r.Compressed), r.Factor)
		}
		if l := r.Largest; l != nil {
			p.put(`That is %s the %s that <span class="ref">%s</span> has of its own, the most of all images.`,
				count(r.Times, "time", "times"), size(l.Own), l.Title)
		}
		p.put("</p>\n")
	} else {
		p.put("  <p class=\"note\">%s</p>\n", v.NoDisk)
	}
	p.put("</section>\n")
}

func (v *view) putChanges(p *page) {
	p.put(`
<section aria-labelledby="changes-title">
  <h2 id="changes-title">Since the last generation</h2>
`)
	switch c := v.Changes; {
	case c == nil:
		p.put("  <p class=\"note\">%s</p>\n", v.NoSince)
	case c.Same:
		p.put("  <p>Nothing has changed: this is still cache <code>%s</code>.</p>\n", c.Short)
	default:
		p.put(`  <p>Cache <code>%s</code> of %s came before. %s.
    %s (%s) came,
    %d (%s) went, %d (%s) stayed.</p>
  <ul class="changes" tabindex="0" aria-label="Images that have changed">
`, c.Short, date(c.Created), c.Sentence(), count(c.NewLayers.Count, "layer", "layers"), size(c.NewLayers.Size),
			c.GoneLayers.Count, size(c.GoneLayers.Size), c.KeptLayers.Count, size(c.KeptLayers.Size))
		for _, img := range v.Images {
			if img.Change.Kind == kept {
				continue
			}
			p.put(`    <li><span class="tag %s">%s</span> <span class="ref">%s</span>`, img.Change.Kind, img.Change.Kind, img.Title)
			if was := img.Change.Was; was != "" {
				p.put(` <small>was <code>%s</code>,</small>`, short(was))
			}
			p.put(" <small>%s new</small></li>\n", size(img.Change.Bytes))
		}
		for _, r := range c.Removed {
			p.put(`    <li><span class="tag removed">gone</span> <span class="ref">%s</span> <small>was %s</small></li>
`, r.Title, size(r.Size))
		}
		p.put("  </ul>\n")
	}
	p.put("</section>\n")
}

func (v *view) putImages(p *page) {
	p.put(`
<section aria-labelledby="images-title" id="images" class="list" tabindex="-1">
  <h2 id="images-title">Images</h2>
  <div class="find" hidden>
    <label for="find-images">Find images</label>
    <input id="find-images" type="search" autocomplete="off" spellcheck="false">
    <p role="status" data-words="image images"></p>
  </div>
`)
	if !v.Pulled {
		p.put("  <p class=\"note\">%s</p>\n", v.NoPulls)
	}
	p.put(`  <table role="table" aria-labelledby="images-title">
    <thead role="rowgroup">
      <tr role="row">
        <th role="columnheader" scope="col" data-by="text">Image</th>
        <th role="columnheader" scope="col" data-by="number" aria-sort="descending">Size</th>
        <th role="columnheader" scope="col" data-by="number" title="The layers that no other image has: what goes with the image">Of its own</th>
        <th role="columnheader" scope="col" data-by="number" title="What a pull fetches, with nothing there">Compressed</th>
        <th role="columnheader" scope="col" data-by="number">Layers</th>
`)
	if v.Pulled {
		p.put(`        <th role="columnheader" scope="col" data-by="number" title="Several images are pulled at once">Build time</th>
`)
	}
	if v.Changes != nil {
		p.put(`        <th role="columnheader" scope="col" data-by="text">Change</th>
`)
	}
	p.put(`      </tr>
    </thead>
    <tbody role="rowgroup">
`)
	for i, img := range v.Images {
		v.putImage(p, i, img)
	}
	p.put(`    </tbody>
  </table>
</section>
`)
}

func (v *view) putImage(p *page, i int, img imageRow) {
	p.put(`      <tr role="row" id="image-%d">
        <th role="rowheader" scope="row"><span class="ref">%s</span>`, i, img.Title)
	for _, n := range img.Names {
		p.put(`<small class="ref">%s</small>`, n)
	}
	p.put(`</th>
        <td role="cell" data-name="Size" data-value="%d">%s</td>
        <td role="cell" data-name="Of its own" data-value="%d">%s</td>
        <td role="cell" data-name="Compressed" data-value="%d">%s</td>
        <td role="cell" data-name="Layers" data-value="%d">%d`,
		img.Size, size(img.Size), img.Own, size(img.Own), img.Compressed, size(img.Compressed), img.Layers, img.Layers)
	if n := img.SharedLayers(); n != 0 {
		p.put("<small>%d shared</small>", n)
	}
	p.put("</td>\n")
	if v.Pulled {
		p.put(`        <td role="cell" data-name="Build time" data-value="%d">`, img.Pull.Took.Milliseconds())
		if took := img.Pull.Took; took != 0 {
			p.put(`%s<small>%s pulled</small><svg class="bar" aria-hidden="true"><rect class="layers" width="%d%%"/></svg>`,
				took.Round(100*time.Millisecond), size(img.Pull.Bytes), img.Share)
		} else {
			p.put("<small>was there</small>")
		}
		p.put("</td>\n")
	}
	if v.Changes != nil {
		p.put(`        <td role="cell" data-name="Change" data-value="%s"><span class="tag %s">%s</span></td>
`, img.Change.Kind, img.Change.Kind, img.Change.Kind)
	}
	p.put("      </tr>\n")
}

func (v *view) putLayers(p *page) {
	p.put(`
<section aria-labelledby="layers-title" id="layers" class="list">
  <h2 id="layers-title">Layers</h2>
  <details>
    <summary>All %d, by the beginning of their diff ID</summary>
    <div class="find" hidden>
      <label for="find-layers">Find layers</label>
      <input id="find-layers" type="search" autocomplete="off" spellcheck="false">
      <p role="status" data-words="layer layers"></p>
    </div>
    <table role="table" aria-labelledby="layers-title">
      <thead role="rowgroup">
        <tr role="row">
          <th role="columnheader" scope="col" data-by="text">Layer</th>
          <th role="columnheader" scope="col" data-by="number">Size</th>
          <th role="columnheader" scope="col" data-by="number">Images</th>
          <th role="columnheader" scope="col" data-by="text">Made by</th>
        </tr>
      </thead>
      <tbody role="rowgroup">
`, len(v.Layers))
	for i, l := range v.Layers {
		p.put(`        <tr role="row" id="layer-%d">
          <th role="rowheader" scope="row"><code title="diff ID %s, chain ID %s">%s</code>`, i, l.DiffID, l.ChainID, l.Short())
		if l.New {
			p.put(` <span class="tag new">new</span>`)
		}
		if l.Again {
			p.put(` <span class="tag again">duplicate</span>`)
		}
		p.put(`</th>
          <td role="cell" data-name="Size" data-value="%d">%s</td>
          <td role="cell" data-name="Images" data-value="%d">`, l.Size, size(l.Size), len(l.Images))
		if l.Title != "" {
			p.put(`<span class="ref">%s</span>`, l.Title)
		} else {
			p.put("%d images", len(l.Images))
		}
		p.put(`</td>
          <td role="cell" data-name="Made by"><code>%s</code></td>
        </tr>
`, l.MadeBy)
	}
	p.put(`      </tbody>
    </table>
  </details>
</section>
`)
}
