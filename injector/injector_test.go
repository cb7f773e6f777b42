package main

import (
	"bytes"
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/opencontainers/go-digest"

	"github.com/selkies-project/packer-plugin-selkies/injector/report"
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

func TestFlatten(t *testing.T) {
	a, b, c := errors.New("a"), errors.New("b"), errors.New("c")
	err := errors.Join(a, errors.Join(b, nil, fmt.Errorf("c: %w", c)))
	var got []string
	for _, e := range flatten(err) {
		got = append(got, e.Error())
	}
	if want := "a b c: c"; strings.Join(got, " ") != want {
		t.Errorf("flatten = %q, want %q", got, want)
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
		"plan": {true, []string{"to register", "would register 1 images"}},
	} {
		t.Run(name, func(t *testing.T) {
			var b bytes.Buffer
			printInject(&b, r, c.dryRun)
			for _, want := range c.want {
				if !strings.Contains(b.String(), want) {
					t.Errorf("output lacks %q:\n%s", want, b.String())
				}
			}
		})
	}
}
