package docs

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/hashicorp/hcl/v2"
	"github.com/hashicorp/hcl/v2/hcldec"
	"github.com/hashicorp/hcl/v2/hclsyntax"

	"github.com/selkies-project/packer-plugin-selkies/datasource/apps"
	datasource "github.com/selkies-project/packer-plugin-selkies/datasource/imagecache"
	postprocessor "github.com/selkies-project/packer-plugin-selkies/post-processor/imagecache"
	provisioner "github.com/selkies-project/packer-plugin-selkies/provisioner/imagecache"
)

// components are those of the plugin: their pages, the blocks of a template that configure
// them, and what they take there.
var components = []struct {
	page, block, name string
	spec              hcldec.ObjectSpec
}{
	{"provisioner/image-cache", "provisioner", "selkies-image-cache", new(provisioner.Provisioner).ConfigSpec()},
	{"post-processor/image-cache", "post-processor", "selkies-image-cache", new(postprocessor.PostProcessor).ConfigSpec()},
	{"data-source/image-cache", "data", "selkies-image-cache", new(datasource.Datasource).ConfigSpec()},
	{"data-source/apps", "data", "selkies-apps", new(apps.Datasource).ConfigSpec()},
}

var (
	described = regexp.MustCompile("(?m)^- `(\\w+)` \\(.*?\\) - ((?:.+\n)+)")
	told      = regexp.MustCompile(`Defaults to|[Bb]y default|[Rr]equired`)
	hclFence  = regexp.MustCompile("(?ms)^```hcl\n(.*?)^```$")
)

// TestOptions finds options that their page does not describe, that do not say what holds
// without them, or that no example of the page sets; and examples that set what there is not.
func TestOptions(t *testing.T) {
	for _, c := range components {
		t.Run(c.page, func(t *testing.T) {
			data, err := os.ReadFile(filepath.Join("../.web-docs/components", c.page, "README.md"))
			if err != nil {
				t.Fatal(err)
			}
			reference, _, _ := strings.Cut(string(data), "\n## Output\n")
			texts := map[string]string{} // by name, and block.name
			block, required := "", false
			for part := range strings.SplitSeq(reference, "\n#") {
				heading, _, _ := strings.Cut(part, "\n")
				if m := regexp.MustCompile("^## The `(.*)` block$").FindStringSubmatch(heading); m != nil {
					block = m[1] + "."
				} else if !strings.HasPrefix(heading, "###") {
					block = ""
				}
				required = strings.HasSuffix(heading, "# Required")
				for _, m := range described.FindAllStringSubmatch(part, -1) {
					text := strings.Join(strings.Fields(m[2]), " ")
					texts[block+m[1]] = text
					if !required && !told.MatchString(text) {
						t.Errorf("%s%s: the page does not say what it defaults to: %s", block, m[1], text)
					}
				}
			}
			all := names(c.spec)
			set := map[string]bool{}
			for i, m := range hclFence.FindAllStringSubmatch(string(data), -1) {
				f, diags := hclsyntax.ParseConfig([]byte(m[1]), c.page, hcl.InitialPos)
				if diags.HasErrors() {
					t.Errorf("example %d: %v", i+1, diags)
					continue
				}
				for _, name := range configured(f.Body.(*hclsyntax.Body), c.block, c.name) {
					if !slices.Contains(all, name) {
						t.Errorf("example %d sets %s, which there is not", i+1, name)
					}
					set[name] = true
				}
			}
			for _, name := range all {
				if texts[name] == "" {
					t.Errorf("%s: the page does not describe it", name)
				}
				if !set[name] {
					t.Errorf("%s: no example of the page has it", name)
				}
				delete(texts, name)
			}
			for name := range texts {
				t.Errorf("%s: the page describes it, and the component does not have it", name)
			}
		})
	}
}

// names are the options of a component, those of a block as block.name, without those that
// Packer sets itself.
func names(spec hcldec.ObjectSpec) []string {
	var all []string
	for name, s := range spec {
		if strings.HasPrefix(name, "packer_") {
			continue
		}
		all = append(all, name)
		var nested hcldec.Spec
		switch s := s.(type) {
		case *hcldec.BlockSpec:
			nested = s.Nested
		case *hcldec.BlockListSpec:
			nested = s.Nested
		}
		if nested, ok := nested.(hcldec.ObjectSpec); ok {
			for _, inner := range names(nested) {
				all = append(all, name+"."+inner)
			}
		}
	}
	slices.Sort(all)
	return all
}

// configured are the options that an example sets: in blocks of the component, or, where it is
// a piece of one, at its top.
func configured(body *hclsyntax.Body, block, name string) []string {
	var all []string
	whole := false
	var find func(*hclsyntax.Body)
	find = func(b *hclsyntax.Body) {
		for _, inner := range b.Blocks {
			if slices.Contains(templateBlocks, inner.Type) {
				whole = true
			}
			if inner.Type == block && len(inner.Labels) > 0 && inner.Labels[0] == name {
				all = append(all, options(inner.Body)...)
			} else {
				find(inner.Body)
			}
		}
	}
	find(body)
	if !whole {
		all = options(body)
	}
	return all
}

// templateBlocks are those that a template is made of.
var templateBlocks = []string{"build", "data", "locals", "packer", "post-processor", "provisioner", "source", "variable"}

func options(body *hclsyntax.Body) []string {
	var all []string
	for name := range body.Attributes {
		all = append(all, name)
	}
	for _, b := range body.Blocks {
		all = append(all, b.Type)
		for _, inner := range options(b.Body) {
			all = append(all, b.Type+"."+inner)
		}
	}
	return all
}
