package printable_test

import (
	"strings"
	"testing"
	"unicode/utf8"

	"github.com/selkies-project/packer-plugin-selkies/internal/printable"
)

func TestLine(t *testing.T) {
	for text, want := range map[string]string{
		"plain é \u4e16":               "plain é \u4e16",
		"two\nlines\r\n\tand more":     "two lines and more",
		"\x1b[31mred\x1b[0m":           `\x1b[31mred\x1b[0m`,
		"\u009b31m":                    `\u009b31m`,     // the same in one character
		"\u202egpj.exe":                `\u202egpj.exe`, // right to left
		"\x00\x7f":                     `\x00\x7f`,
		"latin-\xe9\xff":               `latin-\xe9\xff`,
		"half a character \xe4\xb8":    `half a character \xe4\xb8`,
		strings.Repeat("x", 1<<20):     strings.Repeat("x", 100) + " ...",
		strings.Repeat("\u4e16", 1000): strings.Repeat("\u4e16", 34) + " ...",
	} {
		if got := printable.Line(text, 100); got != want {
			t.Errorf("Line(%q) = %q, want %q", text[:min(50, len(text))], got, want)
		}
	}
}

func TestLines(t *testing.T) {
	const text = "one\n\ttwo \x1b]0;title\x07\r\n"
	if got, want := printable.Lines(text), "one\n\ttwo \\x1b]0;title\\a\\r\n"; got != want {
		t.Errorf("Lines(%q) = %q, want %q", text, got, want)
	}
}

func FuzzLine(f *testing.F) {
	f.Add("\x1b]0;title\x07 \xe4\xb8 \u009b")
	f.Fuzz(func(t *testing.T, text string) {
		line := printable.Line(text, 100)
		if len(line) > 120 || !utf8.ValidString(line) || printable.Line(line, 120) != line {
			t.Errorf("Line(%q) = %q", text, line)
		}
	})
}
