package gcp_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	compute "cloud.google.com/go/compute/apiv1"
	"cloud.google.com/go/compute/apiv1/computepb"
	"cloud.google.com/go/container/apiv1/containerpb"
	"github.com/google/go-cmp/cmp"
	"google.golang.org/api/googleapi"
	"google.golang.org/api/iterator"

	"github.com/selkies-project/packer-plugin-selkies/e2e/gcp"
)

const (
	project = "p"
	zone    = "us-central1-a"
)

// google is a server with its clients.
type google struct {
	*gcp.Server
	*gcp.Clients
}

func start(t *testing.T, config gcp.Config) *google {
	t.Helper()
	s := gcp.New(t, config)
	return &google{s, s.Clients(t)}
}

func result(t *testing.T, op *compute.Operation, err error) error {
	t.Helper()
	if err != nil {
		return err
	}
	return op.Wait(t.Context())
}

func (g *google) insertDisk(t *testing.T, d *computepb.Disk) error {
	t.Helper()
	op, err := g.Disks.Insert(t.Context(), &computepb.InsertDiskRequest{Project: project, Zone: zone, DiskResource: d})
	return result(t, op, err)
}

func (g *google) deleteDisk(t *testing.T, name string) error {
	t.Helper()
	op, err := g.Disks.Delete(t.Context(), &computepb.DeleteDiskRequest{Project: project, Zone: zone, Disk: name})
	return result(t, op, err)
}

func (g *google) insertImage(t *testing.T, i *computepb.Image) error {
	t.Helper()
	op, err := g.Images.Insert(t.Context(), &computepb.InsertImageRequest{Project: project, ImageResource: i})
	return result(t, op, err)
}

// newInstance is a VM with a boot disk from the image "debian" and others.
func newInstance(name string, disks ...*computepb.AttachedDisk) *computepb.Instance {
	boot := &computepb.AttachedDisk{Boot: new(true), AutoDelete: new(true), InitializeParams: &computepb.AttachedDiskInitializeParams{
		SourceImage: new("projects/debian-cloud/global/images/family/debian-12"),
	}}
	return &computepb.Instance{
		Name: &name, MachineType: new("zones/" + zone + "/machineTypes/e2-standard-2"), Disks: append([]*computepb.AttachedDisk{boot}, disks...),
		NetworkInterfaces: []*computepb.NetworkInterface{{Network: new("global/networks/default"), AccessConfigs: []*computepb.AccessConfig{{Name: new("nat")}}}},
	}
}

func (g *google) insertInstance(t *testing.T, i *computepb.Instance) error {
	t.Helper()
	op, err := g.Instances.Insert(t.Context(), &computepb.InsertInstanceRequest{Project: project, Zone: zone, InstanceResource: i})
	return result(t, op, err)
}

func (g *google) deleteInstance(t *testing.T, name string) error {
	t.Helper()
	op, err := g.Instances.Delete(t.Context(), &computepb.DeleteInstanceRequest{Project: project, Zone: zone, Instance: name})
	return result(t, op, err)
}

func addDebian(s *gcp.Server) {
	s.AddImage("debian-cloud", &computepb.Image{Name: new("debian-12-v1"), Family: new("debian-12")})
}

// hardware records what it is asked to make.
type hardware struct {
	mu   sync.Mutex
	did  []string
	fail string // what begins with it fails
}

func (h *hardware) do(format string, args ...any) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	what := fmt.Sprintf(format, args...)
	h.did = append(h.did, what)
	if h.fail != "" && strings.HasPrefix(what, h.fail) {
		return errors.New("broken")
	}
	return nil
}

func (h *hardware) CreateDisk(_ context.Context, disk, image string, size int64) error {
	return h.do("create %s from %q, %d GB", disk, image, size>>30)
}
func (h *hardware) DeleteDisk(_ context.Context, disk string) error { return h.do("delete %s", disk) }
func (h *hardware) CreateImage(_ context.Context, image, disk string) error {
	return h.do("create %s from %s", image, disk)
}
func (h *hardware) DeleteImage(_ context.Context, image string) error {
	return h.do("delete %s", image)
}
func (h *hardware) StartInstance(_ context.Context, instance string, metadata map[string]string, disks []gcp.Attachment) (gcp.Address, error) {
	return gcp.Address{External: "127.0.0.2", Internal: "127.0.0.3"}, h.do("start %s with %v and %v", instance, metadata, disks)
}
func (h *hardware) DeleteInstance(_ context.Context, instance string) error {
	return h.do("delete %s", instance)
}
func (h *hardware) SetMetadata(_ context.Context, instance string, metadata map[string]string) error {
	return h.do("tell %s %v", instance, metadata)
}
func (h *hardware) AttachDisk(_ context.Context, instance string, a gcp.Attachment) error {
	return h.do("attach to %s %v", instance, a)
}
func (h *hardware) DetachDisk(_ context.Context, instance string, a gcp.Attachment) error {
	return h.do("detach from %s %v", instance, a)
}
func (h *hardware) SerialOutput(string) string { return "Linux version 6" }

