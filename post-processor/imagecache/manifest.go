package imagecache

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"path"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/util/yaml"

	"github.com/selkies-project/packer-plugin-selkies/example/kustomize"
)

// The objects are those of example/kustomize, from its files, so that a cluster gets
// the same by kubectl apply -k and from here. What kustomize patches in there for a
// disk is done here on Kubernetes' types: each disk is a different one, and kustomize
// as a library would be the larger half of the plugin. A test compares the two.
const (
	accessDir    = "base/access"
	gateDir      = "base/gate"
	daemonSetDir = "base/daemonset"
	diskFile     = "pvc/zonal-disk/disk.yaml"

	namespace = "selkies-image-cache" // as it stands in the files
)

// Labels of Kubernetes objects.
const (
	labelManagedBy = "app.kubernetes.io/managed-by"
	labelInstance  = "app.kubernetes.io/instance" // the name of the cache
	labelDisk      = "app.broker/cache-pd"        // of nodes, too: the Selkies broker knows it
	labelSource    = "app.broker/cache-image"     // the image that the disk was made from
	labelZone      = "selkies.io/zone"
	nodeZone       = "topology.kubernetes.io/zone"
)

// zoneDisk is a disk of a generation, as Kubernetes gets to know it.
type zoneDisk struct {
	config *Config
	name   string
	zone   string
	image  string
	sizeGB int64
}

func (d *zoneDisk) labels() map[string]string {
	return map[string]string{
		labelManagedBy: fieldManager, labelInstance: d.config.CacheName,
		labelDisk: d.name, labelSource: d.image, labelZone: d.zone,
	}
}

// gate is the DaemonSet that opens the gate of nodes whose disk cannot be attached.
// Each cache has its own, for its own nodes.
func (c *Config) gate() (*unstructured.Unstructured, error) {
	ds, err := c.daemonSet(gateDir)
	if err != nil {
		return nil, err
	}
	ds.Name = c.CacheName + "-gate"
	maps.Copy(ds.Labels, map[string]string{labelManagedBy: fieldManager, labelInstance: c.CacheName})
	ds.Spec.Selector.MatchLabels[labelInstance] = c.CacheName
	ds.Spec.Template.Labels[labelInstance] = c.CacheName
	return toUnstructured(ds)
}

// daemonSet is that of a folder, for the nodes and with the image of the
// configuration.
func (c *Config) daemonSet(dir string) (*appsv1.DaemonSet, error) {
	objects, err := kustomization(dir)
	if err != nil {
		return nil, err
	}
	var ds appsv1.DaemonSet
	if err := convert(objects[0], &ds); err != nil {
		return nil, err
	}
	pod := &ds.Spec.Template.Spec
	maps.Copy(pod.NodeSelector, c.NodeSelector)
	pod.Containers[0].Image = c.InjectorImage
	return &ds, nil
}

// volume are the PersistentVolume of a disk and the claim to it.
func (d *zoneDisk) volume() ([]*unstructured.Unstructured, error) {
	objects, err := decodeFile(diskFile)
	if err != nil {
		return nil, err
	}
	var out []*unstructured.Unstructured
	size := *resource.NewQuantity(d.sizeGB<<30, resource.BinarySI)
	for _, o := range objects {
		switch o.GetKind() {
		case "PersistentVolume":
			var pv corev1.PersistentVolume
			if err := convert(o, &pv); err != nil {
				return nil, err
			}
			pv.Name, pv.Labels = d.name, d.labels()
			pv.Spec.Capacity[corev1.ResourceStorage] = size
			pv.Spec.ClaimRef.Name = d.name
			pv.Spec.CSI.VolumeHandle = fmt.Sprintf("projects/%s/zones/%s/disks/%s", d.config.ProjectID, d.zone, d.name)
			pv.Spec.NodeAffinity.Required.NodeSelectorTerms[0].MatchExpressions[0].Values = []string{d.zone}
			if o, err = toUnstructured(&pv); err != nil {
				return nil, err
			}
		case "PersistentVolumeClaim":
			var pvc corev1.PersistentVolumeClaim
			if err := convert(o, &pvc); err != nil {
				return nil, err
			}
			pvc.Name, pvc.Labels = d.name, d.labels()
			pvc.Spec.VolumeName = d.name
			pvc.Spec.Resources.Requests[corev1.ResourceStorage] = size
			if o, err = toUnstructured(&pvc); err != nil {
				return nil, err
			}
		}
		out = append(out, o)
	}
	return out, nil
}

