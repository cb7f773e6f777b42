// Package printable writes text from elsewhere, such as from a cache disk, a registry or a
// container, so that a terminal and a log show what it is: it may be of any length, move the
// cursor and name the window.
package printable

import (
	"strconv"
	"strings"
	"unicode"
	"unicode/utf8"
)

// Line is text as one line of at most most bytes, and a few more that say so.
func Line(text string, most int) string {
	text = strings.Join(strings.Fields(text), " ")
	var b strings.Builder
	for text != "" {
		if b.Len() >= most {
			return strings.TrimRight(b.String(), " ") + " ..."
		}
		text = text[write(&b, text):]
	}
	return b.String()
}

// Lines is text with its line breaks and tabs.
func Lines(text string) string {
	var b strings.Builder
	for text != "" {
		if c := text[0]; c == '\n' || c == '\t' {
			b.WriteByte(c)
			text = text[1:]
			continue
		}
		text = text[write(&b, text):]
	}
	return b.String()
}

// write writes the first character of text and gives its length in bytes.
func write(b *strings.Builder, text string) int {
	r, size := utf8.DecodeRuneInString(text)
	if unicode.IsPrint(r) && r != utf8.RuneError {
		b.WriteRune(r)
	} else {
		quoted := strconv.QuoteToASCII(text[:size])
		b.WriteString(quoted[1 : len(quoted)-1])
	}
	return size
}
