package report_test

import (
	"testing"

	"github.com/opencontainers/go-digest"

	"github.com/selkies-project/packer-plugin-selkies/injector/report"
)

func TestShort(t *testing.T) {
	for d, want := range map[digest.Digest]string{
		"sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855": "e3b0c44298fc",
		"sha256:e3b0": "sha256:e3b0",
		"":            "",
	} {
		if got := report.Short(d); got != want {
			t.Errorf("Short(%q) = %q, want %q", d, got, want)
		}
	}
}
