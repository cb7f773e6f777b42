// Package docs has no code. Its tests keep the documents honest: what they link to is
// there, and what they tell readers to type is run by a test, or marked.
package docs

import (
	"html"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
)

// marks are what the first line of a block says, or a command's own, when no test runs it.
var marks = []string{"# needs Google Cloud", "not in make test: "}

// commands are those that tests run, by how they begin: a file that runs them, or the
// same by other means, and a text in it that shows it.
var commands = []struct{ begin, file, text string }{
	{"make test", ".ci/run", "exec make test"},
	{"make test-unit", "GNUmakefile", "\ntest-unit:"},
	{"make test-faults", "e2e/faults/main_test.go", "flag.Int(\"faults\""}, // fewer
	{"make test-flips", "e2e/hostile/flip_test.go", "func TestFlips("},     // fewer
	{"make demo", "e2e/walk/walk_test.go", `"make demo"`},
	{"make walk", "GNUmakefile", "\nwalk: "},
	{"apt-get update && apt-get install -y git make", "e2e/walk/walk_test.go", `"../../README.md"`},
	{"git clone https://github.com/selkies-project/packer-plugin-selkies", "e2e/walk/walk_test.go", `"../../README.md"`},
	{"cd packer-plugin-selkies", "e2e/walk/walk_test.go", `"../../README.md"`},
	{"make e2e-setup", "GNUmakefile", "\ntest: e2e-setup "},
	{"make generate", "GNUmakefile", " generate-check "},
	{"make lint", "GNUmakefile", " lint "},
	{"packer plugins install --path build/packer-plugin-selkies github.com/selkies-project/selkies", "e2e/packer/packer.go", `"plugins", "install", "--path", `},
	{"make dev", "e2e/supply/supply_test.go", `"make", "-s", "dev"`},
	{"make injector", "tools/reproducible.sh", "make -s build injector"}, // by e2e/supply
	{"make release-check", "docs/release_test.go", "tools/release-check.sh"},
	{"make injector-image", "e2e/cluster/image_test.go", `"run", "./injector/image"`},
	{"make reproducible", "e2e/supply/supply_test.go", "tools/reproducible.sh"},
	{"gpg --verify packer-plugin-selkies_v", "e2e/provisioner/release_test.go", `"gpg --verify "`},
	{"sha256sum --check --ignore-missing packer-plugin-selkies_v", "e2e/provisioner/release_test.go", `"sha256sum --check "`},
	{"cat selkies-image-injector_v", "e2e/provisioner/release_test.go", `"cat selkies-image-injector_"`},
	{"make sbom", "e2e/supply/supply_test.go", `"sbom"`},
	{"go test -tags e2e -run '^$' -bench Idle ./e2e/cluster/", "e2e/cluster/idle_test.go", "func BenchmarkIdle("},
	{"go test -tags e2e -run '^$' -bench PodStart -benchtime 20x ./e2e/cluster/", "e2e/cluster/podstart_test.go", "func BenchmarkPodStart("},
	{"mount -o ro,noload LABEL=selkies-cache /mnt/disks/images", "e2e/machine/machine_test.go", "mount -o ro,noload"},
	{"selkies-image-injector inject --cache", "e2e/systemd/boot_test.go", "selkies-image-injector"},
	{"selkies-image-injector verify --cache", "e2e/docker/inject_test.go", `"verify"`},
	{"selkies-image-injector report --html", "e2e/report/report_test.go", `"report", "--html"`},
	{"NODE=name-of-the-node", "e2e/cluster/agent_test.go", `documented(t, page, "NODE=name-of-the-node", `},
	{"agent=$(kubectl get pods -n selkies-image-cache -o name -l app.kubernetes.io/name=selkies-image-injector", "e2e/cluster/agent_test.go", `documented(t, page, "NODE=name-of-the-node", `},
	{"kubectl exec -n selkies-image-cache $agent -- selkies-image-injector eject", "e2e/cluster/repull_test.go", `"    kubectl exec -n selkies-image-cache $agent -- selkies-image-injector eject"`},
	{"kubectl exec -n selkies-image-cache $agent -- selkies-image-injector", "e2e/cluster/agent_test.go", `documented(t, page, "NODE=name-of-the-node", `},
	{"cp -r example/kustomize image-cache", "e2e/cluster/privileges_test.go", `documented(t, "docs/clusters.md", "cp -r example/kustomize image-cache"`},
	{"kubectl describe node NODE", "e2e/cluster/agent_test.go", `documented(t, "docs/operations.md", "kubectl describe node NODE"`},
	{"kubectl get events -n default --field-selector involvedObject.kind=Node", "e2e/cluster/agent_test.go", `documented(t, "docs/operations.md", "kubectl describe node NODE"`},
	{"kubectl get nodes -L", "e2e/cluster/agent_test.go", `"kubectl get nodes -L `},
	{"kubectl logs -n selkies-image-cache", "e2e/cluster/agent_test.go", `"kubectl logs -n selkies-image-cache `},
	{"kubectl taint node NODE", "e2e/cluster/gate_test.go", `documented(t, "docs/troubleshooting.md", "kubectl taint node NODE `},
	{"kubectl apply -k image-cache/", "e2e/cluster/privileges_test.go", `"-k", filepath.Join(dir, variant)`},
	{"sed 's/^/  /' example/prometheus/rules.yaml | cat", "docs/prometheus_test.go", "func TestRulesInObjects("},
	{"kubectl apply -k example/gke", "e2e/pipeline/cronjob_test.go", `"apply", "-k", dir`},
	{"kubectl create namespace pod-broker-system", "e2e/pipeline/cronjob_test.go", `"kubectl create namespace " + namespace`},
	{"kubectl get jobs -n pod-broker-system", "e2e/pipeline/cronjob_test.go", `"kubectl get jobs -n pod-broker-system"`},
	{"kubectl patch cronjob update-image-cache -n pod-broker-system", "e2e/pipeline/cronjob_test.go", "kubectl patch cronjob update-image-cache"},
	{"kubectl create job --from=cronjob/update-image-cache", "e2e/pipeline/cronjob_test.go", "documented(t, tt.command)"},
	{"install build/selkies-image-injector /usr/local/bin/", "e2e/systemd/boot_test.go", "/usr/local/bin/selkies-image-injector"},
	{"mkdir -p /mnt/disks/images", "e2e/machine/machine_test.go", "mkdir /mnt/cache; mount -o ro,noload"},
	{"cp example/systemd/selkies-image-injector-docker.service", "e2e/systemd/boot_test.go", "example/systemd"},
	{"systemctl enable selkies-image-injector-docker.service", "e2e/systemd/boot_test.go", `"systemctl", "-q", "enable", unit`},
}

