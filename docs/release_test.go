package docs

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
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