// TestLifeOfACache goes the way of a build: a disk, a VM that fills it, an image, a
// disk of the image.
func TestLifeOfACache(t *testing.T) {
	h := &hardware{}
	g := start(t, gcp.Config{Hardware: h})
	addDebian(g.Server)
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	must(g.insertDisk(t, &computepb.Disk{Name: new("cache"), SizeGb: new(int64(20)), Type: new("zones/" + zone + "/diskTypes/pd-balanced"), Labels: map[string]string{"app": "cache"}}))
	vm := newInstance("vm", &computepb.AttachedDisk{Source: new("zones/" + zone + "/disks/cache"), DeviceName: new("data")})
	vm.Metadata = &computepb.Metadata{Items: []*computepb.Items{{Key: new("ssh-keys"), Value: new("me:key")}}}
	must(g.insertInstance(t, vm))

	got, err := g.Instances.Get(t.Context(), &computepb.GetInstanceRequest{Project: project, Zone: zone, Instance: "vm"})
	must(err)
	if got.GetStatus() != "RUNNING" || got.NetworkInterfaces[0].AccessConfigs[0].GetNatIP() != "127.0.0.2" || got.NetworkInterfaces[0].GetNetworkIP() != "127.0.0.3" {
		t.Errorf("the instance is %v", got)
	}
	disk, err := g.Disks.Get(t.Context(), &computepb.GetDiskRequest{Project: project, Zone: zone, Disk: "cache"})
	must(err)
	if len(disk.Users) != 1 || !strings.HasSuffix(disk.Users[0], "/instances/vm") || disk.GetStatus() != "READY" {
		t.Errorf("the disk is %v", disk)
	}
	output, err := g.Instances.GetSerialPortOutput(t.Context(), &computepb.GetSerialPortOutputInstanceRequest{Project: project, Zone: zone, Instance: "vm"})
	must(err)
	if output.GetContents() != "Linux version 6" {
		t.Errorf("serial output %q", output.GetContents())
	}

	// What is in use stays.
	for what, err := range map[string]error{
		"delete": g.deleteDisk(t, "cache"),
		"image":  g.insertImage(t, &computepb.Image{Name: new("cache-1"), SourceDisk: disk.SelfLink}),
		"attach": g.insertInstance(t, newInstance("other", &computepb.AttachedDisk{Source: disk.SelfLink})),
	} {
		want := "The disk resource 'projects/p/zones/us-central1-a/disks/cache' is already being used by 'projects/p/zones/us-central1-a/instances/vm'"
		if e, ok := errors.AsType[*googleapi.Error](err); !ok || e.Code != http.StatusBadRequest || e.Message != want || e.Errors[0].Reason != "resourceInUseByAnotherResource" {
			t.Errorf("%s: %v", what, err)
		}
	}
	must(g.deleteInstance(t, "vm"))
	must(g.insertImage(t, &computepb.Image{Name: new("cache-1"), Family: new("cache"), SourceDisk: new("/compute/v1/projects/p/zones/us-central1-a/disks/cache")}))
	must(g.deleteDisk(t, "cache"))
	must(g.insertDisk(t, &computepb.Disk{Name: new("zonal"), SourceImage: new("projects/p/global/images/family/cache")}))
	must(g.deleteDisk(t, "zonal"))
	op, err := g.Images.Delete(t.Context(), &computepb.DeleteImageRequest{Project: project, Image: "cache-1"})
	gcp.Wait(t, op, err)

	want := []string{
		`create projects/p/zones/us-central1-a/disks/cache from "", 20 GB`,
		`create projects/p/zones/us-central1-a/disks/vm from "projects/debian-cloud/global/images/debian-12-v1", 10 GB`,
		"start projects/p/zones/us-central1-a/instances/vm with map[ssh-keys:me:key] and " +
			"[{projects/p/zones/us-central1-a/disks/vm persistent-disk-0 false true} {projects/p/zones/us-central1-a/disks/cache data false false}]",
		"delete projects/p/zones/us-central1-a/instances/vm",
		"delete projects/p/zones/us-central1-a/disks/vm",
		"create projects/p/global/images/cache-1 from projects/p/zones/us-central1-a/disks/cache",
		"delete projects/p/zones/us-central1-a/disks/cache",
		`create projects/p/zones/us-central1-a/disks/zonal from "projects/p/global/images/cache-1", 20 GB`,
		"delete projects/p/zones/us-central1-a/disks/zonal",
		"delete projects/p/global/images/cache-1",
	}
	if diff := cmp.Diff(want, h.did); diff != "" {
		t.Errorf("the hardware did (-want +got):\n%s", diff)
	}
	if diff := cmp.Diff([]string{"projects/debian-cloud/global/images/debian-12-v1"}, g.Resources()); diff != "" {
		t.Errorf("left over: %s", diff)
	}
}

