package htmlreport

import (
	"crypto/sha256"
	_ "embed"
	"encoding/base64"
	"html/template"
	"time"
)

var (
	//go:embed page.html
	pageHTML string
	//go:embed page.css
	pageCSS string
	//go:embed page.js
	pageJS string
	// d3-hierarchy lays the picture out; make d3-hierarchy fetches it anew.
	//go:embed d3-hierarchy/d3-hierarchy.min.js
	d3 string
	//go:embed d3-hierarchy/LICENSE
	d3License string
)

// script has the library's license with it, wherever the page goes.
var script = "/* d3-hierarchy\n\n" + d3License + "*/\n" + d3 + "\n" + pageJS

var page = template.Must(template.New("page").Funcs(template.FuncMap{
	"css":    func() template.CSS { return template.CSS(pageCSS) },
	"script": func() template.JS { return template.JS(script) },
	"policy": policy,
	"size":   size,
	"count":  count,
	"short":  short,
	"date":   func(t time.Time) string { return t.Format("2006-01-02 15:04 UTC") },
	"took":   func(d time.Duration) string { return d.Round(100 * time.Millisecond).String() },
}).Parse(pageHTML))

// policy is the content security policy: the page's own script and style, by their
// hashes, and nothing from anywhere.
func policy() string {
	hash := func(text string) string {
		sum := sha256.Sum256([]byte(text))
		return "'sha256-" + base64.StdEncoding.EncodeToString(sum[:]) + "'"
	}
	return "default-src 'none'; script-src " + hash(script) + "; style-src " + hash(pageCSS) +
		"; img-src data:; base-uri 'none'; form-action 'none'"
}
