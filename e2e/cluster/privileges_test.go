//go:build e2e

package cluster_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/yaml"

	"github.com/selkies-project/packer-plugin-selkies/e2e/cluster"
	"github.com/selkies-project/packer-plugin-selkies/e2e/machine"
	"github.com/selkies-project/packer-plugin-selkies/version"
)

// examples are the manifests as users have them.
const examples = "../../example/kustomize/"

// TestExamples has the API server check the set-ups whole, in a copy that is changed as
// docs/clusters.md says.
func TestExamples(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "image-cache")
	documented(t, "docs/clusters.md", "cp -r example/kustomize image-cache",
		"example/kustomize", filepath.Join(world.source, "example/kustomize"), " image-cache", " "+dir)
	digest := "sha256:" + strings.Repeat("0", 64)
	for _, variant := range []string{"pvc", "secondary-boot-disk", "eject"} {
		t.Run(variant, func(t *testing.T) {
			file := filepath.Join(dir, variant, "kustomization.yaml")
			data, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(file, []byte(strings.Replace(string(data), "newTag: "+version.Version, "digest: "+digest, 1)), 0o644); err != nil {
				t.Fatal(err)
			}
			out := world.cluster.Output(t, "apply", "--dry-run=server", "-k", filepath.Join(dir, variant))
			if n := strings.Count(out, "daemonset.apps/selkies-image-injector"); n != len(daemonSets(t, variant)) {
				t.Errorf("%d daemon sets would be made: %s", n, out)
			}
			text := world.cluster.Output(t, "kustomize", filepath.Join(dir, variant))
			for _, placeholder := range []string{"PROJECT", "ZONE", "DISK"} {
				if strings.Contains(text, placeholder) {
					t.Errorf("the placeholder %s is left", placeholder)
				}
			}
			if images, pinned := strings.Count(text, " image: "), strings.Count(text, "/selkies-image-injector@"+digest+"\n"); images == 0 || images != pinned {
				t.Errorf("%d of %d containers have the image by digest", pinned, images)
			}
		})
	}
}

// daemonSets are the agent's of a rendered set-up.
func daemonSets(t *testing.T, variant string) []appsv1.DaemonSet {
	t.Helper()
	var found []appsv1.DaemonSet
	d := yaml.NewYAMLOrJSONDecoder(strings.NewReader(world.cluster.Output(t, "kustomize", examples+variant)), 4096)
	for {
		var object map[string]any
		err := d.Decode(&object)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		if object["kind"] != "DaemonSet" {
			continue
		}
		var set appsv1.DaemonSet
		if err := runtime.DefaultUnstructuredConverter.FromUnstructuredWithValidation(object, &set, true); err != nil {
			t.Fatal(err)
		}
		if set.Spec.Template.Spec.Containers[0].Name == "injector" {
			found = append(found, set)
		}
	}
	if len(found) == 0 {
		t.Fatalf("%s has no daemon set", variant)
	}
	return found
}

// TestPrivileges runs the injector's commands once each in pods like those of the daemon
// sets, with the disk as a secondary boot disk and as a claim: with all of their
// privileges, and with each capability taken away.
func TestPrivileges(t *testing.T) {
	t.Parallel()
	for _, release := range []machine.Release{machine.Upstream, machine.Debian} {
		t.Run(string(release), func(t *testing.T) {
			t.Parallel()
			testPrivileges(t, release)
		})
	}
}