// TestBrokenHardware leaves nothing of what could not be made.
func TestBrokenHardware(t *testing.T) {
	for _, fail := range []string{"create projects/p/zones/us-central1-a/disks/vm", "start"} {
		t.Run(fail, func(t *testing.T) {
			g := start(t, gcp.Config{Hardware: &hardware{fail: fail}})
			addDebian(g.Server)
			before := g.Resources()
			err := g.insertInstance(t, newInstance("vm"))
			if err == nil || !strings.Contains(err.Error(), "INTERNAL SERVER ERROR") || !strings.Contains(err.Error(), "broken") {
				t.Errorf("the operation ended with %v", err)
			}
			if diff := cmp.Diff(before, g.Resources()); diff != "" {
				t.Error(diff)
			}
		})
	}
}

// TestExistingDisk makes a VM the way the googlecompute builder does, which makes a
// disk first and then names it in initializeParams: what is there is attached.
func TestExistingDisk(t *testing.T) {
	g := start(t, gcp.Config{})
	addDebian(g.Server)
	if err := g.insertDisk(t, &computepb.Disk{Name: new("data"), SourceImage: new("projects/debian-cloud/global/images/debian-12-v1"), SizeGb: new(int64(30))}); err != nil {
		t.Fatal(err)
	}
	disk := &computepb.AttachedDisk{DeviceName: new("data"), InitializeParams: &computepb.AttachedDiskInitializeParams{
		DiskName: new("data"), SourceImage: new("projects/debian-cloud/global/images/debian-12-v1"),
	}}
	if err := g.insertInstance(t, newInstance("vm", disk)); err != nil {
		t.Fatal(err)
	}
	got, err := g.Disks.Get(t.Context(), &computepb.GetDiskRequest{Project: project, Zone: zone, Disk: "data"})
	if err != nil || got.GetSizeGb() != 30 || len(got.Users) != 1 {
		t.Errorf("the disk is %v: %v", got, err)
	}
}

// TestProtocol has what no client library does of itself.
func TestProtocol(t *testing.T) {
	s := gcp.New(t, gcp.Config{Token: "secret"})
	addDebian(s)
	const instance = `{"name": "vm", "machineType": "zones/us-central1-a/machineTypes/e2-standard-2",
		"disks": [{"boot": true, "initializeParams": {"sourceImage": "https://www.googleapis.com/compute/v1/projects/debian-cloud/global/images/debian-12-v1"}}],
		"networkInterfaces": [{"network": "global/networks/default", "accessConfigs": [null]}]}`
	const zonal = "/compute/v1/projects/p/zones/us-central1-a"
	tests := []struct {
		name, token, method, path, body string
		status                          int
		want                            string
	}{
		{"no token", "", "GET", zonal, "", 401, `"reason":"authError"`},
		{"zone", "secret", "GET", zonal, "", 200, `https://www.googleapis.com/compute/v1/projects/p/regions/us-central1`},
		{"unknown field", "secret", "POST", zonal + "/disks", `{"nmae": "d"}`, 400, "nmae"},
		{"null as the builder sends it", "secret", "POST", zonal + "/instances", instance, 200, "compute#operation"},
		{"unknown method", "secret", "GET", "/compute/v1/projects/p/global/snapshots", "", 501, "package gcp has no GET /compute/v1/projects/p/global/snapshots"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			r, err := http.NewRequestWithContext(t.Context(), tt.method, s.URL+tt.path, strings.NewReader(tt.body))
			if err != nil {
				t.Fatal(err)
			}
			r.Header.Set("Authorization", "Bearer "+tt.token)
			answer, err := http.DefaultClient.Do(r)
			if err != nil {
				t.Fatal(err)
			}
			defer answer.Body.Close()
			body, err := io.ReadAll(answer.Body)
			if err != nil || answer.StatusCode != tt.status || !strings.Contains(string(body), tt.want) {
				t.Errorf("%s %v: %s", answer.Status, err, body)
			}
		})
	}
}

