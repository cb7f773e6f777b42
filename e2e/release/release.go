// Package release checks the files of a release as goreleaser leaves them, for all platforms at
// once: what packer init looks for, and what SECURITY.md promises.
package release

import (
	"archive/tar"
	"archive/zip"
	"bytes"
	"compress/gzip"
	"crypto/sha256"
	"debug/buildinfo"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
)

// Platforms are those of a release's plugin and of its injector, each as os/architecture.
type Platforms struct{ Plugin, Injector []string }

// All are the platforms of a release.
var All = Platforms{
	Plugin: []string{"darwin/amd64", "darwin/arm64", "freebsd/amd64", "freebsd/arm64",
		"linux/amd64", "linux/arm64", "windows/amd64", "windows/arm64"},
	Injector: []string{"linux/amd64", "linux/arm64"},
}

// Check returns what is wrong with the release in a directory, such as build/dist.
func Check(dist string, p Platforms) error {
	const suffix = "_SHA256SUMS"
	lists, err := filepath.Glob(filepath.Join(dist, "packer-plugin-selkies_v*"+suffix))
	if err != nil {
		return err
	}
	if len(lists) != 1 {
		return fmt.Errorf("%s has %d lists of checksums, %q", dist, len(lists), lists)
	}
	tag := strings.TrimSuffix(strings.TrimPrefix(filepath.Base(lists[0]), "packer-plugin-selkies_"), suffix)
	var errs []error
	image := "selkies-image-injector_" + tag + "_image.txt"
	want := map[string]bool{image: true}
	for _, platform := range p.Plugin {
		name := "packer-plugin-selkies_" + tag + "_x5.0_" + strings.ReplaceAll(platform, "/", "_")
		want[name+".zip"], want[name+".cdx.json"] = true, true
		binary := name
		if strings.HasPrefix(platform, "windows/") {
			binary += ".exe"
		}
		errs = append(errs, checkArchive(filepath.Join(dist, name+".zip"), platform, binary),
			checkSBOM(filepath.Join(dist, name+".cdx.json"), tag))
	}
	for _, platform := range p.Injector {
		name := "selkies-image-injector_" + tag + "_" + strings.ReplaceAll(platform, "/", "_")
		want[name+".tar.gz"], want[name+".cdx.json"] = true, true
		errs = append(errs, checkArchive(filepath.Join(dist, name+".tar.gz"), platform, "selkies-image-injector",
			"example/systemd/selkies-image-injector-containerd.service", "example/systemd/selkies-image-injector-docker.service"),
			checkSBOM(filepath.Join(dist, name+".cdx.json"), tag))
	}
	errs = append(errs, checkNames(dist, want), checkSums(dist, lists[0], want), checkImage(filepath.Join(dist, image), tag))
	return errors.Join(errs...)
}

// checkNames finds archives and lists of components beside those that should be there.
func checkNames(dist string, want map[string]bool) error {
	entries, err := os.ReadDir(dist)
	if err != nil {
		return err
	}
	shipped := regexp.MustCompile(`\.(zip|tar\.gz|cdx\.json)$`)
	var errs []error
	for _, e := range entries {
		if shipped.MatchString(e.Name()) && !want[e.Name()] {
			errs = append(errs, fmt.Errorf("%s does not belong to the release", e.Name()))
		}
	}
	return errors.Join(errs...)
}

// checkArchive finds the binary, for the platform, the licence and more in an archive, and
// nothing else.
func checkArchive(file, platform, binary string, more ...string) error {
	files, err := Archived(file)
	if err != nil {
		return err
	}
	name := filepath.Base(file)
	want := append([]string{"LICENSE", binary}, more...)
	slices.Sort(want)
	if got := slices.Sorted(maps.Keys(files)); !slices.Equal(got, want) {
		return fmt.Errorf("%s has %q, want %q", name, got, want)
	}
	for _, f := range want {
		if len(files[f].Data) == 0 {
			return fmt.Errorf("%s: %s is empty", name, f)
		}
	}
	if files[binary].Mode&0o111 == 0 {
		return fmt.Errorf("%s: %s is not executable", name, binary)
	}
	info, err := buildinfo.Read(bytes.NewReader(files[binary].Data))
	if err != nil {
		return fmt.Errorf("%s: reading %s: %w", name, binary, err)
	}
	settings := map[string]string{}
	for _, s := range info.Settings {
		settings[s.Key] = s.Value
	}
	if is := settings["GOOS"] + "/" + settings["GOARCH"]; is != platform {
		return fmt.Errorf("%s: %s is for %s", name, binary, is)
	}
	return nil
}

