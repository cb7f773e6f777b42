package imagecache

import (
	"context"
	"errors"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"cloud.google.com/go/compute/apiv1/computepb"
	"github.com/google/go-cmp/cmp"
	packersdk "github.com/hashicorp/packer-plugin-sdk/packer"

	"github.com/selkies-project/packer-plugin-selkies/e2e/gcp"
)

const (
	project = "p"
	token   = "token-of-the-test"
	built   = "selkies-image-cache-1700000000"
)

// google is a server that has the image that a build made.
func google(t *testing.T, config gcp.Config) *gcp.Server {
	t.Helper()
	config.Token = token
	s := gcp.New(t, config)
	s.AddImage(project, cacheImage(built))
	return s
}

func cacheImage(name string) *computepb.Image {
	return &computepb.Image{Name: &name, Family: new("selkies-image-cache"), DiskSizeGb: new(int64(20))}
}

// builderArtifact is what the googlecompute builder returns.
func builderArtifact(image string) packersdk.Artifact {
	return &packersdk.MockArtifact{BuilderIdValue: builderID, IdValue: image, StateValues: map[string]any{"ProjectId": project}}
}

func options(s *gcp.Server, kv ...any) map[string]any {
	c := map[string]any{
		"access_token":     token,
		"custom_endpoints": map[string]string{"compute": s.URL + "/compute/v1/", "container": s.URL},
	}
	for i := 0; i < len(kv); i += 2 {
		c[kv[i].(string)] = kv[i+1]
	}
	return c
}

func diskOptions(s *gcp.Server, kv ...any) map[string]any {
	return options(s, append([]any{"skip_rollout", true, "zones", []string{"europe-west4-a", "us-central1-b"}}, kv...)...)
}

func postProcess(t *testing.T, ctx context.Context, c map[string]any, artifact packersdk.Artifact) (packersdk.Artifact, error) { //nolint:revive // t first, as always
	t.Helper()
	var p PostProcessor
	if err := p.Configure(c); err != nil {
		t.Fatal(err)
	}
	ui := packersdk.TestUi(t)
	a, keep, force, err := p.PostProcess(ctx, ui, artifact)
	if !keep || !force {
		t.Error("the image is not kept")
	}
	if err != nil && strings.Contains(err.Error(), "\n") {
		t.Errorf("error has several lines: %v", err)
	}
	return a, err
}

// changes are the calls so far that change something.
func changes(s *gcp.Server) []string {
	return slices.DeleteFunc(s.Calls(), func(c string) bool {
		return strings.Contains(c, ".get ") || strings.Contains(c, ".list ") || strings.Contains(c, ".aggregatedList ")
	})
}

var bothDisks = []string{
	"projects/p/global/images/selkies-image-cache-1700000000",
	"projects/p/zones/europe-west4-a/disks/selkies-image-cache-europe-west4-a-1700000000",
	"projects/p/zones/us-central1-b/disks/selkies-image-cache-us-central1-b-1700000000",
}

func wantResources(t *testing.T, s *gcp.Server, want []string) {
	t.Helper()
	if diff := cmp.Diff(want, s.Resources()); diff != "" {
		t.Errorf("resources: %s", diff)
	}
}

func TestDisks(t *testing.T) {
	s := google(t, gcp.Config{})
	c := diskOptions(s, "disk_size_gb", 30, "disk_labels", map[string]string{"team": "desktops"})
	a, err := postProcess(t, t.Context(), c, builderArtifact(built))
	if err != nil {
		t.Fatal(err)
	}
	wantResources(t, s, bothDisks)
	if got, want := a.String(), "Image selkies-image-cache-1700000000 is on 2 disks, in 0 clusters"; got != want {
		t.Errorf("artifact is %q, want %q", got, want)
	}
	if diff := cmp.Diff(bothDisks[1:], a.State("Disks")); diff != "" {
		t.Error(diff)
	}
	r := connected(t, c)
	d, err := r.getDisk(t.Context(), "us-central1-b", "selkies-image-cache-us-central1-b-1700000000")
	if err != nil {
		t.Fatal(err)
	}
	if d.GetSizeGb() != 30 || lastElement(d.GetType()) != "pd-balanced" || !strings.HasSuffix(d.GetSourceImage(), "/projects/p/global/images/"+built) {
		t.Errorf("disk is %v", d)
	}
	labels := map[string]string{"selkies-image-cache": "selkies-image-cache", "selkies-image-cache-image": built, "team": "desktops"}
	if diff := cmp.Diff(labels, d.GetLabels()); diff != "" {
		t.Errorf("labels: %s", diff)
	}

	// The same image once more: everything is there.
	before := changes(s)
	if _, err := postProcess(t, t.Context(), c, builderArtifact(built)); err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(before, changes(s)); diff != "" {
		t.Errorf("the second run changed something: %s", diff)
	}
}

