//go:build e2e

package pipeline_test

import (
	"context"
	"errors"
	"fmt"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"cloud.google.com/go/compute/apiv1/computepb"
	"github.com/google/go-cmp/cmp"
	batchv1 "k8s.io/api/batch/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/selkies-project/packer-plugin-selkies/e2e/cluster"
	"github.com/selkies-project/packer-plugin-selkies/e2e/host"
	"github.com/selkies-project/packer-plugin-selkies/e2e/registry"
	"github.com/selkies-project/packer-plugin-selkies/version"
)

// namespace is the CronJob's, and Selkies'.
const namespace = "pod-broker-system"

// TestCronJob installs the CronJob as Cloud Build does, and starts it by hand in the
// ways that docs/pipeline.md has. At last a node runs it.
func TestCronJob(t *testing.T) {
	const create = "kubectl create namespace " + namespace
	documented(t, create)
	kubectl(t, create)
	t.Cleanup(func() {
		if _, err := world.Kubectl(context.Background(), "delete", "namespace", namespace, "--wait=false"); err != nil {
			t.Error(err)
		}
	})
	// As in the repository, and as installed.
	world.Output(t, "apply", "--dry-run=server", "-k", examples)
	const traces = `[{ image = "us-docker.pkg.dev/my-project/apps/desktop:1.4", command = [], seconds = 30 }]`
	inPipeline(t, "PKR_VAR_traces="+traces)
	dir := installed(t, map[string]string{"_EXCLUDE_REGIONS": "europe-west4 us-east1", "_IMAGE_BUILD_SCHEDULE": "30 2 * * *", "_TRACES": traces})
	world.Output(t, "apply", "-k", dir)

	cron, err := world.Client.BatchV1().CronJobs(namespace).Get(t.Context(), "update-image-cache", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if s := cron.Spec; s.Schedule != "30 2 * * *" || s.ConcurrencyPolicy != batchv1.ForbidConcurrent {
		t.Errorf("the CronJob is %+v", s)
	}
	account, err := world.Client.CoreV1().ServiceAccounts(namespace).Get(t.Context(), cron.Spec.JobTemplate.Spec.Template.Spec.ServiceAccountName, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	if got := account.Annotations["iam.gke.io/gcp-service-account"]; got != "image-cache@broker.iam.gserviceaccount.com" {
		t.Errorf("the job is the Google service account %q", got)
	}

	for _, tt := range []struct {
		job, command string
		more         map[string]string // variables, besides those of every run
	}{
		{"manual", "kubectl create job --from=cronjob/update-image-cache -n pod-broker-system manual", nil},
		{"reset", byHand("reset", "PKR_VAR_rebuild=true"), map[string]string{"rebuild": "true"}},
		{"roll-back", byHand("roll-back", "PKR_VAR_rollback_to=selkies-image-cache-1700000001"), map[string]string{"rollback_to": "selkies-image-cache-1700000001"}},
		{"plan", byHand("plan", "PKR_VAR_dry_run=true"), map[string]string{"dry_run": "true"}},
		{"dry-run", byHand("dry-run", "PKR_VAR_rollback_to=selkies-image-cache-1700000001 PKR_VAR_dry_run=true"),
			map[string]string{"rollback_to": "selkies-image-cache-1700000001", "dry_run": "true"}},
	} {
		t.Run(tt.job, func(t *testing.T) {
			documented(t, tt.command)
			kubectl(t, tt.command)
			c := container(t, tt.job)
			if want := "us-docker.pkg.dev/broker/tools/selkies-image-cache-packer:0b1c"; c.Image != want {
				t.Errorf("the image is %s, want %s", c.Image, want)
			}
			files, env := mounted(t, c)
			want := map[string]string{
				"project_id": "broker", "region": "us-central1", "zone": "us-central1-a", "machine_type": "e2-standard-8", "disk_size_gb": "100",
				"cluster_pattern": "^broker-",
				"exclude_regions": "europe-west4 us-east1", "repositories": "", "image_list_file": files + "/images.txt", "traces": traces,
				"injector_image": "us-docker.pkg.dev/broker/tools/selkies-image-injector:" + version.Version,
			}
			for name, value := range tt.more {
				want[name] = value
			}
			if diff := cmp.Diff(want, variablesOf(t, filepath.Join(files, "image-cache.pkr.hcl"), env)); diff != "" {
				t.Errorf("variables (-want +got):\n%s", diff)
			}
			args := strings.Split(strings.ReplaceAll(strings.Join(c.Args, " "), "/template/", files+"/"), " ")
			validate(t, t.TempDir(), args, append(env, "PKR_VAR_injector="+world.injector))
			kubectl(t, "kubectl delete job -n pod-broker-system "+tt.job)
		})
	}
	runJobs(t)

	list := "kubectl get jobs -n pod-broker-system"
	documented(t, list)
	kubectl(t, list)
	suspend := `kubectl patch cronjob update-image-cache -n pod-broker-system -p '{"spec":{"suspend":true}}'`
	documented(t, suspend)
	// The second one resumes it.
	for _, command := range []string{suspend, strings.Replace(suspend, "true", "false", 1)} {
		kubectl(t, command)
		if cron, err = world.Client.BatchV1().CronJobs(namespace).Get(t.Context(), "update-image-cache", metav1.GetOptions{}); err != nil {
			t.Fatal(err)
		}
		if cron.Spec.Suspend == nil || *cron.Spec.Suspend != (command == suspend) {
			t.Errorf("after %s the CronJob has suspend %v", command, cron.Spec.Suspend)
		}
	}
}

// runJobs has a node run jobs of the CronJob to their end, with the image that the
// Dockerfile makes. Their settings are the CronJob's, but that they say where Google's APIs
// are and the metadata server, whose account the pod is, and that no node gets a disk.
func runJobs(t *testing.T) {
	t.Helper()
	c := newRecordsWithBroker(t, zone)
	reg := registry.New(t, registry.Config{})
	push(t, reg, "injector:1", newLayer(t))
	addr, ca := registry.ServeTLS(t, address()+":0", nil, httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: reg.Addr})) // pods reach it
	dir := installed(t, map[string]string{"_IMAGE": world.registry.Addr + "/packer", "_INJECTOR_IMAGE": addr + "/injector:1"})
	settings, err := os.OpenFile(filepath.Join(dir, "settings.env"), os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	_, err = fmt.Fprintf(settings, `PKR_VAR_custom_endpoints={ compute = "%[1]s/compute/v1/", container = "%[1]s/" }
PKR_VAR_node_selector={ cache = "nowhere" }
GCE_METADATA_HOST=%[2]s
`, c.URL, strings.TrimPrefix(c.URL, "http://"))
	if err := errors.Join(err, settings.Close()); err != nil {
		t.Fatal(err)
	}
	world.Output(t, "apply", "-k", dir)
	packerImage(t, world.registry.Addr+"/packer:0b1c", ca)
	world.Node(t, cluster.NodeConfig{})

	// No further than to the builder: a pod cannot log in to a VM here.
	c.Deny("compute.disks.create")
	kubectl(t, "kubectl create job --from=cronjob/update-image-cache -n pod-broker-system manual")
	if out, want := runJob(t, "manual", batchv1.JobFailed), "Required 'compute.disks.create' permission"; !strings.Contains(out, want) {
		t.Errorf("Packer does not say %q:\n%s", want, out)
	}
	c.Allow("compute.disks.create")

	const image = "selkies-image-cache-1700000001"
	c.AddImage(project, &computepb.Image{Name: new(image), Family: new("selkies-image-cache"), DiskSizeGb: new(int64(20))})
	kubectl(t, byHand("roll-back", "PKR_VAR_rollback_to="+image))
	if out, want := runJob(t, "roll-back", batchv1.JobComplete), "Image "+image+" is on 1 disks, in 1 clusters"; !strings.Contains(out, want) {
		t.Errorf("Packer does not say %q:\n%s", want, out)
	}
}

// runJob waits until a job has ended as it should, and returns what its pod printed.
func runJob(t *testing.T, name string, end batchv1.JobConditionType) string {
	t.Helper()
	cluster.Wait(t, "the end of job "+name, func(ctx context.Context) error {
		job, err := world.Client.BatchV1().Jobs(namespace).Get(ctx, name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		for _, c := range job.Status.Conditions {
			if c.Status == corev1.ConditionTrue && (c.Type == batchv1.JobFailed || c.Type == batchv1.JobComplete) {
				if c.Type != end {
					t.Errorf("job %s is %s: %s", name, c.Type, c.Message)
				}
				return nil
			}
		}
		pods, err := world.Kubectl(ctx, "describe", "pods", "-n", namespace, "-l", batchv1.JobNameLabel+"="+name)
		return errors.Join(errors.New(pods), err)
	})
	return world.Output(t, "logs", "-n", namespace, "job/"+name)
}

// byHand is a command for a run with other settings than the CronJob's.
func byHand(job, settings string) string {
	return `kubectl create job --from=cronjob/update-image-cache -n pod-broker-system ` + job + ` --dry-run=client -o yaml |
  kubectl set env --local -f - -o yaml ` + settings + ` |
  kubectl create -f -`
}

// documented fails the test if docs/pipeline.md lacks a command. An image is named
// IMAGE there.
func documented(t *testing.T, command string) {
	t.Helper()
	command = strings.ReplaceAll(command, "selkies-image-cache-1700000001", "IMAGE")
	inPipeline(t, "    "+strings.ReplaceAll(command, "\n", "\n    "))
}

// inPipeline fails the test if docs/pipeline.md lacks lines.
func inPipeline(t *testing.T, lines string) {
	t.Helper()
	data, err := os.ReadFile("../../docs/pipeline.md")
	if err != nil {
		t.Fatal(err)
	}
	if !strings.Contains(string(data), "\n"+lines+"\n") {
		t.Errorf("docs/pipeline.md does not have\n%s", lines)
	}
}

// kubectl runs a line with kubectl as the administrator.
func kubectl(t *testing.T, line string) {
	t.Helper()
	tools, err := host.Tool(t.Context(), "kubernetes")
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), "bash", "-ceu", "-o", "pipefail", line)
	cmd.Env = append(os.Environ(), "PATH="+tools+":"+os.Getenv("PATH"), "KUBECONFIG="+world.Kubeconfig)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%s: %v\n%s", line, err, out)
	}
}

