//go:build e2e

package pipeline_test

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"cloud.google.com/go/compute/apiv1/computepb"
	"github.com/google/go-cmp/cmp"
	packersdk "github.com/hashicorp/packer-plugin-sdk/packer"

	"github.com/selkies-project/packer-plugin-selkies/e2e/cluster"
	"github.com/selkies-project/packer-plugin-selkies/e2e/gcp"
	"github.com/selkies-project/packer-plugin-selkies/e2e/registry"
	"github.com/selkies-project/packer-plugin-selkies/post-processor/imagecache"
)

// named is a source whose resources have names, on a VM that nothing logs in to.
const named = `
  communicator  = "none"
  instance_name = "build-1700000001"
  disk_name     = "build-1700000001"
  image_name    = "selkies-image-cache-1700000001"
  image_family  = "selkies-image-cache"

  max_run_duration_in_seconds = 3600
  instance_termination_action = "DELETE"

  disk_attachment {
    create_image = true
    disk_name    = "build-1700000001-data"
    volume_type  = "pd-balanced"
    volume_size  = 20
  }`

// What the builder makes.
const (
	vm   = "projects/broker/zones/us-central1-a/instances/build-1700000001"
	boot = "projects/broker/zones/us-central1-a/disks/build-1700000001"
	data = "projects/broker/zones/us-central1-a/disks/build-1700000001-data"
	made = "projects/broker/global/images/selkies-image-cache-1700000001"
)

// TestBuilderFails has Google fail at every step of the builder. It leaves nothing,
// unless it cannot know or is not let.
func TestBuilderFails(t *testing.T) {
	t.Parallel()
	failed := &gcp.OperationError{Code: "INTERNAL_ERROR", Message: "Internal error.", HTTPStatus: 500}
	unavailable := &gcp.Error{Code: 503, Reason: "backendError", Message: "Backend Error"}
	tests := []struct {
		name  string
		fault gcp.Fault
		want  string // in what Packer says
		left  []string
	}{
		{"disk", gcp.Fault{Call: "disks.insert", Operation: failed}, "failed to create disk", nil},
		{"VM", gcp.Fault{Call: "instances.insert", Operation: gcp.ZoneExhausted(zone)}, "does not have enough resources available", nil},
		{"VM refused", gcp.Fault{Call: "instances.insert", Error: unavailable}, "Backend Error", nil},
		{"image", gcp.Fault{Call: "images.insert", Operation: failed}, "Error waiting for image", nil},
		{"image refused", gcp.Fault{Call: "images.insert", Error: unavailable}, "Backend Error", nil},
		{"deletion of the VM, once", gcp.Fault{Call: "instances.delete", Error: unavailable}, "Error deleting instance", nil},
		// What comes of a request without an answer the builder does not ask.
		{"answer on the disk lost", gcp.Fault{Call: "disks.insert", LoseAnswer: true}, "failed to create disk", nil},
		{"answer on the VM lost", gcp.Fault{Call: "instances.insert", LoseAnswer: true}, "Error creating instance", []string{boot, data, vm}},
		{"answer on the image lost", gcp.Fault{Call: "images.insert", LoseAnswer: true}, "Error waiting for image", []string{made}},
		{"deletion of the boot disk", gcp.Fault{Call: "disks.delete", Error: unavailable}, "Error deleting disk", []string{boot}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel() // the builder mostly waits between two looks at an operation
			c := newRecords(t)
			before := c.Resources()
			c.Inject(tt.fault)
			out, err := c.build(t, named, "")
			if !strings.Contains(out, tt.want) {
				t.Errorf("packer build: %v: does not say %q:\n%s", err, tt.want, out)
			}
			c.wantLeft(t, before, tt.left, out)
			c.nextRun(t)
		})
	}
}

// nextRun is the next build's post-processor, at a time at which the VM of the last one
// has ended. It leaves nothing of that.
func (c *cloud) nextRun(t *testing.T) {
	t.Helper()
	c.Settle()           // of what a killed Packer had asked for
	c.Forward(time.Hour) // the VM's time is up
	c.Forward(time.Hour)
	const image = "selkies-image-cache-1700000002"
	c.AddImage(project, &computepb.Image{Name: new(image), Family: new("selkies-image-cache"), DiskSizeGb: new(int64(20))})
	var p imagecache.PostProcessor
	if err := p.Configure(map[string]any{
		"zones": []string{zone}, "skip_rollout": true, "builder_disk_prefix": "build-",
		"access_token": c.token, "custom_endpoints": map[string]string{"compute": c.URL + "/compute/v1/"},
	}); err != nil {
		t.Fatal(err)
	}
	built := &packersdk.MockArtifact{BuilderIdValue: "packer.googlecompute", IdValue: image, StateValues: map[string]any{"ProjectId": project}}
	if _, _, _, err := p.PostProcess(t.Context(), packersdk.TestUi(t), built); err != nil {
		t.Fatal(err)
	}
	for _, r := range c.Resources() {
		if strings.Contains(r, "/build-") {
			t.Errorf("the next run leaves %s", r)
		}
	}
}

