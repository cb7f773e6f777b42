package docs

import (
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"
)

// read is a file of the repository.
func read(t *testing.T, name string) string {
	t.Helper()
	data, err := os.ReadFile(filepath.Join("..", name))
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// parse parses the Go files of a folder that are no tests.
func parse(t *testing.T, dir string) []*ast.File {
	t.Helper()
	names, err := filepath.Glob(filepath.Join("..", dir, "*.go"))
	if err != nil || len(names) == 0 {
		t.Fatalf("%s: found %v, %v", dir, names, err)
	}
	var files []*ast.File
	for _, n := range names {
		if strings.HasSuffix(n, "_test.go") {
			continue
		}
		f, err := parser.ParseFile(token.NewFileSet(), n, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		files = append(files, f)
	}
	return files
}

func inspect(files []*ast.File, each func(ast.Node)) {
	for _, f := range files {
		ast.Inspect(f, func(n ast.Node) bool { each(n); return true })
	}
}

// literal is the value of a string literal, empty for what is none.
func literal(e ast.Expr) string {
	if l, ok := e.(*ast.BasicLit); ok && l.Kind == token.STRING {
		s, _ := strconv.Unquote(l.Value)
		return s
	}
	return ""
}

// TestReasons compares the tables of docs/agent.md and docs/operations.md with the
// reasons of the agent's condition and events.
func TestReasons(t *testing.T) {
	known := map[string]bool{}
	inspect(parse(t, "injector/agent"), func(n ast.Node) {
		spec, ok := n.(*ast.ValueSpec)
		if !ok {
			return
		}
		for i, value := range spec.Values {
			// Of constants, only reasons are one word in capitals that is a value of itself.
			name := strings.TrimPrefix(spec.Names[i].Name, "event")
			if s := literal(value); regexp.MustCompile(`^([A-Z][a-z]+)+$`).MatchString(s) && (name == s || strings.HasSuffix(s, name)) {
				known[s] = true
			}
		}
	})
	if len(known) < 10 {
		t.Fatalf("found only %v", known)
	}
	documented := map[string]bool{}
	for _, m := range regexp.MustCompile("(?m)^\\| `([A-Z][A-Za-z]+)` \\|").FindAllStringSubmatch(
		read(t, "docs/agent.md")+read(t, "docs/operations.md"), -1) {
		documented[m[1]] = true
	}
	for reason := range known {
		if !documented[reason] {
			t.Errorf("neither docs/agent.md nor docs/operations.md has a row for %s", reason)
		}
	}
	alerts := alerts(t)
	for reason := range documented {
		if !known[reason] && !slices.Contains(alerts, reason) {
			t.Errorf("the documents have a row for %s, which is no reason of the agent and no alert", reason)
		}
	}
}

// alerts are those of the example's rules.
func alerts(t *testing.T) []string {
	t.Helper()
	var rules struct {
		Groups []struct {
			Name  string
			Rules []struct {
				Alert, Expr, For    string
				Labels, Annotations map[string]string
			}
		}
	}
	if err := yaml.UnmarshalStrict([]byte(read(t, "example/prometheus/rules.yaml")), &rules); err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, g := range rules.Groups {
		for _, r := range g.Rules {
			names = append(names, r.Alert)
		}
	}
	return names
}

// TestAlerts finds alerts that docs/operations.md does not explain, and others that it does.
func TestAlerts(t *testing.T) {
	var documented []string
	for _, m := range regexp.MustCompile("(?m)^\\| `(ImageCache[A-Za-z]+)` \\|").FindAllStringSubmatch(read(t, "docs/operations.md"), -1) {
		documented = append(documented, m[1])
	}
	if got := alerts(t); !slices.Equal(got, documented) {
		t.Errorf("the rules have %v\ndocs/operations.md has %v", got, documented)
	}
}

var verbs = regexp.MustCompile(`%[-+#0-9.]*[a-zA-Z]`)

// TestLogLines finds what the injector logs, from level info on, that docs/operations.md
// does not explain, and what that explains and nothing logs. There, words in capitals take the
// place of what differs.
func TestLogLines(t *testing.T) {
	rows := regexp.MustCompile("(?m)^\\| `([^`]+)` \\| (info|warn|error) \\|").FindAllStringSubmatch(read(t, "docs/operations.md"), -1)
	found := map[string]bool{} // rows by their line
	lines := 0
	for _, dir := range []string{"injector", "injector/agent", "injector/containerd", "injector/docker", "injector/cachedisk", "injector/readahead"} {
		inspect(parse(t, dir), func(n ast.Node) {
			call, ok := n.(*ast.CallExpr)
			if !ok {
				return
			}
			text, level := logged(call)
			if verbs.ReplaceAllString(text, "") == "" { // what others say
				return
			}
			lines++
			line := printed(text)
			explained := false
			for _, row := range rows {
				if line.MatchString(row[1]) && row[2] == level {
					explained, found[row[1]] = true, true
				}
			}
			if !explained {
				t.Errorf("%s logs %q with level %s, which no row of docs/operations.md begins with", dir, text, level)
			}
		})
	}
	if lines < 20 {
		t.Errorf("found only %d lines", lines)
	}
	for _, row := range rows {
		if !found[row[1]] {
			t.Errorf("docs/operations.md has %q with level %s, which nothing logs", row[1], row[2])
		}
	}
}

// printed matches what a document has for a format, with words in capitals for what differs.
func printed(format string) *regexp.Regexp {
	var parts []string
	for _, p := range verbs.Split(strings.ReplaceAll(format, "%%", "\x00"), -1) {
		parts = append(parts, regexp.QuoteMeta(strings.ReplaceAll(p, "\x00", "%")))
	}
	return regexp.MustCompile("^" + strings.Join(parts, "[A-Z]+(?: …)?"))
}

// logged is the text that a call logs, as a format, and the level; empty if it logs none.
func logged(call *ast.CallExpr) (text, level string) {
	method, ok := call.Fun.(*ast.SelectorExpr)
	if !ok || len(call.Args) == 0 {
		return "", ""
	}
	var on string // what has the method
	switch x := method.X.(type) {
	case *ast.SelectorExpr:
		on = x.Sel.Name
	case *ast.Ident:
		on = x.Name
	}
	switch method.Sel.Name {
	case "Info", "Warn", "Error":
		if strings.EqualFold(on, "log") {
			return format(call.Args[0]), strings.ToLower(method.Sel.Name)
		}
	case "inform", "warn": // of the agent, with a reason
		if len(call.Args) > 1 {
			return format(call.Args[1]), strings.Replace(method.Sel.Name, "inform", "info", 1)
		}
	}
	return "", ""
}

// format is the format that an expression is printed with. What is no literal is %s.
func format(e ast.Expr) string {
	switch e := e.(type) {
	case *ast.BasicLit:
		return literal(e)
	case *ast.BinaryExpr:
		return format(e.X) + format(e.Y)
	case *ast.CallExpr:
		if f, ok := e.Fun.(*ast.SelectorExpr); ok && f.Sel.Name == "Sprintf" {
			return format(e.Args[0])
		}
	}
	return "%s"
}

// plain are lines of a build that docs/operations.md leaves out, since they say all that there
// is to say.
var plain = []string{
	// The provisioner's.
	"found %d references in catalogs",
	"resolved %d references to %d images for %s",
	"Docker %s on the build VM fills %s",
	"growing the file system on %s by %s to the size of the disk",
	"pulled %s: %s in %s",
	"verified %d images, %s",
	"removed %s",
	"tracing %s for %d seconds",
	"traced %s: its start reads %s in %d files",
	"dry_run is set: nothing was pulled, and the disk is as it was",
	"wrote %s, which shows what the disk holds",
	// The post-processor's.
	"%s: %d%%",
	"dry run: would %s", // which is in the text
	"disk %s is ready",
	"image %s has no family, so that earlier images cannot be told; set image_family in the builder to have them pruned",
	"VM %s has had disk %s of the builder since %s: another build goes on, or was killed. If none goes on, delete it: gcloud compute instances delete %s --project=%s --zone=%s --delete-disks=all",
}

// TestBuildLines finds what the provisioner and the post-processor say that docs/operations.md
// does not explain, and what that explains and none of them says.
func TestBuildLines(t *testing.T) {
	unused := map[string]bool{}
	for _, p := range plain {
		unused[p] = true
	}
	for heading, dir := range map[string]string{"### Of the provisioner\n": "provisioner/imagecache", "### Of the post-processor\n": "post-processor/imagecache"} {
		_, section, ok := strings.Cut(read(t, "docs/operations.md"), heading)
		if !ok {
			t.Fatalf("docs/operations.md has no %q", heading)
		}
		section, _, _ = strings.Cut(section, "\n#")
		found := map[string]bool{}
		for _, m := range regexp.MustCompile("(?m)^\\| `([^`]+)` \\|").FindAllStringSubmatch(section, -1) {
			found[m[1]] = false
		}
		lines := 0
		files := parse(t, dir)
		inspect(files, func(n ast.Node) {
			text := said(n)
			if verbs.ReplaceAllString(text, "") == "" { // what is put together elsewhere
				return
			}
			lines++
			if slices.Contains(plain, text) {
				delete(unused, text)
				return
			}
			explained := false
			for row := range found {
				if printed(text).MatchString(row) {
					explained, found[row] = true, true
				}
			}
			if !explained {
				t.Errorf("%s says %q, which no row of docs/operations.md begins with", dir, text)
			}
		})
		if lines < 10 {
			t.Errorf("%s: found only %d lines", dir, lines)
		}
		// A warning is put together before it is said.
		inspect(files, func(n ast.Node) {
			if e, ok := n.(ast.Expr); ok && strings.HasPrefix(literal(e), "warning: ") {
				for row := range found {
					found[row] = found[row] || printed(literal(e)).MatchString(row)
				}
			}
		})
		for row, ok := range found {
			if !ok {
				t.Errorf("docs/operations.md has %q, which %s does not say", row, dir)
			}
		}
	}
	for p := range unused {
		t.Errorf("nothing says %q", p)
	}
}

// said is the format that a call says something to Packer's user with, empty if it does not.
func said(n ast.Node) string {
	call, ok := n.(*ast.CallExpr)
	if !ok || len(call.Args) == 0 {
		return ""
	}
	switch f := call.Fun.(type) {
	case *ast.Ident:
		if f.Name == "say" {
			return format(call.Args[0])
		}
	case *ast.SelectorExpr:
		if f.Sel.Name == "say" {
			return format(call.Args[0])
		}
	}
	return ""
}

// TestMessages finds messages that docs/troubleshooting.md quotes and no program says: the
// first cells of its tables that are code, with an ellipsis for what differs.
func TestMessages(t *testing.T) {
	var said strings.Builder
	for _, dir := range []string{"injector", "injector/agent", "injector/cachedisk", "injector/containerd", "injector/docker", "injector/report", "manifest",
		"provisioner/imagecache", "post-processor/imagecache", "gcp", "internal/tlsonly"} {
		inspect(parse(t, dir), func(n ast.Node) {
			if e, ok := n.(ast.Expr); ok && literal(e) != "" {
				said.WriteString(verbs.ReplaceAllString(literal(e), "…") + "\n")
			}
		})
	}
	quoted := regexp.MustCompile("(?m)^\\| `([^`]+)` \\|").FindAllStringSubmatch(read(t, "docs/troubleshooting.md"), -1)
	if len(quoted) < 50 {
		t.Fatalf("found only %d messages", len(quoted))
	}
	for _, m := range quoted {
		// A message at the beginning or the end of which others are put is quoted in part.
		if !strings.Contains(said.String(), m[1]) {
			t.Errorf("no program says %q", m[1])
		}
	}
}
