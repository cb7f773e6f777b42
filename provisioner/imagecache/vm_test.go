package imagecache

import (
	"os/exec"
	"testing"

	"github.com/google/go-cmp/cmp"
)

// TestQuote has a real shell take arguments apart again.
func TestQuote(t *testing.T) {
	args := []string{"plain", "", "two words", `it's`, `"$HOME" $(id) \n`, "-o=a,b:c@d%e+f", "new\nline", "*?[a]", "~", "#no", "é"}
	line := "printf '%s\\0'"
	for _, a := range args {
		line += " " + quote(a)
	}
	out, err := exec.CommandContext(t.Context(), "sh", "-c", line).Output()
	if err != nil {
		t.Fatal(err)
	}
	want := ""
	for _, a := range args {
		want += a + "\x00"
	}
	if diff := cmp.Diff(want, string(out)); diff != "" {
		t.Error(diff)
	}
}

func TestCommandLine(t *testing.T) {
	r := &vm{template: "doas -u {{ .User }} {{ .Command }}"}
	r.ctx.Data = map[string]any{"User": "root", "Command": "hidden by the real one"}
	got, err := r.commandLine([]string{"stat", "a b"})
	if err != nil {
		t.Fatal(err)
	}
	want := `doas -u root env LC_ALL=C PATH="$PATH:/usr/local/sbin:/usr/sbin:/sbin" stat 'a b'`
	if got != want {
		t.Errorf("got %s, want %s", got, want)
	}
}
