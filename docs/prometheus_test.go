package docs

import (
	"os/exec"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"sigs.k8s.io/yaml"
)

// TestRulesInObjects runs the commands of docs/operations.md that put the rules into an
// object, up to kubectl: the object has those of rules.yaml.
func TestRulesInObjects(t *testing.T) {
	var rules map[string]any
	if err := yaml.Unmarshal([]byte(read(t, "example/prometheus/rules.yaml")), &rules); err != nil {
		t.Fatal(err)
	}
	commands := regexp.MustCompile(`(?m)^    (sed .* (example/prometheus/[a-z]+\.yaml) -) \| kubectl apply -f -$`).
		FindAllStringSubmatch(read(t, "docs/operations.md"), -1)
	if len(commands) != 2 {
		t.Fatalf("docs/operations.md has the commands %q", commands)
	}
	for _, m := range commands {
		command, file := m[1], m[2]
		if !strings.Contains(read(t, file), "#   "+command+" | kubectl apply -f -\n") {
			t.Errorf("%s has another command than docs/operations.md: %s", file, command)
		}
		cmd := exec.Command("sh", "-ceu", command)
		cmd.Dir = ".."
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("%s: %v", command, err)
		}
		objects := strings.Split(string(out), "\n---\n")
		var object struct {
			Kind string
			Spec map[string]any
		}
		if err := yaml.Unmarshal([]byte(objects[len(objects)-1]), &object); err != nil {
			t.Fatalf("%s: %v", command, err)
		}
		if diff := cmp.Diff(rules, object.Spec); diff != "" || !strings.HasSuffix(object.Kind, "Rules") && object.Kind != "PrometheusRule" {
			t.Errorf("%s makes a %s with other rules (-want +got):\n%s", command, object.Kind, diff)
		}
	}
}

// TestScrapes compares what the scrape configurations select with the agent's DaemonSet, and
// the labels that they set with those that the rules and the dashboard need.
func TestScrapes(t *testing.T) {
	var daemonSet struct {
		Spec struct {
			Template struct {
				Metadata struct{ Labels map[string]string }
				Spec     struct {
					Containers []struct {
						Ports []struct{ Name string }
					}
				}
			}
		}
	}
	if err := yaml.Unmarshal([]byte(read(t, "example/kustomize/base/daemonset/daemonset.yaml")), &daemonSet); err != nil {
		t.Fatal(err)
	}
	pod := daemonSet.Spec.Template
	port := pod.Spec.Containers[0].Ports[0].Name

	type endpoint struct {
		Port        string
		Relabelings []struct{ TargetLabel string }
	}
	var monitors [2]struct {
		Metadata struct{ Name string }
		Spec     struct {
			Selector            struct{ MatchLabels map[string]string }
			JobLabel            string
			PodMetricsEndpoints []endpoint
			Endpoints           []endpoint
			TargetLabels        struct{ Metadata []string }
		}
	}
	for i, file := range []string{"example/prometheus/operator.yaml", "example/prometheus/google.yaml"} {
		object, _, _ := strings.Cut(read(t, file), "\n---\n")
		if err := yaml.Unmarshal([]byte(object), &monitors[i]); err != nil {
			t.Fatalf("%s: %v", file, err)
		}
		spec := monitors[i].Spec
		for label, value := range spec.Selector.MatchLabels {
			if pod.Metadata.Labels[label] != value {
				t.Errorf("%s selects %s=%s, the agent's pods have %v", file, label, value, pod.Metadata.Labels)
			}
		}
		if endpoints := slices.Concat(spec.PodMetricsEndpoints, spec.Endpoints); len(endpoints) != 1 || endpoints[0].Port != port {
			t.Errorf("%s has the endpoints %v, the agent has port %s", file, endpoints, port)
		}
	}
	operator, google := monitors[0].Spec, monitors[1].Spec
	if r := operator.PodMetricsEndpoints[0].Relabelings; len(r) != 1 || r[0].TargetLabel != "node" {
		t.Errorf("operator.yaml sets the labels %v, not node", r)
	}
	if !slices.Contains(google.TargetLabels.Metadata, "node") {
		t.Errorf("google.yaml sets the labels %v, not node", google.TargetLabels.Metadata)
	}

	var prometheus struct {
		ScrapeConfigs []struct {
			JobName string `json:"job_name"`
		} `json:"scrape_configs"`
	}
	if err := yaml.Unmarshal([]byte(read(t, "example/prometheus/prometheus.yaml")), &prometheus); err != nil {
		t.Fatal(err)
	}
	// Google's service names the job after the object.
	jobs := []string{prometheus.ScrapeConfigs[0].JobName, pod.Metadata.Labels[operator.JobLabel], monitors[1].Metadata.Name}
	used := regexp.MustCompile(`\bjob=\\?"([^"\\]*)`).FindAllStringSubmatch(
		read(t, "example/prometheus/rules.yaml")+read(t, "example/grafana/image-cache.json"), -1)
	if len(used) < 3 {
		t.Errorf("the rules and the dashboard select by job %d times", len(used))
	}
	for _, m := range used {
		for _, job := range jobs {
			if m[1] != job {
				t.Errorf("the rules or the dashboard have the job %q, the scrape configurations %q", m[1], jobs)
			}
		}
	}
}