// connected is a run with clients, to look at things with.
func connected(t *testing.T, c map[string]any) *run {
	t.Helper()
	var p PostProcessor
	if err := p.Configure(c); err != nil {
		t.Fatal(err)
	}
	p.config.ProjectID, p.config.ImageProjectID = project, project
	r := &run{config: &p.config, ui: packersdk.TestUi(t)}
	if err := r.connect(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.close)
	return r
}

// TestDiskFailures has the first run fail in some way and the second complete it.
func TestDiskFailures(t *testing.T) {
	tests := []struct {
		name   string
		damage func(*gcp.Server)
		repair func(*gcp.Server) // nil if there is nothing to do
		want   string            // of the first run's error, empty if it gets over it
	}{
		{"operation fails", func(s *gcp.Server) {
			s.Inject(gcp.Fault{Call: "disks.insert", Operation: gcp.ZoneExhausted("europe-west4-a")})
		}, nil, "ZONE_RESOURCE_POOL_EXHAUSTED: "},
		// A request whose answer was lost may have done it all the same.
		{"made meanwhile", func(s *gcp.Server) {
			s.Inject(gcp.Fault{Call: "disks.insert", Operation: &gcp.OperationError{
				Code: "RESOURCE_ALREADY_EXISTS", Message: "The resource already exists", HTTPStatus: http.StatusConflict}})
		}, nil, ""},
		{"no permission", func(s *gcp.Server) { s.Deny("compute.disks.create") }, func(s *gcp.Server) { s.Allow("compute.disks.create") },
			"the permission compute.disks.create is missing, grant roles/compute.storageAdmin (403)"},
		{"request lost", func(s *gcp.Server) { s.Inject(gcp.Fault{Call: "disks.insert", LoseRequest: true}) }, nil, ""},
		{"answer lost", func(s *gcp.Server) { s.Inject(gcp.Fault{Call: "disks.insert", LoseAnswer: true, Times: 2}) }, nil, ""},
		{"overloaded", func(s *gcp.Server) {
			s.Inject(gcp.Fault{Call: "*.get", After: 1, Times: 4, Error: &gcp.Error{Code: http.StatusServiceUnavailable, Reason: "backendError", Message: "try again"}})
		}, nil, ""},
		{"polls lost", func(s *gcp.Server) { s.Inject(gcp.Fault{Call: "zoneOperations.get", LoseAnswer: true, Times: 3}) }, nil, ""},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			s := google(t, gcp.Config{})
			tt.damage(s)
			_, err := postProcess(t, t.Context(), diskOptions(s), builderArtifact(built))
			if tt.want == "" {
				if err != nil {
					t.Fatal(err)
				}
				wantResources(t, s, bothDisks)
				return
			}
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Fatalf("error is %v, want one with %q", err, tt.want)
			}
			if tt.repair != nil {
				tt.repair(s)
			}
			if _, err := postProcess(t, t.Context(), diskOptions(s), builderArtifact(built)); err != nil {
				t.Fatal(err)
			}
			wantResources(t, s, bothDisks)
		})
	}
}

