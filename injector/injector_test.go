package main

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"

	"github.com/selkies-project/packer-plugin-selkies/injector/report"
	"github.com/selkies-project/packer-plugin-selkies/manifest"
)

func TestWrongUsage(t *testing.T) {
	for name, c := range map[string]struct {
		args []string
		want string
	}{
		"unknown command":      {[]string{"load"}, `unknown command "load"`},
		"unknown flag":         {[]string{"inject", "--force"}, "unknown flag: --force"},
		"argument":             {[]string{"inject", "debian:12"}, "debian:12"},
		"runtime":              {[]string{"inject", "--runtime", "cri-o"}, `--runtime is "cri-o"; give one of auto, containerd, docker`},
		"output":               {[]string{"status", "--output", "yaml"}, `--output is "yaml"`},
		"link":                 {[]string{"inject", "--link", "copy"}, `--link is "copy"`},
		"bind with containerd": {[]string{"inject", "--link", "bind", "--runtime", "containerd"}, "for Docker only"},
		"log level":            {[]string{"inject", "--log-level", "loud"}, `--log-level is "loud"`},
		"cache ID":             {[]string{"eject", "latest"}, `cache ID "latest"`},
		"cache ID too long":    {[]string{"eject", strings.Repeat("a", 65)}, `cache ID "aaa`},
		"other algorithm":      {[]string{"eject", "sha512:12ab"}, `cache ID "sha512:12ab"`},
		"report to nowhere":    {[]string{"report"}, "--html is missing; name the file to write"},
		"report of two":        {[]string{"report", "--html", "x", "a", "b"}, "accepts at most 1 arg"},
		"trace of nothing":     {[]string{"trace"}, "accepts 1 arg(s), received 0"},
		"trace of no image":    {[]string{"trace", "Bad:::ref"}, `reference "Bad:::ref": invalid reference format`},
		"read-ahead-bytes":     {[]string{"inject", "--read-ahead-bytes", "-1"}, "invalid argument"},
		"reference":            {[]string{"plan", "debian:12", "Bad:::ref"}, `reference "Bad:::ref": invalid reference format`},
	} {
		t.Run(name, func(t *testing.T) {
			cmd := newCommand()
			cmd.SetArgs(c.args)
			err := cmd.Execute()
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Fatalf("error is %v, want %q in it", err, c.want)
			}
			if got := exitStatus(err); got != 2 {
				t.Errorf("exit status is %d, want 2", got)
			}
		})
	}
}

func TestNoCacheDisk(t *testing.T) {
	cmd := newCommand()
	dir := t.TempDir()
	cmd.SetArgs([]string{"verify", "--cache", dir}) // which needs no root
	err := cmd.Execute()
	if err == nil || !strings.Contains(err.Error(), "no layer manifest at "+dir) {
		t.Fatalf("error is %v", err)
	}
	if got := exitStatus(err); got != 1 {
		t.Errorf("exit status is %d, want 1", got)
	}
}

// TestBrokenDisk reads layer manifests that give one line of error, with the remedy.
func TestBrokenDisk(t *testing.T) {
	for name, tt := range map[string]struct {
		make func(file string) error
		want []string
	}{
		"empty": {func(file string) error { return os.WriteFile(file, nil, 0o644) },
			[]string{"is empty", "; build the disk again"}},
		"escaping": {func(file string) error { return os.Symlink("/proc/self/mem", file) },
			[]string{"not a regular file", "; build the disk again"}},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			file := filepath.Join(dir, manifest.Path)
			if err := errors.Join(os.MkdirAll(filepath.Dir(file), 0o755), tt.make(file)); err != nil {
				t.Fatal(err)
			}
			cmd := newCommand()
			cmd.SetArgs([]string{"verify", "--cache", dir})
			errs := flatten(cmd.Execute())
			if len(errs) != 1 || errs[0] == nil {
				t.Fatalf("errors are %v, want one", errs)
			}
			for _, want := range append(tt.want, file) {
				if !strings.Contains(errs[0].Error(), want) {
					t.Errorf("error is %q, want %q in it", errs[0], want)
				}
			}
		})
	}
}

