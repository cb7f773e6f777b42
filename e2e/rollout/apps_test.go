//go:build e2e

package rollout_test

import (
	"context"
	"fmt"
	"strings"
	"testing"

	"github.com/zclconf/go-cty/cty"

	"github.com/selkies-project/packer-plugin-selkies/datasource/apps"
	"github.com/selkies-project/packer-plugin-selkies/e2e/cluster"
)

// appCRD has of the launcher's resource definition what the data source reads.
const appCRD = `
apiVersion: apiextensions.k8s.io/v1
kind: CustomResourceDefinition
metadata:
  name: brokerappconfigs.gcp.solutions
spec:
  group: gcp.solutions
  scope: Namespaced
  names: {kind: BrokerAppConfig, plural: brokerappconfigs, singular: brokerappconfig}
  versions:
  - name: v1
    served: true
    storage: true
    schema:
      openAPIV3Schema:
        type: object
        x-kubernetes-preserve-unknown-fields: true
`

const appObjects = `
apiVersion: gcp.solutions/v1
kind: BrokerAppConfig
metadata: {name: blender, namespace: pod-broker-system}
spec:
  displayName: Blender
  defaultRepo: gcr.io/p/vdi-blender
  defaultTag: "3"
  images:
    xserver: {oldRepo: gcr.io/cloud-solutions-images/xserver, newRepo: gcr.io/p/xserver, newTag: latest}
    desktop: {oldRepo: gcr.io/cloud-solutions-images/desktop, newRepo: gcr.io/p/desktop, newTag: latest,
      digest: "sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"}
---
apiVersion: gcp.solutions/v1
kind: BrokerAppConfig
metadata: {name: xonotic, namespace: pod-broker-system}
spec:
  defaultRepo: gcr.io/p/vdi-xonotic
  defaultTag: latest
  images:
    xserver: {oldRepo: gcr.io/cloud-solutions-images/xserver, newRepo: gcr.io/p/xserver, newTag: latest}
---
apiVersion: gcp.solutions/v1
kind: BrokerAppConfig
metadata: {name: retired, namespace: pod-broker-system}
spec: {disabled: true, defaultRepo: gcr.io/p/retired, defaultTag: latest}
---
apiVersion: gcp.solutions/v1
kind: BrokerAppConfig
metadata: {name: elsewhere, namespace: default}
spec: {defaultRepo: gcr.io/p/elsewhere, defaultTag: latest}
`

func readApps(t *testing.T, options map[string]any) (cty.Value, error) {
	t.Helper()
	var d apps.Datasource
	if err := d.Configure(options); err != nil {
		t.Fatal(err)
	}
	return d.Execute()
}

func TestApps(t *testing.T) {
	_, err := readApps(t, map[string]any{"kubeconfig": world.Kubeconfig})
	if err == nil || !strings.Contains(err.Error(), "has no BrokerAppConfig objects; is the App Launcher installed there?") {
		t.Errorf("without the launcher the error is %v", err)
	}

	applyText(t, appCRD)
	world.Output(t, "create", "namespace", "pod-broker-system")
	cluster.Wait(t, "the launcher's resource", func(ctx context.Context) error {
		_, err := world.Kubectl(ctx, "get", "brokerappconfigs", "-A")
		return err
	})
	if v, err := readApps(t, map[string]any{"kubeconfig": world.Kubeconfig}); err != nil || v.GetAttr("images").LengthInt() != 0 {
		t.Errorf("without an app got %#v, %v", v, err)
	}
	applyText(t, appObjects)

	world.Output(t, "create", "serviceaccount", "-n", "default", "reader")
	c := newCloud(t, "apps", "reader")
	gke := map[string]any{
		"cluster": "broker-us-central1", "project_id": project, "access_token": c.token,
		"custom_endpoints": map[string]string{"container": c.URL},
	}
	if _, err := readApps(t, gke); err == nil || !strings.Contains(err.Error(), "bind a Kubernetes role that may list brokerappconfigs.gcp.solutions in namespace pod-broker-system") {
		t.Errorf("without a role the error is %v", err)
	}
	world.Output(t, "create", "role", "-n", "pod-broker-system", "reader", "--verb=list", "--resource=brokerappconfigs.gcp.solutions")
	world.Output(t, "create", "rolebinding", "-n", "pod-broker-system", "reader", "--role=reader", "--serviceaccount=default:reader")

	want := cty.ObjectVal(map[string]cty.Value{
		"apps": cty.ListVal([]cty.Value{cty.StringVal("blender"), cty.StringVal("xonotic")}),
		"images": cty.ListVal([]cty.Value{
			cty.StringVal("gcr.io/p/desktop@sha256:0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef"),
			cty.StringVal("gcr.io/p/vdi-blender:3"),
			cty.StringVal("gcr.io/p/vdi-xonotic:latest"),
			cty.StringVal("gcr.io/p/xserver:latest"),
		}),
	})
	cluster.Wait(t, "the role to count", func(context.Context) error {
		got, err := readApps(t, gke)
		if err == nil && !got.RawEquals(want) {
			err = fmt.Errorf("got %#v", got)
		}
		return err
	})
	if got, err := readApps(t, map[string]any{"kubeconfig": world.Kubeconfig}); err != nil || !got.RawEquals(want) {
		t.Errorf("by kubeconfig got %#v, %v", got, err)
	}

	gke["cluster"] = "broker"
	if _, err := readApps(t, gke); err == nil || err.Error() != "project p has no running cluster broker; check cluster and location" {
		t.Errorf("error is %v", err)
	}
}
