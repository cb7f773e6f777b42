package release

import (
	"archive/tar"
	"archive/zip"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
)

var (
	here   = runtime.GOOS + "/" + runtime.GOARCH
	plugin = "packer-plugin-selkies_v1.2.3_x5.0_" + strings.ReplaceAll(here, "/", "_")
	image  = "selkies-image-injector_v1.2.3_image.txt"
	sums   = "packer-plugin-selkies_v1.2.3_SHA256SUMS"
)

// TestCheck checks a release of a plugin, which is this test's program, and releases with something
// wrong.
func TestCheck(t *testing.T) {
	binary := plugin
	if runtime.GOOS == "windows" {
		binary += ".exe"
	}
	_, err := os.Open(filepath.Join(t.TempDir(), "absent"))
	absent := errors.Unwrap(err).Error() // in the words of this system
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	data, err := os.ReadFile(self)
	if err != nil {
		t.Fatal(err)
	}
	program, licence := File{data, 0o755}, File{[]byte("MPL"), 0o644}
	sbom := []byte(`{"metadata": {"component": {"version": "v1.2.3"}}, "components": [` + strings.Repeat("{},", 19) + "{}]}")
	reference := []byte("ghcr.io/selkies-project/selkies-image-injector:1.2.3@sha256:" + strings.Repeat("0", 64) + "\n")
	pluginOf := func(files map[string]File) map[string][]byte {
		return map[string][]byte{plugin + ".zip": zipOf(t, files)}
	}
	ofPlugin := Platforms{Plugin: []string{here}}
	whole := map[string][]byte{
		plugin + ".zip":      zipOf(t, map[string]File{binary: program, "LICENSE": licence}),
		plugin + ".cdx.json": sbom,
		image:                reference,
	}
	const windows = "packer-plugin-selkies_v1.2.3_x5.0_windows_386"
	injector := "selkies-image-injector_v1.2.3_" + strings.ReplaceAll(here, "/", "_")

	for _, tt := range []struct {
		name      string
		platforms Platforms
		change    map[string][]byte // files in place of those of whole, nil for none
		want      string            // in the error, empty for none
	}{
		{"whole", ofPlugin, nil, ""},
		{"no archive", ofPlugin, map[string][]byte{plugin + ".zip": nil}, plugin + ".zip: " + absent},
		{"no SBOM", ofPlugin, map[string][]byte{plugin + ".cdx.json": nil}, plugin + ".cdx.json: " + absent},
		{"other SBOM", ofPlugin, map[string][]byte{plugin + ".cdx.json": []byte("{}")}, `is of version "" and has 0 components`},
		{"no image", ofPlugin, map[string][]byte{image: nil}, image + ": " + absent},
		{"tag with v", ofPlugin, map[string][]byte{image: bytes.Replace(reference, []byte(":1.2.3"), []byte(":v1.2.3"), 1)}, image + " has "},
		{"one platform more", ofPlugin, map[string][]byte{windows + ".zip": {0}}, windows + ".zip does not belong to the release"},
		{"no licence", ofPlugin, pluginOf(map[string]File{binary: program}), `want ["LICENSE" "` + plugin},
		{"more files", ofPlugin, pluginOf(map[string]File{binary: program, "LICENSE": licence, "README.md": licence}), `has ["LICENSE" "README.md" "`},
		{"not executable", ofPlugin, pluginOf(map[string]File{binary: {data, 0o644}, "LICENSE": licence}), "is not executable"},
		{"no Go program", ofPlugin, pluginOf(map[string]File{binary: {[]byte("#!/bin/sh"), 0o755}, "LICENSE": licence}), "unrecognized file format"},
		{"other platform", Platforms{Plugin: []string{"windows/386"}}, map[string][]byte{
			windows + ".zip": zipOf(t, map[string]File{windows + ".exe": program, "LICENSE": licence}), windows + ".cdx.json": sbom,
		}, windows + ".exe is for " + here},
		{"injector without units", Platforms{Injector: []string{here}}, map[string][]byte{
			injector + ".tar.gz": tarOf(t, map[string]File{"selkies-image-injector": program, "LICENSE": licence}), injector + ".cdx.json": sbom,
		}, `want ["LICENSE" "example/systemd/`},
		{"not listed", ofPlugin, map[string][]byte{sums: checksums(map[string][]byte{image: reference})}, sums + " does not have " + plugin + ".zip"},
		{"other checksum", ofPlugin, map[string][]byte{sums: checksums(map[string][]byte{image: nil})}, image + " has another checksum"},
		{"listed twice", ofPlugin, map[string][]byte{sums: append(checksums(whole), checksums(whole)...)}, sums + " has \""},
	} {
		t.Run(tt.name, func(t *testing.T) {
			files := maps.Clone(whole)
			maps.Copy(files, tt.change)
			maps.DeleteFunc(files, func(_ string, data []byte) bool { return data == nil })
			if files[sums] == nil {
				files[sums] = checksums(files)
			}
			dist := t.TempDir()
			for name, data := range files {
				if err := os.WriteFile(filepath.Join(dist, name), data, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			err := Check(dist, tt.platforms)
			if tt.want == "" && err != nil || tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)) {
				t.Errorf("error is %v, want one with %q", err, tt.want)
			}
		})
	}
}

func checksums(files map[string][]byte) []byte {
	var list []byte
	for name, data := range files {
		list = fmt.Appendf(list, "%x  %s\n", sha256.Sum256(data), name)
	}
	return list
}

func zipOf(t *testing.T, files map[string]File) []byte {
	t.Helper()
	var out bytes.Buffer
	w := zip.NewWriter(&out)
	for name, f := range files {
		h := &zip.FileHeader{Name: name}
		h.SetMode(f.Mode)
		in, err := w.CreateHeader(h)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := in.Write(f.Data); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}

func tarOf(t *testing.T, files map[string]File) []byte {
	t.Helper()
	var out bytes.Buffer
	gz := gzip.NewWriter(&out)
	w := tar.NewWriter(gz)
	for name, f := range files {
		if err := w.WriteHeader(&tar.Header{Name: name, Mode: int64(f.Mode), Size: int64(len(f.Data))}); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(f.Data); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	if err := gz.Close(); err != nil {
		t.Fatal(err)
	}
	return out.Bytes()
}
