//go:build e2e

package prometheus_test

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"sigs.k8s.io/yaml"

	"github.com/selkies-project/packer-plugin-selkies/e2e/host"
	"github.com/selkies-project/packer-plugin-selkies/e2e/prometheus"
)

var promtool string

func TestMain(m *testing.M) {
	host.Main(func(ctx context.Context, _ string) (int, error) {
		programs, err := prometheus.Programs(ctx)
		if err != nil {
			return 1, err
		}
		promtool = filepath.Join(programs, "promtool")
		return m.Run(), nil
	})
}

// read reads a YAML file.
func read(t *testing.T, file string, into any) {
	t.Helper()
	data, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if err := yaml.Unmarshal(data, into); err != nil {
		t.Fatalf("%s: %v", file, err)
	}
}

// TestRules has promtool parse the rules, and evaluate them on the series of testdata. For
// each alert there are series on which it fires, and others on which it does not.
func TestRules(t *testing.T) {
	const file = "../../example/prometheus/rules.yaml"
	if _, err := host.Output(exec.CommandContext(t.Context(), promtool, "check", "rules", "--lint-fatal", file)); err != nil {
		t.Error(err)
	}
	cases, err := filepath.Glob("testdata/*.yaml")
	if err != nil || len(cases) == 0 {
		t.Fatalf("found %v, %v", cases, err)
	}
	if _, err := host.Output(exec.CommandContext(t.Context(), promtool, append([]string{"test", "rules"}, cases...)...)); err != nil {
		t.Error(err)
	}

	fires, silent := map[string]bool{}, map[string]bool{}
	for _, c := range cases {
		var tests struct {
			Tests []struct {
				AlertRuleTest []struct {
					Alertname string
					ExpAlerts []any `json:"exp_alerts"`
				} `json:"alert_rule_test"`
			}
		}
		read(t, c, &tests)
		for _, test := range tests.Tests {
			for _, a := range test.AlertRuleTest {
				if len(a.ExpAlerts) > 0 {
					fires[a.Alertname] = true
				} else {
					silent[a.Alertname] = true
				}
			}
		}
	}
	var rules struct {
		Groups []struct{ Rules []struct{ Alert string } }
	}
	read(t, file, &rules)
	alerts := 0
	for _, g := range rules.Groups {
		for _, r := range g.Rules {
			alerts++
			if !fires[r.Alert] || !silent[r.Alert] {
				t.Errorf("%s: testdata has a case in which it fires: %t, one in which it does not: %t", r.Alert, fires[r.Alert], silent[r.Alert])
			}
		}
	}
	if alerts < 10 {
		t.Errorf("found only %d alerts", alerts)
	}
}

// TestDashboard has promtool parse the dashboard's queries.
func TestDashboard(t *testing.T) {
	queries, err := prometheus.Dashboard("../..")
	if err != nil {
		t.Fatal(err)
	}
	var rules []map[string]string
	for i, q := range queries {
		if strings.Contains(q.Expr, "$") {
			t.Errorf("%s: %s has a variable that this test does not know", q.Panel, q.Expr)
		}
		rules = append(rules, map[string]string{"record": fmt.Sprintf("dashboard:query:%d", i), "expr": q.Expr})
	}
	data, err := yaml.Marshal(map[string]any{"groups": []any{map[string]any{"name": "dashboard", "rules": rules}}})
	if err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "dashboard.yaml")
	if err := os.WriteFile(file, data, 0o644); err != nil {
		t.Fatal(err)
	}
	if _, err := host.Output(exec.CommandContext(t.Context(), promtool, "check", "rules", file)); err != nil {
		t.Errorf("%v\n%s", err, data)
	}
}
