package htmlreport

import (
	"bytes"
	"crypto/sha256"
	_ "embed"
	"encoding/base64"
	"fmt"
	"html"
	"strings"
)

var (
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

// page is HTML that is being written. html/template would take as many lines, and with its
// calls of methods by name have the linker keep every method of the whole program: a third
// of the injector.
type page struct{ bytes.Buffer }

// markup is text that is HTML already.
type markup string

// put writes HTML, with arguments that are text, whatever they hold, where an element's
// text or a quoted attribute's value is.
func (p *page) put(format string, args ...any) {
	for i, a := range args {
		switch a.(type) {
		case markup, int, int64, float64:
		default:
			args[i] = html.EscapeString(strings.ReplaceAll(fmt.Sprint(a), "\x00", "\ufffd"))
		}
	}
	fmt.Fprintf(p, format, args...)
}

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