// notCommands are blocks that are something else, by how they begin.
var notCommands = []string{
	"registry.example.com/desktop:1.4: ", "docker.io/library/golang:1.26-bookworm: ", // the agent's log
	"/mnt/disks/images: cache 8b5024e61953",                     // inject's output
	"the disk has room for ",                                    // the provisioner's error
	"packer build   ", "BUILD (packer build)", "│", "└", "┌───", // pictures
}

// TestCommands finds commands in the documents that no test runs and that do not say so.
func TestCommands(t *testing.T) {
	for _, c := range commands {
		if data, err := os.ReadFile(filepath.Join("..", c.file)); err != nil {
			t.Errorf("%s: %v", c.begin, err)
		} else if !strings.Contains(string(data), c.text) {
			t.Errorf("%s: %s does not have %s", c.begin, c.file, c.text)
		}
	}
	for _, p := range pages(t) {
		for _, b := range p.blocks {
			if begins(b[0], notCommands) || strings.HasPrefix(b[0], "#") && marked(b[0]) {
				continue
			}
			for _, c := range joined(b) {
				if !marked(c) && !slices.ContainsFunc(commands, func(known struct{ begin, file, text string }) bool {
					return begins(c, []string{known.begin})
				}) {
					t.Errorf("%s: does a test run this?\n\t%s\nName it in the table of this test, or write %q above", p.name, c, marks[0])
				}
			}
		}
	}
}

func marked(line string) bool {
	return slices.ContainsFunc(marks, func(mark string) bool { return strings.Contains(line, mark) })
}

// begins reports whether a line begins with one of the texts, a command of make with the
// whole of its target.
func begins(line string, with []string) bool {
	return slices.ContainsFunc(with, func(w string) bool {
		rest, ok := strings.CutPrefix(line, w)
		return ok && (!strings.HasPrefix(w, "make ") || rest == "" || rest[0] == ' ')
	})
}