func TestQuota(t *testing.T) {
	s := google(t, gcp.Config{})
	s.SetQuota(project, "us-central1", "SSD_TOTAL_GB", 10)
	_, err := postProcess(t, t.Context(), diskOptions(s), builderArtifact(built))
	const want = "disk selkies-image-cache-us-central1-b-1700000000: QUOTA_EXCEEDED: Quota 'SSD_TOTAL_GB' exceeded. Limit: 10.0 in region us-central1.; ask for a higher quota, or ask for less"
	if err == nil || err.Error() != want {
		t.Errorf("error is %v, want %s", err, want)
	}
	// The other zone's is there for the next run.
	wantResources(t, s, bothDisks[:2])
}

// TestCancelled cancels a run while the disks are made, which goes on without it.
func TestCancelled(t *testing.T) {
	s := google(t, gcp.Config{OperationTime: 3 * time.Second})
	ctx, cancel := context.WithCancel(t.Context())
	go func() {
		for len(changes(s)) < 2 {
			time.Sleep(time.Millisecond)
		}
		cancel()
	}()
	if _, err := postProcess(t, ctx, diskOptions(s), builderArtifact(built)); !errors.Is(err, context.Canceled) {
		t.Fatalf("error is %v", err)
	}
	if _, err := postProcess(t, t.Context(), diskOptions(s), builderArtifact(built)); err != nil {
		t.Fatal(err)
	}
	wantResources(t, s, bothDisks)
	if n := len(changes(s)); n != 2 {
		t.Errorf("%d calls changed something, want the 2 of the first run", n)
	}
}

// TestBuilderDisks has killed builds leave disks, among others that are to stay.
func TestBuilderDisks(t *testing.T) {
	s := gcp.New(t, gcp.Config{Token: token})
	clients := s.Clients(t)
	insert := func(name string, labels map[string]string) {
		op, err := clients.Disks.Insert(t.Context(), &computepb.InsertDiskRequest{
			Project: project, Zone: "us-central1-b", DiskResource: &computepb.Disk{Name: &name, SizeGb: new(int64(20)), Labels: labels},
		})
		gcp.Wait(t, op, err)
	}
	insert("games-build-1", nil)
	insert("games-build-1-data", nil)
	insert("games-build-used", nil)
	insert("games-build-of-a-cache", map[string]string{labelName: "games-build"})
	insert("games-builder", nil)
	insert("old-games-build-1", nil)
	s.AddInstance(project, "us-central1-b", "vm")
	attach := func(disk string) {
		op, err := clients.Instances.AttachDisk(t.Context(), &computepb.AttachDiskInstanceRequest{
			Project: project, Zone: "us-central1-b", Instance: "vm",
			AttachedDiskResource: &computepb.AttachedDisk{Source: new("projects/p/zones/us-central1-b/disks/" + disk), DeviceName: &disk},
		})
		gcp.Wait(t, op, err)
	}
	attach("games-build-used")
	// The VM of one has just gone, and an image is being made of another.
	insert("games-build-freed", nil)
	insert("games-build-source", nil)
	attach("games-build-freed")
	s.Forward(50 * time.Minute)
	op, err := clients.Instances.DetachDisk(t.Context(), &computepb.DetachDiskInstanceRequest{Project: project, Zone: "us-central1-b", Instance: "vm", DeviceName: "games-build-freed"})
	gcp.Wait(t, op, err)
	insert("games-build-young", nil)
	s.Forward(50 * time.Minute)
	s.AddImage(project, cacheImage(built))
	hold := make(chan struct{})
	s.Inject(gcp.Fault{Call: "images.insert", OperationHold: hold})
	making, err := clients.Images.Insert(t.Context(), &computepb.InsertImageRequest{
		Project: project, ImageResource: &computepb.Image{Name: new("in-the-making"), SourceDisk: new("projects/p/zones/us-central1-b/disks/games-build-source")}})
	if err != nil {
		t.Fatal(err)
	}

	dryRun := diskOptions(s, "builder_disk_prefix", "games-build-", "dry_run", true)
	before := s.Resources()
	if _, err := postProcess(t, t.Context(), dryRun, builderArtifact(built)); err != nil {
		t.Fatal(err)
	}
	wantResources(t, s, before)

	for range 2 { // the second finds nothing
		if _, err := postProcess(t, t.Context(), diskOptions(s, "builder_disk_prefix", "games-build-"), builderArtifact(built)); err != nil {
			t.Fatal(err)
		}
	}
	want := slices.DeleteFunc(append(before, bothDisks[1:]...), func(r string) bool {
		return strings.HasSuffix(r, "/games-build-1") || strings.HasSuffix(r, "/games-build-1-data")
	})
	slices.Sort(want)
	wantResources(t, s, want)

	close(hold)
	gcp.Wait(t, making, nil)
	if _, err := postProcess(t, t.Context(), diskOptions(s, "builder_disk_prefix", "games-build-"), builderArtifact(built)); err != nil {
		t.Fatal(err)
	}
	wantResources(t, s, slices.DeleteFunc(want, func(r string) bool { return strings.HasSuffix(r, "/games-build-source") }))
}

