package imagecache

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/docker/docker/api/types/image"
	"github.com/moby/sys/atomicwriter"
	"github.com/opencontainers/go-digest"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"golang.org/x/sync/errgroup"

	"github.com/selkies-project/packer-plugin-selkies/manifest"
	"github.com/selkies-project/packer-plugin-selkies/version"
)

func toolName() string { return "packer-plugin-selkies/" + version.String() }

// recorder describes the daemon's store in a layer manifest.
type recorder struct {
	engine   *engine
	platform ocispec.Platform
	store    manifest.Store
	// dataRoot is the store as the daemon sees it, an absolute path.
	dataRoot string
	// concurrency is how many images the daemon is asked for at once.
	concurrency int

	layers []manifest.Layer
	index  map[digest.Digest]int
}

// record describes the images given. All that it says of the store comes from the
// Engine API.
func (r *recorder) record(ctx context.Context, images []*wanted, created time.Time) (*manifest.Manifest, error) {
	m := &manifest.Manifest{
		SchemaVersion: manifest.SchemaVersion,
		Platform:      r.platform,
		Created:       created,
		Tool:          toolName(),
		Store:         r.store,
	}
	r.index = map[digest.Digest]int{}
	all := make([]stored, len(images))
	g, asking := errgroup.WithContext(ctx)
	g.SetLimit(r.concurrency)
	for i, w := range images {
		g.Go(func() (err error) {
			all[i], err = r.ask(asking, w)
			return explainRecord(w, err)
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	for i, w := range images {
		if err := r.recordLayers(w, all[i]); err != nil {
			return nil, explainRecord(w, err)
		}
	}
	m.Images = merge(images)
	m.Layers = r.layers
	return m, nil
}

// merge makes one image with all its names of those that several repositories have.
func merge(images []*wanted) (merged []manifest.Image) {
	index := map[digest.Digest]int{}
	for _, w := range images {
		target := w.image.Target().Digest
		i, known := index[target]
		if !known {
			i = len(merged)
			index[target] = i
			merged = append(merged, w.image)
		}
		merged[i].Names = append(merged[i].Names, w.names()...)
	}
	return merged
}

func explainRecord(w *wanted, err error) error {
	if err != nil {
		return fmt.Errorf("recording %s: %w", w, err)
	}
	return nil
}

// stored is what the daemon says of an image.
type stored struct {
	inspect image.InspectResponse
	history []image.HistoryResponseItem
}

func (r *recorder) ask(ctx context.Context, w *wanted) (s stored, err error) {
	if s.inspect, err = r.engine.ImageInspect(ctx, w.id()); err == nil {
		s.history, err = r.engine.ImageHistory(ctx, w.id())
	}
	return s, err
}

func (r *recorder) recordLayers(w *wanted, s stored) error {
	dirs, err := layerDirectories(s.inspect, path.Join(r.dataRoot, manifest.DriverOverlay2))
	if err != nil {
		return err
	}
	var config ocispec.Image
	if err := json.Unmarshal(w.image.Config.Data, &config); err != nil {
		return fmt.Errorf("reading its config: %w", err)
	}
	diffIDs := config.RootFS.DiffIDs
	if len(dirs) != len(diffIDs) {
		return fmt.Errorf("docker has %d layer directories, the image %d layers", len(dirs), len(diffIDs))
	}
	for i, d := range diffIDs {
		if got := s.inspect.RootFS.Layers[i]; got != d.String() {
			return fmt.Errorf("docker has %s as layer %d, the image's config %s", got, i, d)
		}
	}
	sizes := layerSizes(config.History, s.history, len(diffIDs), s.inspect.Size)
	parent := digest.Digest("")
	for i, chainID := range w.chain {
		if _, known := r.index[chainID]; !known {
			r.index[chainID] = len(r.layers)
			r.layers = append(r.layers, manifest.Layer{
				ChainID:   chainID,
				DiffID:    diffIDs[i],
				Parent:    parent,
				Directory: dirs[i],
				Size:      sizes[i],
			})
		}
		parent = chainID
	}
	return nil
}

// layerDirectories are the names of an image's layer directories in the driver's
// home, base layer first. The driver tells the top one and, from the top down,
// those below it.
func layerDirectories(inspect image.InspectResponse, home string) ([]string, error) {
	if len(inspect.RootFS.Layers) == 0 {
		return nil, nil
	}
	data := inspect.GraphDriver.Data
	paths := []string{data["UpperDir"]}
	if lower := data["LowerDir"]; lower != "" {
		paths = append(paths, strings.Split(lower, ":")...)
	}
	slices.Reverse(paths)
	dirs := make([]string, len(paths))
	for i, p := range paths {
		dir, ok := strings.CutPrefix(p, home+"/")
		dir, isDiff := strings.CutSuffix(dir, "/diff")
		if !ok || !isDiff || strings.Contains(dir, "/") {
			return nil, fmt.Errorf("docker has a layer in %q, which is no layer directory of %s", p, home)
		}
		dirs[i] = dir
	}
	return dirs, nil
}

// layerSizes takes the sizes of n layers, base layer first, from the image's
// history. The daemon gives it newest first and without saying which entries made
// no layer, which the config says. An image that was built without a history has
// none here either: then the top layer stands for what the others lack of the
// image's total.
func layerSizes(config []ocispec.History, history []image.HistoryResponseItem, n int, total int64) []int64 {
	sizes := make([]int64, 0, n)
	if len(history) == len(config) {
		for i, h := range config {
			if !h.EmptyLayer {
				sizes = append(sizes, history[len(history)-1-i].Size)
			}
		}
	}
	if len(sizes) == n {
		return sizes
	}
	sizes = make([]int64, n)
	if n > 0 {
		sizes[n-1] = total
	}
	return sizes
}

// readManifest reads the layer manifest of an earlier build, nil if there is none
// to go by.
func readManifest(ctx context.Context, r *vm, root string, say func(string, ...any)) (*manifest.Manifest, []byte, error) {
	name := path.Join(root, manifest.Path)
	data, err := r.run(ctx, "cat", name)
	if exitStatus(err) > 0 {
		return nil, nil, nil
	}
	if err != nil {
		return nil, nil, fmt.Errorf("reading the layer manifest %s: %w", name, err)
	}
	m, err := manifest.Decode(data)
	if err != nil {
		say("the earlier layer manifest is not readable and will be replaced: %v", err)
		return nil, data, nil
	}
	return m, data, nil
}

// writeManifest writes m to the disk, unless the one there says the same but for
// its date: an unchanged cache keeps its cache ID. It returns what is on the disk.
func writeManifest(ctx context.Context, r *vm, root string, m, earlier *manifest.Manifest, earlierData []byte) ([]byte, error) {
	if earlier != nil {
		same := *m
		same.Created = earlier.Created
		data, err := same.Encode()
		if err != nil {
			return nil, fmt.Errorf("encoding the layer manifest: %w", err)
		}
		if bytes.Equal(data, earlierData) {
			return data, nil
		}
	}
	data, err := m.Encode()
	if err != nil {
		return nil, fmt.Errorf("encoding the layer manifest: %w", err)
	}
	name := path.Join(root, manifest.Path)
	if _, err := r.run(ctx, "mkdir", "--parents", path.Dir(name)); err != nil {
		return nil, fmt.Errorf("writing the layer manifest to the disk: %w", err)
	}
	if err := r.writeFile(ctx, name, bytes.NewReader(data)); err != nil {
		return nil, fmt.Errorf("writing the layer manifest to the disk: %w", err)
	}
	return data, nil
}

// writeLocal writes a file on the Packer host, which an option names.
func writeLocal(option, name string, data []byte) error {
	if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
		return fmt.Errorf("writing %s: %w", option, err)
	}
	if err := atomicwriter.WriteFile(name, data, 0o644); err != nil {
		return fmt.Errorf("writing %s: %w", option, err)
	}
	return nil
}
