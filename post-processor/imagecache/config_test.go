package imagecache

import (
	"strings"
	"testing"
)

func TestConfigure(t *testing.T) {
	with := func(kv ...any) map[string]any {
		c := map[string]any{"injector_image": "registry.example/injector:1", "cluster_pattern": "^desktops-"}
		for i := 0; i < len(kv); i += 2 {
			c[kv[i].(string)] = kv[i+1]
		}
		return c
	}
	tests := []struct {
		name   string
		config map[string]any
		want   string // of the error, empty for none
	}{
		{"defaults", with(), ""},
		{"everything", with("zones", []string{"us-central1-a", "us-central1-ai1a"}, "exclude_regions", []string{"europe-west4"},
			"cluster_endpoint", "dns", "disk_size_gb", 100, "disk_labels", map[string]string{"team": "a"}, "keep", 3, "cache_name", "games",
			"node_selector", map[string]string{"app.broker/tier": "gpu"}, "builder_disk_prefix", "games-build-", "dry_run", true, "output_dir", "out",
			"platform", "linux/arm64", "start_timeout", "10m"), ""},
		{"disks only", map[string]any{"skip_rollout": true, "zones": []string{"us-central1-a"}}, ""},
		{"disks without zones", map[string]any{"skip_rollout": true}, "cluster_pattern is not set"},
		{"one cluster", map[string]any{"injector_image": "registry.example/injector:1", "kubeconfig": "a", "zones": []string{"us-central1-a"}}, ""},
		{"no clusters", map[string]any{"injector_image": "registry.example/injector:1"}, "cluster_pattern is not set"},
		{"no injector", map[string]any{"cluster_pattern": "^desktops-"}, "injector_image is not set"},
		{"no reference", with("injector_image", "registry.example/Injector"), "injector_image: "},
		{"platform", with("platform", "linux"), `platform "linux" is not os/architecture`},
		{"long name", with("cache_name", "selkies-image-cache-of-games"), `cache_name "selkies-image-cache-of-games" is too long`},
		{"longest name", with("cache_name", strings.Repeat("a", 26)), ""},
		{"upper case", with("cache_name", "Cache"), `cache_name "Cache"`},
		{"region as zone", with("zones", []string{"us-central1"}), `zones[0]: "us-central1" is not a zone`},
		{"zone twice", with("zones", []string{"us-central1-a", "us-central1-a"}), `zones[1]: "us-central1-a" is there twice`},
		{"zone as region", with("exclude_regions", []string{"us-central1-a"}), `exclude_regions[0]: "us-central1-a" is a zone; name its region, us-central1`},
		{"pattern", with("cluster_pattern", "("), "cluster_pattern: "},
		{"endpoint", with("cluster_endpoint", "both"), `cluster_endpoint is "both"`},
		{"own label", with("disk_labels", map[string]string{"selkies-image-cache": "a"}), `disk_labels: "selkies-image-cache"`},
		{"prefix without a dash", with("builder_disk_prefix", "packer"), `builder_disk_prefix "packer" is not`},
		{"prefix of everything", with("builder_disk_prefix", "-"), `builder_disk_prefix "-" is not`},
		{"size", with("disk_size_gb", -1), "disk_size_gb is -1"},
		{"keep", with("keep", -1), "keep is -1"},
		{"context alone", with("kubeconfig_context", "a"), "kubeconfig_context is set without kubeconfig"},
		{"kubeconfig without zones", with("kubeconfig", "a"), "kubeconfig is set without zones"},
		{"nothing to write", with("skip_rollout", true, "output_dir", "a"), "skip_rollout and output_dir are both set"},
		{"unknown option", with("zone", "a"), "zone"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			err := new(PostProcessor).Configure(tt.config)
			if tt.want == "" {
				if err != nil {
					t.Fatal(err)
				}
				return
			}
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error is %v, want one with %q", err, tt.want)
			}
		})
	}
}