// wantLeft compares the resources with those of before and some more. The image is
// not looked at where it was made as it should be.
func (c *cloud) wantLeft(t *testing.T, before, left []string, out string) {
	t.Helper()
	now := c.Resources()
	if strings.Contains(out, "A disk image was created") && !slices.Contains(left, made) {
		now = slices.DeleteFunc(now, func(r string) bool { return r == made })
	}
	want := slices.Sorted(slices.Values(slices.Concat(before, left)))
	if diff := cmp.Diff(want, now); diff != "" {
		t.Errorf("left over (-want +got):\n%s\n%s", diff, out)
	}
}

// TestRollOutFails has Google fail while the post-processor makes the disks of two
// zones. The next build removes what is left and succeeds.
func TestRollOutFails(t *testing.T) {
	zones := []string{zone, "us-central1-b"}
	failed := &gcp.OperationError{Code: "INTERNAL_ERROR", Message: "Internal error.", HTTPStatus: 500}
	tests := []struct {
		name string
		fail func(c *cloud)
		want string
	}{
		{"quota", func(c *cloud) { c.SetQuota(project, "us-central1", "SSD_TOTAL_GB", 30) }, "Quota 'SSD_TOTAL_GB' exceeded"},
		// The first disk is the builder's.
		{"operation", func(c *cloud) { c.Inject(gcp.Fault{Call: "disks.insert", After: 2, Operation: failed}) }, "Internal error."},
		{"permission", func(c *cloud) { c.Deny("compute.disks.setLabels") }, "the permission compute.disks.setLabels is missing"},
		{"label", func(c *cloud) { c.Deny("compute.images.setLabels") }, "the permission compute.images.setLabels is missing"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			c := newRecordsWithBroker(t, zones...)
			build := func(stamp string) (string, error) {
				return c.build(t, strings.ReplaceAll(named, "1700000001", stamp), fmt.Sprintf(`
  post-processor "manifest" {}
  post-processor "selkies-image-cache" {
    cluster_pattern  = "^broker-"
    injector_image   = "%[3]s/injector:1"
    access_token     = %[1]q
    custom_endpoints = { compute = "%[2]s/compute/v1/", container = "%[2]s/" }
  }`, c.token, c.URL, world.registry.Addr))
			}
			tt.fail(c)
			out, err := build("1700000001")
			if err == nil || !strings.Contains(strings.Join(strings.Fields(out), " "), tt.want) {
				t.Fatalf("packer build: %v: does not say %q:\n%s", err, tt.want, out)
			}
			if tt.name == "quota" {
				// Not enough for the disks of both builds.
				c.SetQuota(project, "us-central1", "SSD_TOTAL_GB", 60)
			}
			c.Allow("compute.disks.setLabels")
			c.Allow("compute.images.setLabels")
			if out, err = build("1700000002"); err != nil {
				t.Fatalf("packer build: %v\n%s", err, out)
			}
			var disks []string
			for _, r := range c.Resources() {
				if strings.Contains(r, "/disks/") {
					disks = append(disks, r)
				}
			}
			var want []string
			for _, z := range zones {
				want = append(want, "projects/broker/zones/"+z+"/disks/selkies-image-cache-"+z+"-1700000002")
			}
			if diff := cmp.Diff(want, disks); diff != "" {
				t.Errorf("the disks (-want +got):\n%s\n%s", diff, out)
			}
		})
	}
}

