package docs

import (
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/selkies-project/packer-plugin-selkies/version"
)

// TestChangelog has the version that the source has at the top.
func TestChangelog(t *testing.T) {
	newest := regexp.MustCompile(`(?m)^## (\S+) \(.*\)$`).FindStringSubmatch(read(t, "CHANGELOG.md"))
	if newest == nil || newest[1] != version.Version {
		t.Errorf("the newest version is %q, want %s, version/version.go's", newest, version.Version)
	}
}

// released are the places of a version in the names of what a release has.
var released = []*regexp.Regexp{
	regexp.MustCompile(`selkies-image-injector:([\w.-]+)`),
	regexp.MustCompile(`(?m)^ +newTag: (\S+)$`),
	regexp.MustCompile(`(?:packer-plugin-selkies|selkies-image-injector)_v(\d+\.\d+\.\d+)`),
}

// TestVersions finds names of another version's injector image and files in documents and examples.
func TestVersions(t *testing.T) {
	texts := map[string]string{}
	for _, p := range pages(t) {
		texts[p.name] = p.text
	}
	for _, dir := range []string{"example", ".web-docs"} {
		err := fs.WalkDir(os.DirFS(".."), dir, func(name string, d fs.DirEntry, err error) error {
			if err == nil && d.Type().IsRegular() {
				texts[name] = read(t, name)
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	found := map[string]bool{}
	for name, text := range texts {
		for _, re := range released {
			for _, m := range re.FindAllStringSubmatch(text, -1) {
				found[re.String()] = true
				if m[1] != version.Version {
					t.Errorf("%s has %s, version/version.go has version %s", name, m[0], version.Version)
				}
			}
		}
	}
	if len(found) < len(released) {
		t.Errorf("found only names like %q", slices.Sorted(maps.Keys(found)))
	}
}

// TestReleaseCheck runs tools/release-check.sh on trees that are to be released and on those
// that are not.
func TestReleaseCheck(t *testing.T) {
	for _, tt := range []struct{ name, tag, version, changelog, want string }{
		{"dated", "v1.2.3", "1.2.3", "# Changelog\n\n## 1.2.3 (March 4, 2027)\n\n## 1.2.2 (March 1, 2027)\n", ""},
		{"pre-release", "v1.2.3-rc.1", "1.2.3", "## 1.2.3 (Unreleased)\n", ""},
		{"unreleased", "v1.2.3", "1.2.3", "## 1.2.3 (Unreleased)\n", `CHANGELOG.md begins with "## 1.2.3 (Unreleased)"`},
		{"former version's date", "v1.2.3", "1.2.3", "## 1.2.2 (March 4, 2027)\n", `CHANGELOG.md begins with "## 1.2.2 (March 4, 2027)"`},
		{"pre-release of another version", "v1.2.3-rc.1", "1.2.3", "## 1.2.2 (March 4, 2027)\n", "CHANGELOG.md begins with"},
		{"other tag", "v1.2.4", "1.2.3", "## 1.2.3 (March 4, 2027)\n", "tag v1.2.4 is not of version 1.2.3"},
		{"tag without v", "1.2.3", "1.2.3", "## 1.2.3 (March 4, 2027)\n", "tag 1.2.3 is not of version 1.2.3"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			for _, name := range []string{"tools/release-check.sh", "version/version.go"} {
				write(t, filepath.Join(dir, name), strings.ReplaceAll(read(t, name), `"`+version.Version+`"`, `"`+tt.version+`"`))
			}
			write(t, filepath.Join(dir, "CHANGELOG.md"), tt.changelog)
			out, err := exec.Command("sh", filepath.Join(dir, "tools/release-check.sh"), tt.tag).CombinedOutput()
			if (err != nil) != (tt.want != "") || !strings.HasPrefix(string(out), tt.want) {
				t.Errorf("it says %q, %v; want %q", out, err, tt.want)
			}
		})
	}
}

func write(t *testing.T, file, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(file), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}