func googleapiError(err error, code int, reason string) bool {
	e, ok := errors.AsType[*googleapi.Error](err)
	return ok && e.Code == code && len(e.Errors) == 1 && e.Errors[0].Reason == reason
}

// TestRefused has what Google refuses.
func TestRefused(t *testing.T) {
	g := start(t, gcp.Config{})
	addDebian(g.Server)
	if err := g.insertDisk(t, &computepb.Disk{Name: new("there"), SizeGb: new(int64(50))}); err != nil {
		t.Fatal(err)
	}
	if err := g.insertImage(t, &computepb.Image{Name: new("image"), SourceDisk: new("zones/" + zone + "/disks/there")}); err != nil {
		t.Fatal(err)
	}
	before := g.Resources()
	tests := []struct {
		name   string
		err    error
		code   int
		reason string
		want   string
	}{
		{"name", g.insertDisk(t, &computepb.Disk{Name: new("Cache_1")}), 400, "invalid", "Invalid value for field 'resource.name': 'Cache_1'."},
		{"long name", g.insertDisk(t, &computepb.Disk{Name: new(strings.Repeat("a", 64))}), 400, "invalid", "resource.name"},
		{"label", g.insertDisk(t, &computepb.Disk{Name: new("d"), Labels: map[string]string{"id": "sha256:1"}}), 400, "invalid", "Label value 'sha256:1' violates format constraints"},
		{"again", g.insertDisk(t, &computepb.Disk{Name: new("there")}), 409, "alreadyExists", "The resource 'projects/p/zones/us-central1-a/disks/there' already exists"},
		{"too small", g.insertDisk(t, &computepb.Disk{Name: new("d"), SizeGb: new(int64(20)), SourceImage: new("global/images/image")}), 400, "invalid", "Requested disk size cannot be smaller than the image size (50 GB)"},
		{"no image", g.insertDisk(t, &computepb.Disk{Name: new("d"), SourceImage: new("global/images/none")}), 404, "notFound", "The resource 'projects/p/global/images/none' was not found"},
		{"no family", g.insertDisk(t, &computepb.Disk{Name: new("d"), SourceImage: new("global/images/family/none")}), 404, "notFound", "'projects/p/global/images/family/none'"},
		{"disk type", g.insertDisk(t, &computepb.Disk{Name: new("d"), Type: new("pd-ssd")}), 400, "invalid", "resource.type"},
		{"delete", g.deleteDisk(t, "none"), 404, "notFound", "'projects/p/zones/us-central1-a/disks/none' was not found"},
		{"image of no disk", g.insertImage(t, &computepb.Image{Name: new("i"), SourceDisk: new("zones/" + zone + "/disks/none")}), 404, "notFound", "disks/none"},
		{"VM with no such disk", g.insertInstance(t, newInstance("vm", &computepb.AttachedDisk{Source: new("zones/" + zone + "/disks/none")})), 404, "notFound", "disks/none"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if !googleapiError(tt.err, tt.code, tt.reason) || !strings.Contains(tt.err.Error(), tt.want) {
				t.Errorf("want %d %s %q, got %v", tt.code, tt.reason, tt.want, tt.err)
			}
		})
	}
	if diff := cmp.Diff(before, g.Resources()); diff != "" {
		t.Errorf("what was refused left something: %s", diff)
	}
	op, err := g.Disks.Insert(t.Context(), &computepb.InsertDiskRequest{Project: project, Zone: "us-central1-e", DiskResource: &computepb.Disk{Name: new("d")}})
	if err == nil || !strings.Contains(err.Error(), "Unknown zone") {
		t.Errorf("a zone that is not there: %v, %v", op, err)
	}
}

