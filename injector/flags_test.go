package main

import (
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/spf13/pflag"
)

func TestEnvironment(t *testing.T) {
	t.Setenv("SELKIES_CACHE", "/a:/b")
	t.Setenv("SELKIES_HOST_ROOT", "/host")
	t.Setenv("SELKIES_RUNTIME", "docker")
	t.Setenv("SELKIES_DOCKER_RESTART_RUNNING", "true")
	var f flags
	fs := pflag.NewFlagSet("test", pflag.ContinueOnError)
	f.register(fs)
	if err := fs.Parse([]string{"--runtime", "containerd"}); err != nil {
		t.Fatal(err)
	}
	if err := environment(fs); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff([]string{"/a", "/b"}, f.caches); diff != "" {
		t.Error(diff)
	}
	if f.hostRoot != "/host" || !f.dockerRestart {
		t.Errorf("host root %q, restart %v", f.hostRoot, f.dockerRestart)
	}
	if f.runtime != runtimeContainerd {
		t.Errorf("the environment overrode --runtime: %q", f.runtime)
	}
}

func TestWrongEnvironment(t *testing.T) {
	for name, value := range map[string]string{
		"SELKIES_GATE_DEADLINE": "soon", "SELKIES_KUBERNETES": "maybe", "SELKIES_OUTPUT": "yaml", "SELKIES_CHECK_INTERVAL": "0s",
	} {
		t.Run(name, func(t *testing.T) {
			t.Setenv("NODE_NAME", "n")
			t.Setenv(name, value)
			cmd := newCommand()
			cmd.SetArgs([]string{"run"})
			err := cmd.Execute()
			if err == nil || !strings.Contains(err.Error(), value) {
				t.Fatalf("error is %v, want %q in it", err, value)
			}
			if got := exitStatus(err); got != 2 {
				t.Errorf("exit status is %d, want 2", got)
			}
		})
	}
}
