package docs

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/hclsimple"
)

// metadata is what Packer's registry of integrations reads beside the pages.
type metadata struct {
	Integration struct {
		Name        string   `hcl:"name"`
		Description string   `hcl:"description"`
		Identifier  string   `hcl:"identifier"`
		Flags       []string `hcl:"flags"`
		Docs        struct {
			ProcessDocs    bool   `hcl:"process_docs"`
			ReadmeLocation string `hcl:"readme_location"`
			ExternalURL    string `hcl:"external_url"`
		} `hcl:"docs,block"`
		License struct {
			Type string `hcl:"type"`
			URL  string `hcl:"url"`
		} `hcl:"license,block"`
		Components []struct {
			Type string `hcl:"type"`
			Name string `hcl:"name"`
			Slug string `hcl:"slug"`
		} `hcl:"component,block"`
	} `hcl:"integration,block"`
}

// registration is the call in main.go that registers a component, by the type that the
// registry of integrations gives it.
var registration = map[string]string{
	"data-source": "RegisterDatasource", "post-processor": "RegisterPostProcessor", "provisioner": "RegisterProvisioner",
}

// TestMetadata finds components that the plugin, its pages and the metadata do not all have.
func TestMetadata(t *testing.T) {
	const dir = "../.web-docs"
	var m metadata
	if err := hclsimple.DecodeFile(filepath.Join(dir, "metadata.hcl"), &hcl.EvalContext{}, &m); err != nil {
		t.Fatal(err)
	}
	main := read(t, "main.go")
	readme, err := os.ReadFile(filepath.Join(dir, m.Integration.Docs.ReadmeLocation))
	if err != nil {
		t.Error(err)
	}
	var listed []string
	for _, c := range m.Integration.Components {
		listed = append(listed, filepath.Join(c.Type, c.Slug))
		if call := registration[c.Type] + `("` + c.Slug + `", `; !strings.Contains(main, call) {
			t.Errorf("main.go does not have %s", call)
		}
		if page := "components/" + c.Type + "/" + c.Slug; !strings.Contains(string(readme), page) {
			t.Errorf(".web-docs/README.md does not lead to %s", page)
		}
	}
	slices.Sort(listed)
	pages, err := filepath.Glob(filepath.Join(dir, "components/*/*/README.md"))
	if err != nil {
		t.Fatal(err)
	}
	for i, p := range pages {
		if pages[i], err = filepath.Rel(filepath.Join(dir, "components"), filepath.Dir(p)); err != nil {
			t.Fatal(err)
		}
	}
	if !slices.Equal(pages, listed) {
		t.Errorf("there are pages of %q, and the metadata lists %q", pages, listed)
	}
	if n := strings.Count(main, "set.Register"); n != len(listed) {
		t.Errorf("main.go registers %d components, the metadata lists %d", n, len(listed))
	}
}