// TestLists pages, filters and sorts.
func TestLists(t *testing.T) {
	now := time.Date(2026, 11, 1, 0, 30, 0, 0, time.UTC)
	g := start(t, gcp.Config{PageSize: 2, Now: func() time.Time { now = now.Add(time.Minute); return now }})
	if err := g.insertDisk(t, &computepb.Disk{Name: new("d")}); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"c", "a", "e", "b", "d"} {
		image := &computepb.Image{Name: &name, Family: new("cache"), SourceDisk: new("zones/" + zone + "/disks/d"), Labels: map[string]string{"generation": name}}
		if name == "b" {
			image.Family = nil
		}
		if err := g.insertImage(t, image); err != nil {
			t.Fatal(err)
		}
	}
	tests := []struct{ filter, order, want string }{
		{"", "", "a b c d e"},
		{"", "creationTimestamp desc", "d b e a c"},
		{"family = cache", "creationTimestamp desc", "d e a c"},
		{"family=cache AND labels.generation != e", "", "a c d"},
		{`(family = "cache") (name != "a")`, "", "c d e"},
		{"name = a OR name = b", "", "a b"},
		{"NOT family:*", "", "b"},
		{"labels.none:*", "", ""},
		{"name eq [ab]", "", "a b"},
		{"name ne a.*|[bc]", "", "d e"},
		{"diskSizeGb >= 500 name:d*", "", "d"},
		{"diskSizeGb < 500", "", ""},
	}
	for _, tt := range tests {
		t.Run(tt.filter+" "+tt.order, func(t *testing.T) {
			request := &computepb.ListImagesRequest{Project: project, MaxResults: new(uint32(3))}
			if tt.filter != "" {
				request.Filter = &tt.filter
			}
			if tt.order != "" {
				request.OrderBy = &tt.order
			}
			if got := names(t, g.Images.List(t.Context(), request).Next); strings.Join(got, " ") != tt.want {
				t.Errorf("got %v", got)
			}
		})
	}
	for _, filter := range []string{"name", "name = ", "(name = a", "name ~ a", "name = a)", "AND"} {
		_, err := g.Images.List(t.Context(), &computepb.ListImagesRequest{Project: project, Filter: &filter}).Next()
		if err == nil || !strings.Contains(err.Error(), "Invalid list filter expression") {
			t.Errorf("filter %q: %v", filter, err)
		}
	}
	image, err := g.Images.GetFromFamily(t.Context(), &computepb.GetFromFamilyImageRequest{Project: project, Family: "cache"})
	if err != nil || image.GetName() != "d" {
		t.Errorf("the newest is %v: %v", image, err)
	}
	op, err := g.Images.Deprecate(t.Context(), &computepb.DeprecateImageRequest{Project: project, Image: "d", DeprecationStatusResource: &computepb.DeprecationStatus{State: new("DEPRECATED")}})
	gcp.Wait(t, op, err)
	image, err = g.Images.GetFromFamily(t.Context(), &computepb.GetFromFamilyImageRequest{Project: project, Family: "cache"})
	if err != nil || image.GetName() != "e" {
		t.Errorf("the newest that is not deprecated is %v: %v", image, err)
	}
}

// TestDeleteWhileListing deletes each disk as it is listed, in pages of one.
func TestDeleteWhileListing(t *testing.T) {
	g := start(t, gcp.Config{PageSize: 1})
	for _, name := range []string{"a", "b", "c"} {
		if err := g.insertDisk(t, &computepb.Disk{Name: &name}); err != nil {
			t.Fatal(err)
		}
	}
	it := g.Disks.List(t.Context(), &computepb.ListDisksRequest{Project: project, Zone: zone})
	got := names(t, func() (*computepb.Disk, error) {
		d, err := it.Next()
		if err != nil {
			return nil, err
		}
		return d, g.deleteDisk(t, d.GetName())
	})
	if strings.Join(got, " ") != "a b c" {
		t.Errorf("listed %v", got)
	}
}

// names goes through all pages.
func names[T interface{ GetName() string }](t *testing.T, next func() (T, error)) []string {
	t.Helper()
	var all []string
	for {
		r, err := next()
		if errors.Is(err, iterator.Done) {
			return all
		}
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, r.GetName())
	}
}

