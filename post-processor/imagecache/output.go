package imagecache

import (
	"bytes"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"github.com/moby/sys/atomicwriter"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"sigs.k8s.io/yaml"
)

// writeManifests writes what would be applied to each cluster to a file of its own.
func (r *run) writeManifests() error {
	for _, k := range r.clusters {
		if len(k.zones) == 0 {
			continue
		}
		objects, err := k.manifests()
		if err != nil {
			return err
		}
		var text bytes.Buffer
		for _, o := range objects {
			data, err := yaml.Marshal(o.Object)
			if err != nil {
				return err
			}
			fmt.Fprintf(&text, "---\n%s", data)
		}
		file := filepath.Join(r.config.OutputDir, strings.ReplaceAll(k.String(), "/", "-")+".yaml")
		err = r.do("write "+file, func() error {
			if err := os.MkdirAll(r.config.OutputDir, 0o755); err != nil {
				return err
			}
			return atomicwriter.WriteFile(file, text.Bytes(), 0o644)
		})
		if err != nil {
			return fmt.Errorf("writing manifests: %w", err)
		}
	}
	return nil
}

// manifests are all objects of a cluster.
func (k *cluster) manifests() ([]*unstructured.Unstructured, error) {
	objects, err := kustomization(accessDir)
	if err != nil {
		return nil, err
	}
	gate, err := k.run.config.gate()
	if err != nil {
		return nil, err
	}
	objects = append(objects, gate)
	for _, zone := range k.zones {
		d := k.run.zoneDisk(zone)
		volume, err := d.volume()
		if err != nil {
			return nil, err
		}
		ds, err := d.daemonSet()
		if err != nil {
			return nil, err
		}
		objects = append(append(objects, volume...), ds)
	}
	return objects, nil
}