// joined are the commands of a block, each on one line.
func joined(block []string) []string {
	var all []string
	more := false
	for _, line := range block {
		if strings.HasPrefix(line, "#") {
			continue
		}
		if more {
			all[len(all)-1] += " " + line
		} else {
			all = append(all, line)
		}
		more = strings.HasSuffix(line, `\`) || strings.HasSuffix(line, "|")
	}
	return all
}

// links are Markdown's, without pictures' exclamation marks.
var links = regexp.MustCompile(`\]\(([^)\s]+)\)`)

// TestLinks follows the links between documents, and finds those that none leads to.
func TestLinks(t *testing.T) {
	linked := map[string]bool{"README.md": true, "CONTRIBUTING.md": true}
	for _, p := range pages(t) {
		for _, m := range links.FindAllStringSubmatch(p.text, -1) {
			if strings.Contains(m[1], "://") {
				continue
			}
			file, anchor, _ := strings.Cut(m[1], "#")
			if path.Ext(file) == ".mdx" {
				t.Errorf("%s links to %s, which has no options: link to its page in .web-docs", p.name, m[1])
			}
			target := p.name
			if file != "" {
				target = path.Join(path.Dir(p.name), file)
				linked[target] = true
			}
			data, err := os.ReadFile(filepath.Join("..", target))
			if err != nil {
				if _, err := os.Stat(filepath.Join("..", target)); err != nil || anchor != "" {
					t.Errorf("%s links to %s: %v", p.name, m[1], err)
				}
				continue
			}
			if anchor != "" && !slices.Contains(anchors(string(data)), anchor) {
				t.Errorf("%s links to %s, which has no such heading", p.name, m[1])
			}
		}
	}
	for _, p := range pages(t) {
		if !linked[p.name] && path.Ext(p.name) != ".mdx" {
			t.Errorf("no document links to %s", p.name)
		}
	}
}

var (
	headings = regexp.MustCompile(`(?m)^#+ (.*)$`)
	dropped  = regexp.MustCompile(`[^\p{L}\p{N}\- _]`)
)

// anchors are those that GitHub gives to headings.
func anchors(text string) []string {
	var all []string
	for _, h := range headings.FindAllStringSubmatch(text, -1) {
		all = append(all, strings.ReplaceAll(dropped.ReplaceAllString(strings.ToLower(h[1]), ""), " ", "-"))
	}
	return all
}

// TestDiagram finds a diagram that was not drawn again.
func TestDiagram(t *testing.T) {
	source, err := os.ReadFile("architecture.dot")
	if err != nil {
		t.Fatal(err)
	}
	drawn, err := os.ReadFile("architecture.svg")
	if err != nil {
		t.Fatal(err)
	}
	for _, m := range regexp.MustCompile(`label="([^"]*)"`).FindAllStringSubmatch(string(source), -1) {
		for text := range strings.SplitSeq(strings.ReplaceAll(m[1], `\l`, `\n`), `\n`) {
			if text = strings.TrimSpace(text); !strings.Contains(html.UnescapeString(string(drawn)), text) {
				t.Errorf("architecture.svg lacks %q; run make docs/architecture.svg", text)
			}
		}
	}
	for _, m := range regexp.MustCompile(`(?m)^ *(\w+ -> \w+)(.*)$`).FindAllStringSubmatch(string(source), -1) {
		title := "<title>" + strings.ReplaceAll(m[1], " ", "") + "</title>"
		if !strings.Contains(m[2], "style=invis") && !strings.Contains(html.UnescapeString(string(drawn)), title) {
			t.Errorf("architecture.svg lacks %s; run make docs/architecture.svg", m[1])
		}
	}
}

// page is a document of the repository.
type page struct {
	name   string // in the repository
	text   string
	blocks [][]string // of commands, without blank lines
}

// pages are the documents of the repository. The blocks of the command line's reference,
// which is generated, say how commands are written.
func pages(t *testing.T) []page {
	t.Helper()
	names, err := filepath.Glob("*.md")
	if err != nil || len(names) < 5 {
		t.Fatalf("found %v, %v", names, err)
	}
	// Sources of .web-docs.
	more, err := filepath.Glob("*/*.mdx")
	if err != nil || len(more) < 4 {
		t.Fatalf("found %v, %v", more, err)
	}
	names = append(names, more...)
	for i, n := range names {
		names[i] = path.Join("docs", n)
	}
	var all []page
	for _, n := range append(names, "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md") {
		data, err := os.ReadFile(filepath.Join("..", n))
		if err != nil {
			t.Fatal(err)
		}
		p := page{name: n, text: string(data)}
		if n != "docs/injector.md" {
			p.blocks = blocks(p.text)
		}
		all = append(all, p)
	}
	return all
}

var fence = regexp.MustCompile("^ *```(.*)$")

// blocks are the indented and fenced blocks of a document that are, or could be, commands:
// a fence with another language is none. A blank line ends one.
func blocks(text string) [][]string {
	var all [][]string
	var block []string
	end := func() {
		if len(block) > 0 {
			all = append(all, block)
		}
		block = nil
	}
	fenced, shell, paragraph := false, false, false
	for line := range strings.Lines(text) {
		line = strings.TrimRight(line, "\n")
		if m := fence.FindStringSubmatch(line); m != nil {
			end()
			fenced = !fenced
			shell = slices.Contains([]string{"", "sh", "shell", "bash"}, m[1])
			continue
		}
		indented := strings.HasPrefix(line, "    ") && !paragraph
		switch {
		case strings.TrimSpace(line) == "":
			end()
		case fenced && shell, !fenced && indented:
			block = append(block, strings.TrimSpace(line))
		default:
			end()
		}
		// An indented line after one of a paragraph belongs to that.
		paragraph = !fenced && strings.TrimSpace(line) != "" && (paragraph || !indented)
	}
	return all
}