// TestAggregatedList finds disks of all zones, over several pages.
func TestAggregatedList(t *testing.T) {
	g := start(t, gcp.Config{PageSize: 2})
	for i, z := range []string{"us-central1-f", zone, "europe-west4-b", zone, zone} {
		op, err := g.Disks.Insert(t.Context(), &computepb.InsertDiskRequest{Project: project, Zone: z, DiskResource: &computepb.Disk{
			Name: new(fmt.Sprint("d", i)), Labels: map[string]string{"n": fmt.Sprint(i)},
		}})
		gcp.Wait(t, op, err)
	}
	var got []string
	it := g.Disks.AggregatedList(t.Context(), &computepb.AggregatedListDisksRequest{Project: project, Filter: new("labels.n != 3")})
	for {
		pair, err := it.Next()
		if errors.Is(err, iterator.Done) {
			break
		}
		if err != nil {
			t.Fatal(err)
		}
		for _, d := range pair.Value.Disks {
			got = append(got, pair.Key+" "+d.GetName())
		}
	}
	slices.Sort(got)
	want := []string{"zones/europe-west4-b d2", "zones/us-central1-a d1", "zones/us-central1-a d4", "zones/us-central1-f d0"}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}
}

func TestLabels(t *testing.T) {
	g := start(t, gcp.Config{})
	if err := g.insertDisk(t, &computepb.Disk{Name: new("d"), Labels: map[string]string{"a": "1"}}); err != nil {
		t.Fatal(err)
	}
	set := func(labels map[string]string, fingerprint *string) error {
		op, err := g.Disks.SetLabels(t.Context(), &computepb.SetLabelsDiskRequest{Project: project, Zone: zone, Resource: "d",
			ZoneSetLabelsRequestResource: &computepb.ZoneSetLabelsRequest{Labels: labels, LabelFingerprint: fingerprint}})
		return result(t, op, err)
	}
	get := func() *computepb.Disk {
		d, err := g.Disks.Get(t.Context(), &computepb.GetDiskRequest{Project: project, Zone: zone, Disk: "d"})
		if err != nil {
			t.Fatal(err)
		}
		return d
	}
	old := get().LabelFingerprint
	if err := set(map[string]string{"a": "2"}, old); err != nil {
		t.Fatal(err)
	}
	if err := set(map[string]string{"a": "3"}, old); !googleapiError(err, http.StatusPreconditionFailed, "conditionNotMet") {
		t.Errorf("an old fingerprint: %v", err)
	}
	if got := get().Labels["a"]; got != "2" {
		t.Errorf("the label is %q", got)
	}
}

// TestFaults loses and fails calls in the ways that a client must survive.
func TestFaults(t *testing.T) {
	const path = "projects/p/zones/us-central1-a/disks/d"
	tests := []struct {
		name  string
		fault gcp.Fault
		want  string // the error
		there bool   // the disk
	}{
		{"error", gcp.Fault{Call: "disks.insert", Error: &gcp.Error{Code: 503, Reason: "backendError", Message: "Backend Error"}}, "Backend Error", false},
		{"any method", gcp.Fault{Call: "disks.*", Error: &gcp.Error{Code: 500, Reason: "backendError", Message: "Backend Error"}}, "Backend Error", false},
		{"another method", gcp.Fault{Call: "images.*", LoseRequest: true}, "", true},
		{"later", gcp.Fault{Call: "disks.insert", After: 1, LoseRequest: true}, "", true},
		{"lost request", gcp.Fault{Call: "disks.insert", LoseRequest: true}, "EOF", false},
		{"lost answer", gcp.Fault{Call: "disks.insert", LoseAnswer: true}, "EOF", true},
		{"delay", gcp.Fault{Call: "disks.insert", Delay: time.Millisecond}, "", true},
		{"operation", gcp.Fault{Call: "disks.insert", Operation: gcp.ZoneExhausted(zone)}, "SERVICE UNAVAILABLE: errors:{code:\"ZONE_RESOURCE_POOL_EXHAUSTED\"", false},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			g := start(t, gcp.Config{})
			g.Inject(tt.fault)
			err := g.insertDisk(t, &computepb.Disk{Name: new("d")})
			// The text form of protocol buffers has blanks at random.
			said := strings.ReplaceAll(fmt.Sprint(err), "  ", " ")
			if (err == nil) != (tt.want == "") || err != nil && !strings.Contains(said, tt.want) {
				t.Errorf("want %q, got %v", tt.want, err)
			}
			if there := slices.Contains(g.Resources(), path); there != tt.there {
				t.Errorf("the disk is there: %v", there)
			}
			if err := g.insertDisk(t, &computepb.Disk{Name: new("another")}); err != nil && tt.fault.After == 0 {
				t.Errorf("the next call: %v", err)
			}
		})
	}
}