// TestEnded ends Packer at every step of the builder, from the first that makes
// something. Told to end, it cleans up. Killed, it leaves what the next run deletes.
func TestEnded(t *testing.T) {
	t.Parallel()
	whole := newRecords(t)
	whole.mustBuild(t, named, "")
	calls := whole.Calls()
	first := slices.IndexFunc(calls, func(call string) bool { return strings.HasPrefix(call, "disks.insert ") })
	ways := map[string]func(*runningBuild, *testing.T){
		"terminated": (*runningBuild).terminate,
		"killed":     (*runningBuild).kill,
	}
	// A read changes nothing, but for the waits for operations and the VM: ended there,
	// Packer leaves what it leaves when it is ended at the call before.
	read := regexp.MustCompile(`^(projects|zones|machineTypes|images|disks)\.get`)
	steps := 0
	before := map[string]int{}
	for _, line := range calls[first:] {
		call, _, _ := strings.Cut(line, " ")
		if read.MatchString(call) {
			continue // some are made beside others, so their order says nothing
		}
		steps++
		n := before[call]
		before[call]++
		for way, end := range ways {
			t.Run(fmt.Sprintf("%s at %s %d", way, call, n+1), func(t *testing.T) {
				t.Parallel() // Packer mostly waits
				c := newRecords(t)
				b := c.startHeld(t, call, n, c.command(t, named, ""))
				end(b, t)
				close(b.hold)
				// It ends with or without an error: the last step is not cut off.
				_ = b.wait()
				if way != "killed" {
					for _, r := range c.Resources() {
						if strings.Contains(r, "/build-") {
							t.Errorf("it leaves %s:\n%s", r, b.said(t))
						}
					}
				}
				c.nextRun(t)
			})
		}
	}
	if steps < 10 {
		t.Errorf("a build has %d steps only", steps)
	}
}

// TestInterrupt presses Ctrl-C while the builder waits for its VM.
func TestInterrupt(t *testing.T) {
	t.Parallel()
	c := newRecords(t)
	before := c.Resources()
	b := c.startHeld(t, "instances.get", 0, c.command(t, named, ""))
	b.interrupt(t)
	close(b.hold)
	if err := b.wait(); err == nil {
		t.Error("the build succeeded")
	}
	c.wantLeft(t, before, nil, b.said(t))
}

// TestInterruptProvisioner presses Ctrl-C while a real VM pulls images.
func TestInterruptProvisioner(t *testing.T) {
	t.Parallel()
	c := newCloud(t, "ya29.interrupt")
	before := c.Resources()
	reg := registry.New(t, registry.Config{Latency: time.Second})
	push(t, reg, "app:1", newLayer(t))
	b := startBuild(t, c.command(t, dataDisk(""), fmt.Sprintf("provisioner \"selkies-image-cache\" {\nimages = [%q]\n%s\n}", reg.Addr+"/app:1", cacheDisk)))
	// After the first request, for the manifest, comes one for the layer, a second later.
	b.waitSaid(t, "on the build VM fills")
	reg.Reset()
	b.waitFor(t, "the VM to ask the registry", func() error {
		if c := reg.Count(); c.ManifestHeads+c.ManifestGets == 0 {
			return errors.New(b.said(t))
		}
		return nil
	})
	b.interrupt(t)
	if err := b.wait(); err == nil {
		t.Error("the build succeeded")
	}
	c.wantLeft(t, before, nil, b.said(t))
}

// TestKill has the machine that Packer runs on go away in the middle of a build of the
// template. A run right after it leaves the VM, which could be that of a build that goes
// on, and says how to delete it. When the CronJob's next run is due the VM has ended, and
// that run deletes its disks.
func TestKill(t *testing.T) {
	c := newRecordsWithBroker(t, zone)
	b := c.startHeld(t, "instances.get", 0, c.template(t))
	b.kill(t)
	_ = b.wait()
	close(b.hold)
	left := c.builders()
	if len(left) != 3 { // two disks as well
		t.Fatalf("it leaves %q:\n%s", left, b.said(t))
	}
	vm := path.Base(left[2])

	// What comes after the builder in a run; nothing can log in to the VM of a whole one.
	afterBuild := func(image string) string {
		c.AddImage(project, &computepb.Image{Name: &image, Family: new("selkies-image-cache"), DiskSizeGb: new(int64(20))})
		return strings.Join(strings.Fields(c.run(t, "-var", "rollback_to="+image)), " ")
	}
	out := afterBuild("selkies-image-cache-1700000001")
	if want := "If none goes on, delete it: gcloud compute instances delete " + vm + " --project=broker --zone=us-central1-a --delete-disks=all"; !strings.Contains(out, want) {
		t.Errorf("Packer does not say %q", want)
	}
	if diff := cmp.Diff(left, c.builders()); diff != "" {
		t.Errorf("the run beside it changed (-before +after):\n%s", diff)
	}

	settings, err := os.ReadFile(filepath.Join(examples, "settings.env"))
	if err != nil || !strings.Contains(string(settings), "\nSCHEDULE=0 */8 * * *\n") {
		t.Fatalf("the CronJob is not for every 8 hours: %v\n%s", err, settings)
	}
	c.Forward(3 * time.Hour)
	if diff := cmp.Diff(left[:2], c.builders()); diff != "" {
		t.Errorf("after 3 hours (-want +got):\n%s", diff)
	}
	c.Forward(5 * time.Hour)
	if out := afterBuild("selkies-image-cache-1700000002"); strings.Contains(out, vm+" has had") {
		t.Error("Packer says that the VM is there")
	}
	if got := c.builders(); len(got) > 0 {
		t.Errorf("the next run leaves %q", got)
	}
}

