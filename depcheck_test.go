package main

import (
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// TestDependencies guards the dependency graph: the injector runs on every node
// and carries no Packer, the layer manifest, the report of it and the access trace carry
// neither half.
func TestDependencies(t *testing.T) {
	const self = "github.com/selkies-project/packer-plugin-selkies"
	for pkg, forbidden := range map[string][]string{
		self + "/manifest": {
			"github.com/hashicorp/",
			"github.com/containerd/",
			"github.com/docker/docker",
			"github.com/google/go-containerregistry",
			self + "/htmlreport",
		},
		self + "/htmlreport": {
			"github.com/hashicorp/",
			"github.com/containerd/",
			"github.com/docker/docker",
			self + "/injector",
			self + "/provisioner",
		},
		self + "/trace": {
			"github.com/hashicorp/",
			"github.com/containerd/",
			"github.com/docker/docker",
			"github.com/google/go-containerregistry",
		},
		self + "/injector": {
			"github.com/hashicorp/",
			"github.com/google/go-containerregistry",
			// With it the linker keeps every method of the program: a third more.
			"html/template",
			self + "/provisioner",
		},
		self: {
			"github.com/containerd/containerd/",
			self + "/injector",
		},
	} {
		out, err := exec.Command("go", "list", "-deps", "-tags=grpcnotrace", pkg).CombinedOutput()
		if err != nil {
			t.Fatalf("listing what %s imports: %v\n%s", pkg, err, out)
		}
		for _, dep := range strings.Fields(string(out)) {
			for _, f := range forbidden {
				if strings.HasPrefix(dep, f) {
					t.Errorf("%s imports %s", pkg, dep)
				}
			}
		}
	}
}

// TestReasons wants a reason beside each direct dependency in go.mod.
func TestReasons(t *testing.T) {
	data, err := os.ReadFile("go.mod")
	if err != nil {
		t.Fatal(err)
	}
	direct := 0
	for _, m := range regexp.MustCompile(`(?m)^(?:require |\t)(\S+ v\S+)(.*)$`).FindAllStringSubmatch(string(data), -1) {
		comment := strings.TrimSpace(m[2])
		if comment == "// indirect" {
			continue
		}
		direct++
		if len(strings.TrimPrefix(comment, "// ")) < 5 {
			t.Errorf("go.mod does not say what %s is for", m[1])
		}
	}
	if direct < 20 {
		t.Errorf("found %d direct dependencies", direct)
	}
}

// TestActions wants GitHub's own actions in the workflows, each by its commit: tags move. One
// is HashiCorp's, without versions, in a job that may read the repository and no more. Workflows of
// this repository are part of the commit. SECURITY.md names the owners.
func TestActions(t *testing.T) {
	files, err := filepath.Glob(".github/workflows/*.yml")
	if err != nil || len(files) == 0 {
		t.Fatalf("found %v, %v", files, err)
	}
	pinned := regexp.MustCompile(`^(actions/[a-z-]+@[0-9a-f]{40} # v\d|hashicorp/integration-release-action@[0-9a-f]{40}\n|\./\.github/workflows/)`)
	used := map[string]bool{}
	for _, name := range files {
		data, err := os.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		for line := range strings.Lines(string(data)) {
			_, action, ok := strings.Cut(line, "uses: ")
			if !ok {
				continue
			}
			if !pinned.MatchString(action) {
				t.Errorf("%s: %s is not one of actions/ by its commit", name, strings.TrimSpace(action))
			}
			if owner, _, _ := strings.Cut(action, "/"); owner != "." {
				used[owner] = true
			}
		}
	}
	security, err := os.ReadFile("SECURITY.md")
	if err != nil {
		t.Fatal(err)
	}
	named := map[string]bool{}
	paragraph := regexp.MustCompile(`(?s)\nThe workflows use .*?\n\n`).FindString(string(security))
	for _, m := range regexp.MustCompile("`([\\w.-]+)/").FindAllStringSubmatch(paragraph, -1) {
		named[m[1]] = true
	}
	if !maps.Equal(used, named) {
		t.Errorf("the workflows use actions of %v, SECURITY.md names %v", used, named)
	}
}