// TestSameRequest repeats a request whose answer was lost.
func TestSameRequest(t *testing.T) {
	g := start(t, gcp.Config{})
	g.Inject(gcp.Fault{Call: "disks.insert", LoseAnswer: true})
	request := &computepb.InsertDiskRequest{Project: project, Zone: zone, RequestId: new("3f0c7a52-1d4e-4a9b-8b52-0d6f0a1c2b3d"), DiskResource: &computepb.Disk{Name: new("d")}}
	if _, err := g.Disks.Insert(t.Context(), request); err == nil {
		t.Fatal("the answer came")
	}
	op, err := g.Disks.Insert(t.Context(), request)
	gcp.Wait(t, op, err)
}

func TestPermissions(t *testing.T) {
	g := start(t, gcp.Config{})
	g.Deny("compute.disks.create")
	err := g.insertDisk(t, &computepb.Disk{Name: new("d"), Labels: map[string]string{"a": "b"}})
	want := "Required 'compute.disks.create' permission for 'projects/p/zones/us-central1-a/disks/d'"
	if !googleapiError(err, http.StatusForbidden, "forbidden") || !strings.Contains(err.Error(), want) {
		t.Errorf("got %v", err)
	}
	g.Allow("compute.disks.create")
	if err := g.insertDisk(t, &computepb.Disk{Name: new("d"), Labels: map[string]string{"a": "b"}}); err != nil {
		t.Error(err)
	}
	if diff := cmp.Diff([]string{"compute.disks.create", "compute.disks.setLabels", "compute.zoneOperations.get"}, g.Needed()); diff != "" {
		t.Error(diff)
	}
	g.Deny("container.clusters.list")
	_, err = g.Clusters.ListClusters(t.Context(), &containerpb.ListClustersRequest{Parent: "projects/p/locations/-"})
	if err == nil || !strings.Contains(err.Error(), `Required "container.clusters.list" permission(s) for "projects/p".`) {
		t.Errorf("got %v", err)
	}
}

// TestQuota is hit by the second disk of a region, and only while it is made.
func TestQuota(t *testing.T) {
	g := start(t, gcp.Config{})
	g.SetQuota(project, "us-central1", "SSD_TOTAL_GB", 100)
	ssd := func(name string) *computepb.Disk {
		return &computepb.Disk{Name: &name, SizeGb: new(int64(60)), Type: new("zones/" + zone + "/diskTypes/pd-balanced")}
	}
	if err := g.insertDisk(t, ssd("a")); err != nil {
		t.Fatal(err)
	}
	op, err := g.Disks.Insert(t.Context(), &computepb.InsertDiskRequest{Project: project, Zone: zone, DiskResource: ssd("b")})
	if err != nil {
		t.Fatal(err)
	}
	err = op.Wait(t.Context())
	if err == nil || !strings.Contains(err.Error(), "403: FORBIDDEN") || !strings.Contains(err.Error(), "Quota 'SSD_TOTAL_GB' exceeded.  Limit: 100.0 in region us-central1.") {
		t.Errorf("got %v", err)
	}
	if errors := op.Proto().GetError().GetErrors(); len(errors) != 1 || errors[0].GetCode() != "QUOTA_EXCEEDED" {
		t.Errorf("the operation's errors are %v", errors)
	}
	g.SetQuota(project, "us-central1", "SSD_TOTAL_GB", 120)
	if err := g.insertDisk(t, ssd("b")); err != nil {
		t.Errorf("with a higher limit: %v", err)
	}
}

// TestRunningOperation sees a disk while it is made.
func TestRunningOperation(t *testing.T) {
	h := &slow{hardware: hardware{}, free: make(chan struct{})}
	g := start(t, gcp.Config{Hardware: h})
	op, err := g.Disks.Insert(t.Context(), &computepb.InsertDiskRequest{Project: project, Zone: zone, DiskResource: &computepb.Disk{Name: new("d")}})
	if err != nil {
		t.Fatal(err)
	}
	if err := op.Poll(t.Context()); err != nil || op.Done() {
		t.Errorf("the operation is %v: %v", op.Proto(), err)
	}
	if err := g.deleteDisk(t, "d"); !googleapiError(err, http.StatusBadRequest, "resourceNotReady") {
		t.Errorf("deleting what is being made: %v", err)
	}
	close(h.free)
	gcp.Wait(t, op, err)
}

type slow struct {
	hardware
	free chan struct{}
}

func (h *slow) CreateDisk(context.Context, string, string, int64) error {
	<-h.free
	return nil
}

