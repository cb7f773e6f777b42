package report

import (
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"
)

// Line is text as one line of at most most bytes, and a few more that say so, that
// every terminal shows as it is: what a cache disk or a registry has called something
// may be of any length, and move the cursor.
func Line(text string, most int) string {
	text = strings.Join(strings.Fields(text), " ")
	var b strings.Builder
	for text != "" {
		if b.Len() >= most {
			return strings.TrimRight(b.String(), " ") + " ..."
		}
		r, size := utf8.DecodeRuneInString(text)
		if unicode.IsPrint(r) && r != utf8.RuneError {
			b.WriteRune(r)
		} else {
			quoted := strconv.QuoteToASCII(text[:size])
			b.WriteString(quoted[1 : len(quoted)-1])
		}
		text = text[size:]
	}
	return b.String()
}
