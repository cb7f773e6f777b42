// Package prometheus has Debian's Prometheus, and what the example's dashboard asks it. Its
// tests evaluate the example's rules.
package prometheus

import (
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/selkies-project/packer-plugin-selkies/e2e/host"
)

// dashboardFile is the example's, in the folder of the module.
const dashboardFile = "example/grafana/image-cache.json"

// Programs is the folder with prometheus and promtool.
func Programs(ctx context.Context) (string, error) {
	root, err := host.Root(ctx, []string{"prometheus"}, "1", func(string) error { return nil })
	return filepath.Join(root, "usr/bin"), err
}

// Query is one of the dashboard's.
type Query struct {
	Panel, Expr string
}

// variables are what Grafana puts in the place of variables when all nodes are shown.
var variables = strings.NewReplacer("$node", ".*", "$__rate_interval", "4m")

// Dashboard has the queries of the example's dashboard, as Grafana sends them.
func Dashboard(source string) ([]Query, error) {
	data, err := os.ReadFile(filepath.Join(source, dashboardFile))
	if err != nil {
		return nil, err
	}
	var dashboard struct {
		Panels []struct {
			Title   string
			Targets []struct{ Expr string }
		}
	}
	if err := json.Unmarshal(data, &dashboard); err != nil {
		return nil, fmt.Errorf("%s: %w", dashboardFile, err)
	}
	var queries []Query
	for _, p := range dashboard.Panels {
		for _, t := range p.Targets {
			queries = append(queries, Query{Panel: p.Title, Expr: variables.Replace(t.Expr)})
		}
	}
	if len(queries) == 0 {
		return nil, fmt.Errorf("%s has no queries", dashboardFile)
	}
	return queries, nil
}
