package cluster

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/google/go-containerregistry/pkg/name"
	corev1 "k8s.io/api/core/v1"

	"github.com/selkies-project/packer-plugin-selkies/e2e/host"
)

// StartupTaint is the one of nodes that wait for their cache.
var StartupTaint = corev1.Taint{
	Key:    "startup-taint.cluster-autoscaler.kubernetes.io/selkies-image-cache",
	Value:  "true",
	Effect: corev1.TaintEffectNoSchedule,
}

// SecondaryDisks is where GKE mounts secondary boot disks in data mode.
const SecondaryDisks = "/mnt/disks/gke-secondary-disks/"

// Agent is how the agent's manifests are applied.
type Agent struct {
	// Component of example/kustomize/components.
	Component string
	// Image is the injector's, a reference with a tag.
	Image string
	// Env is of the containers.
	Env map[string]string
	// Eager has kubelet ask every second whether the agent is ready, for tests that wait
	// for it: as often as the manifests say, it takes a minute to see that it is.
	Eager bool
}

// ApplyAgent applies the agent's manifests.
func (c *Cluster) ApplyAgent(ctx context.Context, a Agent) error {
	image, err := name.NewTag(a.Image)
	if err != nil {
		return err
	}
	var patches strings.Builder
	for _, key := range slices.Sorted(maps.Keys(a.Env)) {
		fmt.Fprintf(&patches, "    - {op: add, path: /spec/template/spec/containers/0/env/-, value: {name: %s, value: %q}}\n", key, a.Env[key])
	}
	if patches.Len() == 0 {
		patches.WriteString("    []\n")
	}
	if a.Eager {
		patches.WriteString(`- target: {kind: DaemonSet, name: selkies-image-injector}
  patch: |-
    - {op: replace, path: /spec/template/spec/containers/0/readinessProbe/periodSeconds, value: 1}
`)
	}
	return c.ApplyKustomization(ctx, fmt.Sprintf(`resources:
- EXAMPLES/base
components:
- EXAMPLES/components/%s
images:
- {name: selkies-image-injector, newName: %s, newTag: %q}
patches:
- target: {kind: DaemonSet}
  patch: |-
%s`, a.Component, image.Context(), image.TagStr(), patches.String()))
}

// ApplyKustomization applies a kustomization in which EXAMPLES stands for example/kustomize.
func (c *Cluster) ApplyKustomization(ctx context.Context, kustomization string) (err error) {
	source, err := host.Source(ctx)
	if err != nil {
		return err
	}
	dir, err := os.MkdirTemp(c.config.Dir, "kustomization-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	// kustomize takes no absolute paths.
	examples, err := filepath.Rel(dir, filepath.Join(source, "example/kustomize"))
	if err != nil {
		return err
	}
	kustomization = strings.ReplaceAll(kustomization, "EXAMPLES", examples)
	if err := os.WriteFile(filepath.Join(dir, "kustomization.yaml"), []byte(kustomization), 0o644); err != nil {
		return err
	}
	_, err = c.Kubectl(ctx, "apply", "-k", dir)
	return err
}

// MountSecondary mounts an attached disk as GKE does.
func (n *Node) MountSecondary(ctx context.Context, d Disk) error {
	dir := SecondaryDisks + d.Name
	_, err := n.Run(ctx, "sh", "-ec", `mkdir -p "$2"; mount -o ro,noload "$1" "$2"`, "mount", d.Device(), dir)
	return err
}