// daemonSet is the agent for the nodes of the disk's zone that have this disk, or
// none yet: a node keeps the generation that it began with.
func (d *zoneDisk) daemonSet() (*unstructured.Unstructured, error) {
	ds, err := d.config.daemonSet(daemonSetDir)
	if err != nil {
		return nil, err
	}
	app := maps.Clone(ds.Spec.Selector.MatchLabels)
	ds.Name = d.name
	maps.Copy(ds.Labels, d.labels())
	ds.Spec.Selector.MatchLabels[labelDisk] = d.name
	template := &ds.Spec.Template
	maps.Copy(template.Labels, map[string]string{labelDisk: d.name, labelInstance: d.config.CacheName})

	pod := &template.Spec
	c := &pod.Containers[0]
	c.Env = append(c.Env, corev1.EnvVar{Name: "SELKIES_CACHE_PD", Value: d.name})
	c.VolumeMounts = append(c.VolumeMounts, corev1.VolumeMount{Name: "cache", MountPath: "/cache", ReadOnly: true})
	pod.Volumes = append(pod.Volumes, corev1.Volume{Name: "cache", VolumeSource: corev1.VolumeSource{
		PersistentVolumeClaim: &corev1.PersistentVolumeClaimVolumeSource{ClaimName: d.name, ReadOnly: true},
	}})
	pod.Affinity = &corev1.Affinity{
		NodeAffinity:    d.nodes(has, hasNone),
		PodAntiAffinity: d.alone(app),
	}
	return toUnstructured(ds)
}

// What a node says of its disk.
const (
	has     = corev1.NodeSelectorOpIn
	hasNone = corev1.NodeSelectorOpDoesNotExist
)

// nodes are those of the zone of which one of the conditions holds.
func (d *zoneDisk) nodes(conditions ...corev1.NodeSelectorOperator) *corev1.NodeAffinity {
	var terms []corev1.NodeSelectorTerm
	for _, op := range conditions {
		label := corev1.NodeSelectorRequirement{Key: labelDisk, Operator: op}
		if op == has {
			label.Values = []string{d.name}
		}
		terms = append(terms, corev1.NodeSelectorTerm{MatchExpressions: []corev1.NodeSelectorRequirement{
			{Key: nodeZone, Operator: corev1.NodeSelectorOpIn, Values: []string{d.zone}}, label,
		}})
	}
	return &corev1.NodeAffinity{RequiredDuringSchedulingIgnoredDuringExecution: &corev1.NodeSelector{NodeSelectorTerms: terms}}
}

// alone keeps two generations off a node on which both could be scheduled, which is
// so from the moment that the new DaemonSet is there until the old one is locked. A
// pod of the same generation may be there: the one that an update replaces.
func (d *zoneDisk) alone(app map[string]string) *corev1.PodAntiAffinity {
	return &corev1.PodAntiAffinity{RequiredDuringSchedulingIgnoredDuringExecution: []corev1.PodAffinityTerm{{
		TopologyKey: corev1.LabelHostname,
		LabelSelector: &metav1.LabelSelector{
			MatchLabels: map[string]string{labelInstance: d.config.CacheName, "app.kubernetes.io/name": app["app.kubernetes.io/name"]},
			MatchExpressions: []metav1.LabelSelectorRequirement{
				{Key: labelDisk, Operator: metav1.LabelSelectorOpNotIn, Values: []string{d.name}},
			},
		},
	}}}
}

// kustomization are the objects of a folder's kustomization, which has resources
// only, in their order.
func kustomization(dir string) ([]*unstructured.Unstructured, error) {
	file := path.Join(dir, "kustomization.yaml")
	data, err := fs.ReadFile(kustomize.Files, file)
	if err != nil {
		return nil, err
	}
	var k struct {
		Resources []string `json:"resources"`
	}
	if err := yaml.Unmarshal(data, &k); err != nil {
		return nil, fmt.Errorf("reading %s: %w", file, err)
	}
	var objects []*unstructured.Unstructured
	for _, r := range k.Resources {
		o, err := decodeFile(path.Join(dir, r))
		if err != nil {
			return nil, err
		}
		objects = append(objects, o...)
	}
	return objects, nil
}

func decodeFile(file string) ([]*unstructured.Unstructured, error) {
	data, err := fs.ReadFile(kustomize.Files, file)
	if err != nil {
		return nil, err
	}
	objects, err := decode(data)
	if err != nil {
		return nil, fmt.Errorf("reading %s: %w", file, err)
	}
	return objects, nil
}

func decode(data []byte) (objects []*unstructured.Unstructured, err error) {
	decoder := yaml.NewYAMLOrJSONDecoder(bytes.NewReader(data), 4096)
	for {
		o := &unstructured.Unstructured{}
		err := decoder.Decode(o)
		if errors.Is(err, io.EOF) {
			return objects, nil
		}
		if err != nil {
			return nil, err
		}
		objects = append(objects, o)
	}
}

// convert refuses fields that the type does not have.
func convert(o *unstructured.Unstructured, into any) error {
	if err := runtime.DefaultUnstructuredConverter.FromUnstructuredWithValidation(o.Object, into, true); err != nil {
		return fmt.Errorf("reading %s %s: %w", o.GetKind(), o.GetName(), err)
	}
	return nil
}

// toUnstructured leaves out the status, which is not to be applied.
func toUnstructured(object any) (*unstructured.Unstructured, error) {
	m, err := runtime.DefaultUnstructuredConverter.ToUnstructured(object)
	if err != nil {
		return nil, err
	}
	delete(m, "status")
	return &unstructured.Unstructured{Object: m}, nil
}