func testPrivileges(t *testing.T, release machine.Release) {
	disk := cluster.Disk{Name: firstDevice, Image: world.second}
	n := world.cluster.Node(t, cluster.NodeConfig{Release: release, Disks: []cluster.Disk{disk}})
	t.Run("claim", func(t *testing.T) {
		spec := daemonSets(t, "pvc")[0].Spec.Template.Spec
		// Of the test's own disk, which is in no zone.
		spec.Affinity = nil
		for i := range spec.Volumes {
			if claim := spec.Volumes[i].PersistentVolumeClaim; claim != nil {
				claim.ClaimName += "-" + string(release)
				world.cluster.Claim(t, agentNamespace, claim.ClaimName, disk, n)
			}
		}
		(&privileged{n, spec}).check(t)
	})
	t.Run("secondary boot disk", func(t *testing.T) {
		mountSecondary(t, n, disk)
		p := &privileged{n, daemonSets(t, "secondary-boot-disk")[0].Spec.Template.Spec}
		p.check(t)
		if said := p.must(t, nil, "version"); !strings.Contains(said, version.String()) {
			t.Errorf("version says %q, want %s", said, version.String())
		}
		for _, args := range [][]string{{"plan"}, {"plan", ref(app)}, {"inject"}, {"status"}, {"inject"}, {"eject"}} {
			t.Log(args, p.must(t, nil, args...))
		}
	})
}

// privileged is a node with pods of a daemon set.
type privileged struct {
	n    *cluster.Node
	spec corev1.PodSpec
}

// must runs a command in a pod of its own; it must succeed.
func (p *privileged) must(t *testing.T, change func(*corev1.Container), args ...string) string {
	t.Helper()
	ok, said := runOnce(t, p.n, p.spec, change, args...)
	if !ok {
		t.Fatalf("%v: %s", args, said)
	}
	return said
}

// check shows that the capabilities are enough to register, and that none can be missing;
// and that verify needs one more.
func (p *privileged) check(t *testing.T) {
	t.Helper()
	for _, c := range p.spec.Containers[0].SecurityContext.Capabilities.Add {
		ok, said := runOnce(t, p.n, p.spec, func(container *corev1.Container) {
			caps := container.SecurityContext.Capabilities
			caps.Add = slices.DeleteFunc(slices.Clone(caps.Add), func(o corev1.Capability) bool { return o == c })
		}, "inject")
		t.Logf("without %s: %s", c, said)
		if ok {
			t.Errorf("inject does without %s: do not give it", c)
		}
		if strings.Count(said, "\n") != 1 {
			t.Errorf("without %s it says more than a line: %s", c, said)
		}
	}
	p.must(t, nil, "inject")
	// The pod has ended, and with it kubelet's mounts of a claim.
	p.n.Output(t, "ctr", "-n", "k8s.io", "run", "--rm", ref(app), "test", "/bin/busybox", "true")
	if ok, said := runOnce(t, p.n, p.spec, nil, "verify", "--log-level=warn"); ok || !strings.Contains(said, "permission denied; run as root, in a container with CAP_DAC_READ_SEARCH") {
		t.Errorf("verify without CAP_DAC_READ_SEARCH: success is %t: %s", ok, said)
	}
	p.must(t, func(container *corev1.Container) {
		caps := container.SecurityContext.Capabilities
		caps.Add = append(slices.Clone(caps.Add), "DAC_READ_SEARCH")
	}, "verify")
	p.must(t, nil, "eject")
}

// runOnce runs a command of the injector in a pod of the daemon set's, changed where a
// pod that ends differs from one that stays, and says whether it succeeded and what
// it printed.
func runOnce(t *testing.T, n *cluster.Node, spec corev1.PodSpec, change func(*corev1.Container), args ...string) (bool, string) {
	t.Helper()
	pod := &corev1.Pod{ObjectMeta: metav1.ObjectMeta{Namespace: agentNamespace, GenerateName: args[0] + "-"}, Spec: *spec.DeepCopy()}
	pod.Spec.NodeSelector = map[string]string{corev1.LabelHostname: n.Name}
	pod.Spec.RestartPolicy = corev1.RestartPolicyNever
	c := &pod.Spec.Containers[0]
	c.Image, c.Args = ref(injector), args
	c.LivenessProbe, c.ReadinessProbe = nil, nil
	if change != nil {
		change(c)
	}
	pods := world.cluster.Client.CoreV1().Pods(agentNamespace)
	pod, err := pods.Create(t.Context(), pod, metav1.CreateOptions{})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := pods.Delete(context.Background(), pod.Name, metav1.DeleteOptions{}); err != nil {
			t.Error(err)
		}
		world.cluster.WaitPodGone(t, agentNamespace, pod.Name)
	}()
	ended := world.cluster.WaitPod(t, agentNamespace, pod.Name, "end", func(p *corev1.Pod) error {
		if p.Status.Phase == corev1.PodSucceeded || p.Status.Phase == corev1.PodFailed {
			return nil
		}
		return fmt.Errorf("it is %s: %+v", p.Status.Phase, p.Status.ContainerStatuses)
	})
	said := world.cluster.Output(t, "logs", "-n", agentNamespace, pod.Name)
	return ended.Status.Phase == corev1.PodSucceeded, said
}

