package docs

import (
	"maps"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"testing"
)

// TestActions compares the owners of the workflows' actions with those that SECURITY.md names, and
// finds actions that are not pinned by a commit. Workflows of this repository need none.
func TestActions(t *testing.T) {
	workflows, err := filepath.Glob("../.github/workflows/*.yml")
	if err != nil || len(workflows) == 0 {
		t.Fatalf("found %v, %v", workflows, err)
	}
	used := map[string]bool{}
	for _, name := range workflows {
		data, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		for _, m := range regexp.MustCompile(`(?m)^[\s-]*uses:\s*([^\s.]\S*)`).FindAllStringSubmatch(string(data), -1) {
			action := regexp.MustCompile(`^([\w.-]+)/[\w./-]+@[0-9a-f]{40}$`).FindStringSubmatch(m[1])
			if action == nil {
				t.Errorf("%s: %s is not pinned by a commit", name, m[1])
				continue
			}
			used[action[1]] = true
		}
	}
	paragraph := regexp.MustCompile(`(?s)\nThe workflows use .*?\n\n`).FindString(read(t, "SECURITY.md"))
	named := map[string]bool{}
	for _, m := range regexp.MustCompile("`([\\w.-]+)/").FindAllStringSubmatch(paragraph, -1) {
		named[m[1]] = true
	}
	if !maps.Equal(used, named) {
		t.Errorf("the workflows use actions of %v, SECURITY.md names %v",
			slices.Sorted(maps.Keys(used)), slices.Sorted(maps.Keys(named)))
	}
}