// container is that of the pod that the controller manager makes for a job.
func container(t *testing.T, job string) *corev1.Container {
	t.Helper()
	var found *corev1.Container
	cluster.Wait(t, "the pod of job "+job, func(ctx context.Context) error {
		pods, err := world.Client.CoreV1().Pods(namespace).List(ctx, metav1.ListOptions{LabelSelector: batchv1.JobNameLabel + "=" + job})
		if err != nil {
			return err
		}
		if len(pods.Items) == 0 {
			return errors.New("there is none")
		}
		found = &pods.Items[0].Spec.Containers[0]
		return nil
	})
	return found
}

// mounted writes the files that a container finds under /template to a folder, and
// returns it with the container's environment.
func mounted(t *testing.T, c *corev1.Container) (dir string, env []string) {
	t.Helper()
	configMap := func(name string) map[string]string {
		m, err := world.Client.CoreV1().ConfigMaps(namespace).Get(t.Context(), name, metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		return m.Data
	}
	dir = t.TempDir()
	for name, data := range configMap("update-image-cache") {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(data), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for name, value := range configMap(c.EnvFrom[0].ConfigMapRef.Name) {
		env = append(env, name+"="+value)
	}
	for _, e := range c.Env {
		env = append(env, e.Name+"="+strings.ReplaceAll(e.Value, "/template/", dir+"/"))
	}
	return dir, env
}
