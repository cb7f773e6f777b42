package main

import (
	"bytes"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	fixture "github.com/selkies-project/packer-plugin-selkies/e2e/report"
	"github.com/selkies-project/packer-plugin-selkies/manifest"
)

// TestReport draws a disk, a layer manifest alone, and one next to another.
func TestReport(t *testing.T) {
	dir := t.TempDir()
	m := fixture.Cache(3, 2)
	errs := []error{writeManifest(m, filepath.Join(dir, manifest.Path))}
	for _, l := range m.Layers {
		errs = append(errs, os.MkdirAll(filepath.Join(dir, m.LayerPath(l)), 0o755))
	}
	last := filepath.Join(dir, "last.json")
	errs = append(errs, writeManifest(fixture.Cache(3, 1), last))
	if err := errors.Join(errs...); err != nil {
		t.Fatal(err)
	}
	const noDisk, noSince, noPulls = "does not tell how large its disk is", "No other generation was given", "does not tell how long each image took"
	for _, tt := range []struct {
		name          string
		args          []string
		want, without []string
	}{
		{"disk", []string{"--cache", dir}, []string{"own, blobs, file system", noSince, noPulls}, []string{noDisk}},
		{"since", []string{"--cache", dir, "--since", last}, []string{"1 has been updated"}, []string{noSince}},
		{"manifest", []string{filepath.Join(dir, manifest.Path)}, []string{noDisk, noSince, noPulls}, nil},
	} {
		t.Run(tt.name, func(t *testing.T) {
			file := filepath.Join(t.TempDir(), "cache.html")
			said := runReport(t, append(tt.args, "--html", file)...)
			if !strings.Contains(said, "3 images with 23 layers") {
				t.Errorf("says %q", said)
			}
			page, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			// A sentence may go on in the next line.
			text := strings.Join(strings.Fields(string(page)), " ")
			for _, w := range tt.want {
				if !strings.Contains(text, w) {
					t.Errorf("the page lacks %q", w)
				}
			}
			for _, w := range tt.without {
				if strings.Contains(text, w) {
					t.Errorf("the page has %q", w)
				}
			}
			if out := runReport(t, append(tt.args, "--html", "-")...); !strings.HasPrefix(out, "<!DOCTYPE html>") || !strings.HasSuffix(out, "</html>\n") {
				t.Errorf("standard output has %.100q", out)
			}
		})
	}
}

func writeManifest(m *manifest.Manifest, name string) error {
	data, err := m.Encode()
	if err != nil {
		return err
	}
	return errors.Join(os.MkdirAll(filepath.Dir(name), 0o755), os.WriteFile(name, data, 0o644))
}

func runReport(t *testing.T, args ...string) string {
	t.Helper()
	var out bytes.Buffer
	cmd := newCommand()
	cmd.SetOut(&out)
	cmd.SetArgs(append([]string{"report"}, args...))
	if err := cmd.Execute(); err != nil {
		t.Fatal(err)
	}
	return out.String()
}
