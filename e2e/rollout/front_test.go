//go:build e2e

package rollout_test

import (
	"encoding/base64"
	"encoding/pem"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"regexp"
	"strings"
	"sync"
	"testing"

	"cloud.google.com/go/container/apiv1/containerpb"
	"k8s.io/client-go/rest"
)

// front stands before the API server and fails.
type front struct {
	server *httptest.Server

	mu   sync.Mutex
	fail func(*http.Request) bool
}

func newFront(t *testing.T) *front {
	t.Helper()
	target, err := url.Parse(world.config.Host)
	if err != nil {
		t.Fatal(err)
	}
	proxy := httputil.NewSingleHostReverseProxy(target)
	// The caller brings its own credentials.
	if proxy.Transport, err = rest.TransportFor(rest.AnonymousClientConfig(world.config)); err != nil {
		t.Fatal(err)
	}
	f := &front{}
	f.server = httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		f.mu.Lock()
		fail := f.fail != nil && f.fail(r)
		f.mu.Unlock()
		if fail {
			// Of a connection that is cut client-go makes up for by itself.
			http.Error(w, "lost by the test", http.StatusInternalServerError)
			return
		}
		proxy.ServeHTTP(w, r)
	}))
	t.Cleanup(f.server.Close)
	return f
}

// failing fails the requests that match says, nil for none.
func (f *front) failing(match func(*http.Request) bool) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.fail = match
}

// cluster is the record of the cluster as one in which all is reached through here.
func (f *front) cluster(zones ...string) *containerpb.Cluster {
	ca := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: f.server.Certificate().Raw})
	return &containerpb.Cluster{
		Name: "broker-us-central1", Location: "us-central1",
		Endpoint:   strings.TrimPrefix(f.server.URL, "https://"),
		MasterAuth: &containerpb.MasterAuth{ClusterCaCertificate: base64.StdEncoding.EncodeToString(ca)},
		NodePools:  []*containerpb.NodePool{{Name: "tier1", Locations: zones}},
	}
}

// TestLostSurvey has a cluster fail when it is asked what it uses, some time after it has
// answered at first. Its node pools have left a zone in which it has volumes. Its node
// would take pods of other tests, so that it runs alone.
func TestLostSurvey(t *testing.T) {
	c := newCloud(t, "lost", administrator(t))
	c.tidy()
	f := newFront(t)
	addNode(t, "lb", zoneB)
	c.must(c.build(1))
	c.waitGenerations(map[string]string{"lb": c.diskName(zoneB, 1)})
	c.AddCluster(project, f.cluster(zoneA))
	// lose loses the surveys from the nth to the mth.
	lose := func(n, m int) {
		survey := 0
		f.failing(func(r *http.Request) bool {
			if strings.HasSuffix(r.URL.Path, "/volumeattachments") {
				survey++
			}
			return strings.HasSuffix(r.URL.Path, "/volumeattachments") && n <= survey && survey <= m
		})
	}

	// What goes wrong while room is made is no matter if it goes well afterwards.
	lose(2, 2)
	u := c.must(c.build(2), "keep", 1)
	if !strings.Contains(strings.Join(u.lines, "\n"), "making room: cluster us-central1/broker-us-central1: listing VolumeAttachments: ") {
		t.Errorf("the lost survey is not told of: %q", u.lines)
	}
	all := []string{image(1), image(2), c.disk(zoneB, 1), c.disk(zoneA, 2)}
	c.wantResources(all...)

	lose(2, 1000)
	err := c.process(t.Context(), &ui{}, c.build(3), "keep", 1)
	if err == nil || !strings.HasPrefix(err.Error(), "1 of 1 clusters failed: cluster us-central1/broker-us-central1: listing VolumeAttachments: ") {
		t.Errorf("error is %v", err)
	}
	c.wantResources(append(all, image(3), c.disk(zoneA, 3))...)

	f.failing(nil)
	c.must(artifact(imageName(3)), "keep", 1)
	c.wantResources(image(1), image(3), c.disk(zoneB, 1), c.disk(zoneA, 3))

	// With the last node the zone needs nothing any more.
	removeNode(t, "lb")
	c.must(artifact(imageName(3)), "keep", 1)
	c.waitObjects(c.three(zoneA, 3)...)
	c.wantResources(image(3), c.disk(zoneA, 3))
}

// TestClusterLost has the cluster refuse everything from a change on until the run's end,
// for each of the changes that a run makes there to disks' objects and to nodes.
func TestClusterLost(t *testing.T) {
	c := newCloud(t, "clusterlost", administrator(t))
	c.tidy()
	f := newFront(t)
	c.AddCluster(project, f.cluster(zoneA, zoneB))
	addNode(t, "ca", zoneA)
	addNode(t, "cb", zoneB)
	c.must(c.build(1))
	nodes := map[string]string{"ca": c.diskName(zoneA, 1), "cb": c.diskName(zoneB, 1)}
	c.waitGenerations(nodes)

	stamp := 1
	for n := 1; ; n++ {
		stamp++
		changes, last := 0, ""
		f.failing(func(r *http.Request) bool {
			// Without its lease a run would end sooner, and the next one wait for it to expire.
			if strings.Contains(r.URL.Path, "/leases/") {
				return false
			}
			if r.Method != http.MethodGet && regexp.MustCompile(`/(persistentvolume|daemonset|node)`).MatchString(r.URL.Path) && changes < n {
				changes++
				last = r.Method + " " + r.URL.Path
			}
			return changes == n
		})
		err := c.process(t.Context(), &ui{}, c.build(stamp), "start_timeout", "1s")
		f.failing(nil)
		if wrong := c.working(); wrong != nil {
			t.Fatalf("lost at %s: %v", last, wrong)
		}
		if changes < n {
			if err != nil {
				t.Fatal(err)
			}
			break
		}
		if err != nil && !strings.Contains(err.Error(), "lost by the test") {
			t.Errorf("lost at %s: %v", last, err)
		}
	}
	t.Logf("lost at %d changes", stamp-2)
	if stamp < 10 {
		t.Errorf("a run makes %d changes only", stamp-2)
	}
	c.settle(stamp, nodes)
}

// TestClusterElsewhere has a cluster whose name matches and which has none of the zones.
// Nothing is changed there.
func TestClusterElsewhere(t *testing.T) {
	c := newCloud(t, "elsewhere", administrator(t))
	c.tidy()
	f := newFront(t)
	f.failing(func(r *http.Request) bool { return r.Method != http.MethodGet })
	other := f.cluster("europe-west4-a")
	other.Name, other.Location = "broker-europe-west4", "europe-west4"
	c.AddCluster(project, other)
	c.must(c.build(1), "zones", []string{zoneA})
	c.waitObjects(c.three(zoneA, 1)...)
}