// checkSBOM finds the components of a binary in the list of them.
func checkSBOM(file, tag string) error {
	data, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	var bom struct {
		Metadata   struct{ Component struct{ Version string } }
		Components []any
	}
	if err := json.Unmarshal(data, &bom); err != nil {
		return fmt.Errorf("%s: %w", file, err)
	}
	if v := bom.Metadata.Component.Version; v != tag || len(bom.Components) < 20 {
		return fmt.Errorf("%s is of version %q and has %d components", filepath.Base(file), v, len(bom.Components))
	}
	return nil
}

// checkSums compares the list of checksums with the files that should be in it.
func checkSums(dist, list string, want map[string]bool) error {
	data, err := os.ReadFile(list)
	if err != nil {
		return err
	}
	var errs []error
	listed := map[string]bool{}
	for line := range strings.Lines(string(data)) {
		sum, name, ok := strings.Cut(strings.TrimSuffix(line, "\n"), "  ")
		if !ok || listed[name] || !want[name] {
			errs = append(errs, fmt.Errorf("%s has %q", filepath.Base(list), line))
			continue
		}
		listed[name] = true
		contents, err := os.ReadFile(filepath.Join(dist, name))
		if is := sha256.Sum256(contents); err == nil && hex.EncodeToString(is[:]) != sum {
			err = fmt.Errorf("%s has another checksum than %s says", name, filepath.Base(list))
		}
		errs = append(errs, err)
	}
	for _, name := range slices.Sorted(maps.Keys(want)) {
		if !listed[name] {
			errs = append(errs, fmt.Errorf("%s does not have %s", filepath.Base(list), name))
		}
	}
	return errors.Join(errs...)
}

// checkImage finds the container image's reference: tags of images have no v.
func checkImage(file, tag string) error {
	data, err := os.ReadFile(file)
	if err != nil {
		return err
	}
	want := regexp.MustCompile(`^ghcr\.io/selkies-project/selkies-image-injector:` +
		regexp.QuoteMeta(strings.TrimPrefix(tag, "v")) + `@sha256:[0-9a-f]{64}\n$`)
	if !want.Match(data) {
		return fmt.Errorf("%s has %q", filepath.Base(file), data)
	}
	return nil
}

// File is a file of an archive.
type File struct {
	Data []byte
	Mode os.FileMode
}

// Archived are the files in a .zip or .tar.gz by their names, without directories.
func Archived(file string) (map[string]File, error) {
	if strings.HasSuffix(file, ".zip") {
		return zipped(file)
	}
	f, err := os.Open(file)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	r, err := gzip.NewReader(f)
	if err != nil {
		return nil, fmt.Errorf("reading %s: %w", file, err)
	}
	return Untar(r)
}

func zipped(file string) (map[string]File, error) {
	r, err := zip.OpenReader(file)
	if err != nil {
		return nil, err
	}
	defer r.Close()
	files := map[string]File{}
	for _, f := range r.File {
		if f.Mode().IsDir() {
			continue
		}
		in, err := f.Open()
		if err != nil {
			return nil, fmt.Errorf("reading %s: %w", file, err)
		}
		data, err := io.ReadAll(in)
		if err != nil {
			return nil, fmt.Errorf("reading %s: %w", file, err)
		}
		files[f.Name] = File{data, f.Mode()}
	}
	return files, nil
}

// Untar are the files in a tar archive by their names, without directories.
func Untar(in io.Reader) (map[string]File, error) {
	files := map[string]File{}
	r := tar.NewReader(in)
	for {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return files, nil
		}
		if err != nil {
			return nil, err
		}
		if h.Typeflag == tar.TypeDir {
			continue
		}
		data, err := io.ReadAll(r)
		if err != nil {
			return nil, err
		}
		files[h.Name] = File{data, h.FileInfo().Mode()}
	}
}
