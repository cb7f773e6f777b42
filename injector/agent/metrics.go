package agent

import (
	"net/http"
	"sync"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/selkies-project/packer-plugin-selkies/injector/report"
)

const namespace = "selkies_image_cache"

// metrics are those of /metrics: counters, and what the last pass found.
type metrics struct {
	registry *prometheus.Registry
	heals    *prometheus.CounterVec
	ejected  prometheus.Counter

	mu    sync.Mutex
	found found
}

// found is what a pass found. Nothing of it has more values than a node has images.
type found struct {
	ready, open bool
	images      map[string]int // by state
	layers      int
	ratio       map[string]float64 // by image
	seconds     float64            // of the last registration that had something to do
	readable    map[string]bool    // by cache ID
	built       map[string]int64   // likewise, Unix time
	proved      map[string]int     // layers, by cache ID
	broken      map[string]int     // likewise
}

func newMetrics() *metrics {
	m := &metrics{
		registry: prometheus.NewRegistry(),
		heals: prometheus.NewCounterVec(prometheus.CounterOpts{Namespace: namespace, Name: "heals_total",
			Help: "Images registered again, by what had taken them: pin (a pull replaced the labels), removed (someone), " +
				"runtime (containerd lost its state), mount (the disk's mount was dead)."}, []string{"reason"}),
		ejected: prometheus.NewCounter(prometheus.CounterOpts{Namespace: namespace, Name: "ejected_total",
			Help: "Times that a generation's images were ejected because its disk was gone."}),
	}
	for _, r := range []reason{reasonPin, reasonRemoved, reasonRuntime, reasonMount} {
		m.heals.WithLabelValues(string(r)) // 0 is a value too
	}
	m.registry.MustRegister(m, m.heals, m.ejected,
		collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return m
}

func (m *metrics) handler() http.Handler {
	return promhttp.HandlerFor(m.registry, promhttp.HandlerOpts{MaxRequestsInFlight: 2})
}

func describe(name, help string, labels ...string) *prometheus.Desc {
	return prometheus.NewDesc(prometheus.BuildFQName(namespace, "", name), help, labels, nil)
}

var (
	descReady  = describe("ready", "1 if nothing failed: all images of all cache disks are registered, but those removed or skipped. 0 if not, or if none is registered.")
	descGate   = describe("gate_open", "1 if pods are let onto the node, 0 while they wait for images.")
	descImages = describe("images", "Images of the cache disks by what became of them: registered are there, "+
		"skipped have names that the node uses for other images, failed could not be registered, removed were removed by someone.", "state")
	descLayers   = describe("layers", "Layers that are read from a cache disk, each counted once.")
	descRatio    = describe("image_layers_cached_ratio", "Share of the image's layers that are read from a cache disk, 0 to 1.", "image")
	descSeconds  = describe("last_registration_seconds", "How long the last registration that had something to do took.")
	descReadable = describe("disk_readable", "1 if the generation's disk can be read where containers read it, 0 if not.", "cache_id")
	descProved   = describe("layers_verified", "Layers of the generation that --verify-rate has proved.", "cache_id")
	descBroken   = describe("layers_damaged", "Layers of the generation that are not what was built.", "cache_id")
	descBuilt    = describe("build_timestamp_seconds", "When the generation was built, as Unix time.", "cache_id")
)

// Describe implements prometheus.Collector.
func (m *metrics) Describe(ch chan<- *prometheus.Desc) { prometheus.DescribeByCollect(m, ch) }

// Collect implements prometheus.Collector.
func (m *metrics) Collect(ch chan<- prometheus.Metric) {
	m.mu.Lock()
	f := m.found
	m.mu.Unlock()
	gauge := func(d *prometheus.Desc, v float64, labels ...string) {
		ch <- prometheus.MustNewConstMetric(d, prometheus.GaugeValue, v, labels...)
	}
	gauge(descReady, number(f.ready))
	gauge(descGate, number(f.open))
	gauge(descLayers, float64(f.layers))
	gauge(descSeconds, f.seconds)
	for state, n := range f.images {
		gauge(descImages, float64(n), state)
	}
	for image, ratio := range f.ratio {
		gauge(descRatio, ratio, image)
	}
	for cache, ok := range f.readable {
		gauge(descReadable, number(ok), cache)
	}
	for cache, n := range f.proved {
		gauge(descProved, float64(n), cache)
	}
	for cache, n := range f.broken {
		gauge(descBroken, float64(n), cache)
	}
	for cache, at := range f.built {
		gauge(descBuilt, float64(at), cache)
	}
}

// updateMetrics takes over what the last pass found.
func (a *Agent) updateMetrics() {
	f := found{
		ready:    a.last.ready(),
		open:     a.gate.isOpen(),
		images:   map[string]int{"registered": 0, "skipped": 0, "failed": 0, "removed": 0},
		ratio:    map[string]float64{},
		seconds:  a.took.Seconds(),
		readable: map[string]bool{},
		built:    map[string]int64{},
	}
	f.proved, f.broken = a.proofs.layers()
	for _, g := range a.generations {
		f.readable[g.CacheID.String()] = g.problem == nil
	}
	for _, d := range a.disks {
		f.built[d.ID.String()] = d.Manifest.Created.Unix()
	}
	if a.registered != nil {
		for _, d := range a.registered.Disks {
			f.layers += d.Cached
			for _, img := range d.Images {
				f.images[state(img)]++
				// The newest generation comes first.
				if _, ok := f.ratio[report.Title(img.Names)]; !ok && img.Layers > 0 {
					f.ratio[report.Title(img.Names)] = float64(img.Cached) / float64(img.Layers)
				}
			}
		}
	}
	a.metrics.mu.Lock()
	defer a.metrics.mu.Unlock()
	a.metrics.found = f
}

// state is the label of the metric images.
func state(img report.Image) string {
	switch {
	case img.State == report.Failed:
		return "failed"
	case len(img.Removed) > 0:
		return "removed"
	case img.State == report.Skipped:
		return "skipped"
	}
	return "registered"
}

func number(b bool) float64 {
	if b {
		return 1
	}
	return 0
}
