//go:build e2e

package cluster_test

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"sigs.k8s.io/yaml"

	"github.com/selkies-project/packer-plugin-selkies/e2e/cluster"
	"github.com/selkies-project/packer-plugin-selkies/e2e/machine"
	"github.com/selkies-project/packer-plugin-selkies/e2e/prometheus"
)

// checkPrometheus has a Prometheus with the example's configuration scrape the agents of
// nodes that serve all images: no alert is raised, and the dashboard has its figures.
func checkPrometheus(t *testing.T, nodes []*cluster.Node) {
	t.Helper()
	server := startPrometheus(t)

	var want []string
	for _, n := range nodes {
		want = append(want, "selkies-image-injector "+n.Name+" 1")
	}
	slices.Sort(want)
	cluster.Wait(t, "Prometheus to scrape the agents", func(ctx context.Context) error {
		for _, query := range []string{"up", "selkies_image_cache_ready"} {
			samples, err := server.ask(ctx, query)
			if err != nil {
				return err
			}
			var got []string
			for _, s := range samples {
				got = append(got, fmt.Sprintf("%s %s %s", s.Metric["job"], s.Metric["node"], s.Value[1]))
			}
			if slices.Sort(got); !slices.Equal(got, want) {
				return fmt.Errorf("%s is %q, not %q", query, got, want)
			}
		}
		return nil
	})

	queries, err := prometheus.Dashboard(world.source)
	if err != nil {
		t.Fatal(err)
	}
	for _, q := range queries {
		if strings.Contains(q.Expr, "kube_") { // there is no kube-state-metrics
			continue
		}
		cluster.Wait(t, "the dashboard's panel "+q.Panel, func(ctx context.Context) error {
			samples, err := server.ask(ctx, q.Expr)
			if err != nil {
				return err
			}
			empty := len(samples) == 0
			switch q.Panel {
			case "Nodes that do not serve all images": // there are none
				empty = !empty
			case "Images that the cache serves in part": // those that share a layer with the pods' sandbox
				empty = false
			}
			if empty {
				return fmt.Errorf("%s is %v", q.Expr, samples)
			}
			return nil
		})
	}

	cluster.Wait(t, "Prometheus to evaluate the rules", func(ctx context.Context) error {
		var rules struct {
			Groups []struct {
				Rules []struct{ Name, Health, State, LastError string }
			}
		}
		if err := server.call(ctx, "rules", &rules); err != nil {
			return err
		}
		found := 0
		for _, g := range rules.Groups {
			for _, r := range g.Rules {
				found++
				if r.Health != "ok" || r.State != "inactive" {
					return fmt.Errorf("%+v", r)
				}
			}
		}
		if found < 10 {
			return fmt.Errorf("there are only %d", found)
		}
		return nil
	})
}

// prometheusServer is the address of one.
type prometheusServer string

// startPrometheus starts a Prometheus with the example's configuration until the test's
// end. Debian's is built without the discovery of Kubernetes: it gets what that finds.
func startPrometheus(t *testing.T) prometheusServer {
	t.Helper()
	example := filepath.Join(world.source, "example/prometheus")
	data, err := os.ReadFile(filepath.Join(example, "prometheus.yaml"))
	if err != nil {
		t.Fatal(err)
	}
	var config map[string]any
	if err := yaml.Unmarshal(data, &config); err != nil {
		t.Fatal(err)
	}
	for i, file := range config["rule_files"].([]any) {
		config["rule_files"].([]any)[i] = filepath.Join(example, file.(string))
	}
	config["global"] = map[string]string{"evaluation_interval": "1s"}
	job := config["scrape_configs"].([]any)[0].(map[string]any)
	if job["kubernetes_sd_configs"] == nil {
		t.Fatalf("prometheus.yaml has no discovery: %v", job)
	}
	delete(job, "kubernetes_sd_configs")
	job["static_configs"] = discovered(t)
	job["scrape_interval"] = "1s"
	if data, err = yaml.Marshal(config); err != nil {
		t.Fatal(err)
	}
	dir := t.TempDir()
	file := filepath.Join(dir, "prometheus.yaml")
	if err := os.WriteFile(file, data, 0o644); err != nil {
		t.Fatal(err)
	}

	programs, err := prometheus.Programs(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	port, err := machine.FreePort()
	if err != nil {
		t.Fatal(err)
	}
	address := net.JoinHostPort("127.0.0.1", strconv.Itoa(port))
	var log strings.Builder
	cmd := exec.Command(filepath.Join(programs, "prometheus"), "--config.file="+file, "--storage.tsdb.path="+filepath.Join(dir, "data"),
		"--web.listen-address="+address)
	cmd.Stdout, cmd.Stderr = &log, &log
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := cmd.Process.Kill(); err != nil {
			t.Error(err)
		}
		_ = cmd.Wait() // of a process that was killed
		if t.Failed() {
			t.Logf("Prometheus, configured with\n%s\nlogged:\n%s", data, log.String())
		}
	})
	return prometheusServer(address)
}

// discovered are the targets that Prometheus discovers for the role pod in the agent's
// namespace, with the labels that the example looks at.
func discovered(t *testing.T) []any {
	t.Helper()
	pods, err := world.cluster.Client.CoreV1().Pods(agentNamespace).List(t.Context(), metav1.ListOptions{})
	if err != nil {
		t.Fatal(err)
	}
	var targets []any
	for _, p := range pods.Items {
		labels := map[string]string{
			"__meta_kubernetes_pod_label_app_kubernetes_io_name": p.Labels["app.kubernetes.io/name"],
			"__meta_kubernetes_pod_node_name":                    p.Spec.NodeName,
		}
		for _, c := range p.Spec.Containers {
			address := p.Status.PodIP
			if len(c.Ports) > 0 {
				address = net.JoinHostPort(address, strconv.Itoa(int(c.Ports[0].ContainerPort)))
				labels["__meta_kubernetes_pod_container_port_name"] = c.Ports[0].Name
			}
			targets = append(targets, map[string]any{"targets": []string{address}, "labels": labels})
		}
	}
	return targets
}

// sample is one of what a query gives.
type sample struct {
	Metric map[string]string
	Value  [2]any // time and value
}

func (p prometheusServer) ask(ctx context.Context, query string) ([]sample, error) {
	var answer struct{ Result []sample }
	err := p.call(ctx, "query?query="+url.QueryEscape(query), &answer)
	return answer.Result, err
}

// call asks the HTTP API.
func (p prometheusServer) call(ctx context.Context, path string, into any) error {
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://"+string(p)+"/api/v1/"+path, nil)
	if err != nil {
		return err
	}
	resp, err := http.DefaultClient.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	var answer struct {
		Status, Error string
		Data          json.RawMessage
	}
	if err := json.NewDecoder(resp.Body).Decode(&answer); err != nil {
		return err
	}
	if answer.Status != "success" {
		return fmt.Errorf("%s: %s", path, answer.Error)
	}
	return json.Unmarshal(answer.Data, into)
}
