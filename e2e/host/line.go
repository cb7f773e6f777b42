package host

import (
	"fmt"
	"strings"
	"unicode"
)

// CheckLine refuses an error that is not one line, or that a terminal does not show as it is.
func CheckLine(line string) error {
	if line == "" || strings.ContainsFunc(line, func(r rune) bool { return !unicode.IsPrint(r) || r == unicode.ReplacementChar }) {
		return fmt.Errorf("a terminal does not show %q as one line", line)
	}
	return nil
}