func TestDryRunOfDisks(t *testing.T) {
	s := google(t, gcp.Config{})
	if _, err := postProcess(t, t.Context(), diskOptions(s, "dry_run", true), builderArtifact(built)); err != nil {
		t.Fatal(err)
	}
	if c := changes(s); len(c) > 0 {
		t.Errorf("changed something: %q", c)
	}

	// One that Compute Engine failed to make is made anew.
	if _, err := postProcess(t, t.Context(), diskOptions(s), builderArtifact(built)); err != nil {
		t.Fatal(err)
	}
	s.FailDisk(bothDisks[1])
	before := changes(s)
	if _, err := postProcess(t, t.Context(), diskOptions(s, "dry_run", true), builderArtifact(built)); err != nil {
		t.Error(err)
	}
	if diff := cmp.Diff(before, changes(s)); diff != "" {
		t.Errorf("changed something: %s", diff)
	}
	if _, err := postProcess(t, t.Context(), diskOptions(s), builderArtifact(built)); err != nil {
		t.Error(err)
	}
	again := []string{"disks.delete " + bothDisks[1], "disks.insert projects/p/zones/europe-west4-a/disks"}
	if diff := cmp.Diff(append(before, again...), changes(s)); diff != "" {
		t.Errorf("the run's calls: %s", diff)
	}
}

func TestDiskErrors(t *testing.T) {
	s := google(t, gcp.Config{})
	s.AddImage(project, cacheImage("selkies-image-cache-1700000001"))
	if _, err := postProcess(t, t.Context(), diskOptions(s, "cache_name", "other"), builderArtifact("selkies-image-cache-1700000001")); err != nil {
		t.Fatal(err)
	}
	stranger := cacheImage("stranger-1700000001")
	s.AddImage(project, stranger)
	tests := []struct {
		name     string
		config   map[string]any
		artifact packersdk.Artifact
		want     string
	}{
		{"disk smaller than the image", diskOptions(s, "disk_size_gb", 19), builderArtifact(built),
			"disk_size_gb is 19, but image selkies-image-cache-1700000000 has 20 GB; set at least that"},
		{"disk of another image", diskOptions(s, "cache_name", "other"), builderArtifact("stranger-1700000001"),
			"disk other-europe-west4-a-1700000001: there is one that was not made from image stranger-1700000001 for this cache"},
		{"no such image", diskOptions(s, "image_name", "none"), builderArtifact(built), "project p has no image none"},
		{"other builder", diskOptions(s), &packersdk.MockArtifact{BuilderIdValue: "null"}, "the artifact comes from null, not from the googlecompute builder; set image_name"},
		{"no project", diskOptions(s, "image_name", built), &packersdk.MockArtifact{BuilderIdValue: "null"}, "project_id is not set"},
		{"no such zone", diskOptions(s, "zones", []string{"us-central1-z"}), builderArtifact(built), "disk selkies-image-cache-us-central1-z-1700000000: "},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			_, err := postProcess(t, t.Context(), tt.config, tt.artifact)
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error is %v, want one with %q", err, tt.want)
			}
		})
	}
}