// checkAgentProcess compares what the kernel says of the running agent with
// docs/privileges.md, and looks for the token of its account where it must not be.
func checkAgentProcess(t *testing.T, n *cluster.Node) {
	t.Helper()
	pid := strings.TrimSpace(n.Output(t, "pgrep", "-f", "[s]elkies-image-injector run"))
	status := map[string]string{}
	for line := range strings.Lines(n.Output(t, "cat", "/proc/"+pid+"/status")) {
		key, value, _ := strings.Cut(line, ":")
		status[key] = strings.TrimSpace(value)
	}
	capabilities := fmt.Sprintf("%016x", documentedCapabilities(t))
	for key, want := range map[string]string{
		"Seccomp": "2", "NoNewPrivs": "1", "Uid": "0\t0\t0\t0",
		"CapEff": capabilities, "CapPrm": capabilities, "CapBnd": capabilities, "CapAmb": strings.Repeat("0", 16),
	} {
		if status[key] != want {
			t.Errorf("%s: the agent's %s is %q, want %q", n.Name, key, status[key], want)
		}
	}

	if limits := n.Output(t, "cat", "/proc/"+pid+"/limits"); !regexp.MustCompile(`(?m)^Max core file size +0 +0 `).MatchString(limits) {
		t.Errorf("%s: the kernel may write a core of the agent: %s", n.Name, limits)
	}

	if host := n.Output(t, "readlink", "/proc/1/ns/mnt"); host == n.Output(t, "readlink", "/proc/"+pid+"/ns/mnt") {
		t.Errorf("%s: the agent, and with it kubectl exec, is in the host's mount namespace", n.Name)
	}

	token := strings.TrimSpace(n.Output(t, "cat", "/proc/"+pid+"/root/var/run/secrets/kubernetes.io/serviceaccount/token"))
	if len(token) < 100 {
		t.Fatalf("the agent's token is %q", token)
	}
	// Its log as kubelet keeps it, and what it may write: notes, containerd's store.
	// 1 is grep's status where it could read all and found nothing.
	const search = `grep -rlF -D skip -e "$0" /var/log/pods /run/selkies* /var/lib/containerd/io.containerd.metadata.v1.bolt; [ $? = 1 ]`
	if out, err := n.Run(t.Context(), "sh", "-c", search, token); err != nil {
		t.Errorf("%s: the agent's token is in %q, or not all was read: %v", n.Name, out, err)
	}
}

// documentedCapabilities are those of docs/privileges.md, as the kernel's mask.
func documentedCapabilities(t *testing.T) (mask uint64) {
	t.Helper()
	text, err := os.ReadFile(filepath.Join(world.source, "docs/privileges.md"))
	if err != nil {
		t.Fatal(err)
	}
	numbers := map[string]int{
		"CAP_SYS_ADMIN": unix.CAP_SYS_ADMIN, "CAP_SYS_CHROOT": unix.CAP_SYS_CHROOT, "CAP_SYS_PTRACE": unix.CAP_SYS_PTRACE,
	}
	for _, m := range regexp.MustCompile("(?m)^\\| `(CAP_[A-Z_]+)` \\|").FindAllStringSubmatch(string(text), -1) {
		number, ok := numbers[m[1]]
		if !ok {
			t.Fatalf("docs/privileges.md has %s, which is new to this test", m[1])
		}
		mask |= 1 << number
	}
	return mask
}