// TestMaxRunDuration has an instance whose time is up, and one that has time.
func TestMaxRunDuration(t *testing.T) {
	h := &hardware{}
	g := start(t, gcp.Config{Hardware: h})
	addDebian(g.Server)
	for name, seconds := range map[string]int64{"short": 3600, "long": 7200} {
		i := newInstance(name)
		i.Scheduling = &computepb.Scheduling{MaxRunDuration: &computepb.Duration{Seconds: &seconds}, InstanceTerminationAction: new("DELETE")}
		if err := g.insertInstance(t, i); err != nil {
			t.Fatal(err)
		}
	}
	g.Forward(time.Hour)
	want := []string{"projects/debian-cloud/global/images/debian-12-v1", "projects/p/zones/us-central1-a/disks/long", "projects/p/zones/us-central1-a/instances/long"}
	if diff := cmp.Diff(want, g.Resources()); diff != "" {
		t.Error(diff)
	}
	if !slices.Contains(h.did, "delete projects/p/zones/us-central1-a/instances/short") {
		t.Errorf("the hardware did %q", h.did)
	}
}

// TestReadOnly attaches a disk to several nodes.
func TestReadOnly(t *testing.T) {
	g := start(t, gcp.Config{})
	if err := g.insertDisk(t, &computepb.Disk{Name: new("d")}); err != nil {
		t.Fatal(err)
	}
	attach := func(node, mode string) error {
		op, err := g.Instances.AttachDisk(t.Context(), &computepb.AttachDiskInstanceRequest{Project: project, Zone: zone, Instance: node,
			AttachedDiskResource: &computepb.AttachedDisk{Source: new("zones/" + zone + "/disks/d"), Mode: &mode, DeviceName: new("cache")}})
		return result(t, op, err)
	}
	for _, node := range []string{"n1", "n2", "n3"} {
		g.AddInstance(project, zone, node)
	}
	for _, node := range []string{"n1", "n2"} {
		if err := attach(node, "READ_ONLY"); err != nil {
			t.Fatal(err)
		}
	}
	if err := attach("n3", "READ_WRITE"); !googleapiError(err, http.StatusBadRequest, "resourceInUseByAnotherResource") {
		t.Errorf("writing to what others read: %v", err)
	}
	for _, node := range []string{"n1", "n2"} {
		if err := g.deleteDisk(t, "d"); !googleapiError(err, http.StatusBadRequest, "resourceInUseByAnotherResource") {
			t.Errorf("deleting what %s reads: %v", node, err)
		}
		op, err := g.Instances.DetachDisk(t.Context(), &computepb.DetachDiskInstanceRequest{Project: project, Zone: zone, Instance: node, DeviceName: "cache"})
		gcp.Wait(t, op, err)
	}
	if err := g.deleteDisk(t, "d"); err != nil {
		t.Error(err)
	}
}

func TestClusters(t *testing.T) {
	g := start(t, gcp.Config{})
	g.AddCluster(project, &containerpb.Cluster{Name: "west", Location: "us-central1", Locations: []string{zone, "us-central1-f"}, Endpoint: "192.0.2.7",
		MasterAuth: &containerpb.MasterAuth{ClusterCaCertificate: "Y2VydA=="}, NodePools: []*containerpb.NodePool{{Name: "gpu", Locations: []string{zone}}}})
	g.AddCluster(project, &containerpb.Cluster{Name: "east", Location: "europe-west4-b", Locations: []string{"europe-west4-b"}})
	g.AddCluster("other", &containerpb.Cluster{Name: "theirs", Location: zone})
	for location, want := range map[string]string{"-": "west east", "us-central1": "west", "asia-east1": ""} {
		answer, err := g.Clusters.ListClusters(t.Context(), &containerpb.ListClustersRequest{Parent: "projects/p/locations/" + location})
		if err != nil {
			t.Fatal(err)
		}
		var got []string
		for _, c := range answer.Clusters {
			got = append(got, c.Name)
		}
		if strings.Join(got, " ") != want {
			t.Errorf("in %s: %v", location, got)
		}
	}
	c, err := g.Clusters.GetCluster(t.Context(), &containerpb.GetClusterRequest{Name: "projects/p/locations/us-central1/clusters/west"})
	if err != nil || c.Endpoint != "192.0.2.7" || c.MasterAuth.ClusterCaCertificate != "Y2VydA==" || c.Status != containerpb.Cluster_RUNNING || len(c.NodePools) != 1 {
		t.Errorf("got %v: %v", c, err)
	}
}