// builders are the disks and VMs of the template's builder.
func (c *cloud) builders() []string {
	return slices.DeleteFunc(c.Resources(), func(r string) bool { return !strings.Contains(r, "/selkies-image-cache-build-") })
}

// descendants are a process and all that came of it.
func descendants(t *testing.T, pid int) []int {
	t.Helper()
	all := []int{pid}
	files, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/children", pid))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		data, err := os.ReadFile(f)
		if err != nil {
			continue // a thread that ended
		}
		for _, field := range strings.Fields(string(data)) {
			child, err := strconv.Atoi(field)
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, descendants(t, child)...)
		}
	}
	return all
}

// runningBuild is a packer build.
type runningBuild struct {
	cmd   *exec.Cmd
	out   string        // a file
	hold  chan struct{} // keeps the call that it waits for, if it was started so
	ended chan struct{}
	err   error // once it has ended
}

// startHeld starts a build and returns when it waits for a call that was made so often
// before.
func (c *cloud) startHeld(t *testing.T, call string, before int, cmd *exec.Cmd) *runningBuild {
	t.Helper()
	hold := make(chan struct{})
	c.Inject(gcp.Fault{Call: call, After: before, Hold: hold})
	b := startBuild(t, cmd)
	b.hold = hold
	b.waitFor(t, "the call of "+call, func() error {
		made := 0
		for _, line := range c.Calls() {
			if strings.HasPrefix(line, call+" ") {
				made++
			}
		}
		if made <= before {
			return fmt.Errorf("made %d times:\n%s", made, b.said(t))
		}
		return nil
	})
	return b
}

// startBuild starts a build.
func startBuild(t *testing.T, cmd *exec.Cmd) *runningBuild {
	t.Helper()
	b := &runningBuild{cmd: cmd, out: filepath.Join(t.TempDir(), "out"), ended: make(chan struct{})}
	f, err := os.Create(b.out)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b.cmd.Stdout, b.cmd.Stderr = f, f
	if err := b.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		b.err = b.cmd.Wait()
		close(b.ended)
	}()
	return b
}

// wait waits for the end of the build.
func (b *runningBuild) wait() error {
	<-b.ended
	return b.err
}

// waitFor waits until f gives no error, but no longer than the build goes on.
func (b *runningBuild) waitFor(t *testing.T, what string, f func() error) {
	t.Helper()
	cluster.Wait(t, what, func(context.Context) error {
		ended := false
		select {
		case <-b.ended:
			ended = true
		default:
		}
		err := f()
		if err != nil && ended {
			t.Fatalf("waiting for %s: the build has ended: %v", what, err)
		}
		return err
	})
}

// interrupt is a Ctrl-C in a terminal. It returns once Packer has noticed.
func (b *runningBuild) interrupt(t *testing.T) {
	t.Helper()
	if err := syscall.Kill(-b.cmd.Process.Pid, syscall.SIGINT); err != nil {
		t.Fatal(err)
	}
	b.waitSaid(t, "Cancelling build after receiving interrupt")
}

// terminate is how kubelet ends a pod: the signal goes to its first process alone. It
// returns once Packer has noticed.
func (b *runningBuild) terminate(t *testing.T) {
	t.Helper()
	if err := syscall.Kill(b.cmd.Process.Pid, syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	b.waitSaid(t, "Cancelling build after receiving terminated")
}

// kill ends all of Packer's processes at once.
func (b *runningBuild) kill(t *testing.T) {
	t.Helper()
	for _, pid := range descendants(t, b.cmd.Process.Pid) {
		// One may have ended with its parent.
		if err := syscall.Kill(pid, syscall.SIGKILL); err != nil && !errors.Is(err, syscall.ESRCH) {
			t.Fatal(err)
		}
	}
}

// said is what Packer has said so far.
func (b *runningBuild) said(t *testing.T) string {
	t.Helper()
	data, err := os.ReadFile(b.out)
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

func (b *runningBuild) waitSaid(t *testing.T, text string) {
	t.Helper()
	b.waitFor(t, "packer to say "+text, func() error {
		if said := b.said(t); !strings.Contains(said, text) {
			return errors.New(said)
		}
		return nil
	})
}
