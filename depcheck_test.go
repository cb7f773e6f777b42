package main

import (
	"os/exec"
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
			self + "/provisioner",
		},
		self: {
			"github.com/containerd/containerd/",
			self + "/injector",
		},
	} {
		out, err := exec.Command("go", "list", "-deps", pkg).CombinedOutput()
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