func TestFlatten(t *testing.T) {
	a, b, c := errors.New("a"), errors.New("b"), errors.New("c")
	err := errors.Join(a, errors.Join(b, nil, fmt.Errorf("c: %w", c)), fmt.Errorf("%w: %w", a, b))
	var got []string
	for _, e := range flatten(err) {
		got = append(got, e.Error())
	}
	if diff := cmp.Diff([]string{"a", "b", "c: c", "a: b"}, got); diff != "" {
		t.Errorf("flatten: %s", diff)
	}
}

func TestCacheIDs(t *testing.T) {
	a, b, c := digest.Digest("sha256:12ab"+strings.Repeat("0", 60)), digest.Digest("sha256:12cd"+strings.Repeat("0", 60)), digest.FromString("c")
	registered := []report.Generation{{CacheID: a}, {CacheID: b}}
	for name, tt := range map[string]struct {
		args []string
		want []digest.Digest
		err  string
	}{
		"none":               {},
		"as status prints":   {args: []string{report.Short(b), report.Short(a)}, want: []digest.Digest{b, a}},
		"with the algorithm": {args: []string{"sha256:12a"}, want: []digest.Digest{a}},
		"whole":              {args: []string{a.String(), b.Encoded()}, want: []digest.Digest{a, b}},
		// The runtime may know a generation that is half gone.
		"not listed": {args: []string{c.String()}, want: []digest.Digest{c}},
		"ambiguous":  {args: []string{"12"}, err: `cache ID "12" begins those of ` + a.String() + " and " + b.String()},
		"unknown":    {args: []string{report.Short(a), "12ef"}, err: "cache 12ef: nothing is registered"},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := cacheIDs(tt.args, registered)
			if diff := cmp.Diff(tt.want, got); diff != "" {
				t.Error(diff)
			}
			if tt.err == "" && err == nil {
				return
			}
			if err == nil || tt.err == "" || !strings.Contains(err.Error(), tt.err) || exitStatus(err) != 2 {
				t.Errorf("error is %v, want a usage error with %q", err, tt.err)
			}
		})
	}
}

func TestPrintInject(t *testing.T) {
	r := &report.Inject{
		Runtime: "containerd",
		Disks: []report.Disk{{
			Dir:     "/cache",
			CacheID: digest.FromString("cache"),
			Created: time.Date(2026, 11, 23, 10, 0, 0, 0, time.UTC),
			Images: []report.Image{
				{Names: []string{"a.example/x@" + digest.FromString("x").String(), "a.example/x:1"}, State: report.Registered, Layers: 3, Registered: 2, Present: 1, Milliseconds: 12},
				{Names: []string{"a.example/y:1"}, State: report.Skipped, Reason: "the node has another image under this name", Layers: 2},
			},
			Registered: 2, Present: 1,
		}},
		Milliseconds: 13,
	}
	for name, c := range map[string]struct {
		dryRun bool
		want   []string
	}{
		"inject": {false, []string{
			"a.example/x:1 (+1)  registered",
			"skipped", "the node has another image",
			"containerd: registered 1 images and 2 layers, 1 layers already there, in 13 ms",
		}},
		"plan": {true, []string{"to register", "would register 1 images", "; docker would be restarted\n", "inject would refuse: containers run"}},
	} {
		t.Run(name, func(t *testing.T) {
			var b bytes.Buffer
			r := *r
			if c.dryRun {
				r.Restart, r.Refusal = true, "containers run"
			}
			printInject(&b, &r, c.dryRun)
			for _, want := range c.want {
				if !strings.Contains(b.String(), want) {
					t.Errorf("output lacks %q:\n%s", want, b.String())
				}
			}
		})
	}
}
