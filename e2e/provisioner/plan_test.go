//go:build e2e

package provisioner_test

import (
	"bytes"
	"fmt"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"github.com/selkies-project/packer-plugin-selkies/e2e/buildvm"
	"github.com/selkies-project/packer-plugin-selkies/e2e/registry"
)

// row is the row of an image, or of the total, in what a build says before it pulls.
func row(t *testing.T, out, name string) string {
	t.Helper()
	for line := range strings.Lines(out) {
		_, said, _ := strings.Cut(line, "null.vm: ")
		if rest, ok := strings.CutPrefix(said, name+" "); ok {
			return strings.Join(strings.Fields(rest), " ")
		}
	}
	t.Errorf("no row for %s:\n%s", name, out)
	return ""
}

// TestDryRun has a blank disk, one with a cache, and one with the layers of a build that
// failed.
func TestDryRun(t *testing.T) {
	t.Parallel()
	v := debian(t)
	reg := registry.New(t, registry.Config{})
	base := layer(t, map[string]int{"base": 4 << 20})
	firstImage := newImage(t, base, layer(t, map[string]int{"first": 2 << 20}))
	secondImage := newImage(t, base, layer(t, map[string]int{"second": 1 << 20}))
	first, second := pushed(t, reg, "first:1", firstImage), pushed(t, reg, "second:1", secondImage)
	d := newDisk(t, v, 64)
	dry := func(t *testing.T, options ...string) string {
		t.Helper()
		before, sum := v.State(t), checksum(t, d)
		reg.Reset()
		out, err := v.Build(t, append(options, d.Block(), "dry_run = true")...)
		if err != nil {
			out = fmt.Sprintf("%s\n%v", out, err)
		}
		if diff := cmp.Diff(before, v.State(t)); diff != "" {
			t.Errorf("the VM changed: %s", diff)
		}
		if checksum(t, d) != sum {
			t.Error("the disk changed")
		}
		if blobs := append(layerBlobs(t, reg, firstImage), layerBlobs(t, reg, secondImage)...); len(blobs) > 0 {
			t.Errorf("fetched layers %v", blobs)
		}
		return out
	}

	t.Run("blank", func(t *testing.T) {
		out := dry(t, buildvm.Images(first, second))
		for name, want := range map[string]string{
			first:                       "6.29\\d*MB 0B 6.29\\d*MB",
			second:                      "5.24\\d*MB 0B 5.24\\d*MB",
			"total, shared layers once": "7.34\\d*MB 0B 7.34\\d*MB",
		} {
			if got := row(t, out, name); !regexp.MustCompile("^" + want + "$").MatchString(got) {
				t.Errorf("%s: %s, want %s", name, got, want)
			}
		}
		if !strings.Contains(out, "dry_run is set: nothing was pulled") {
			t.Errorf("does not say that it is a dry run:\n%s", out)
		}
	})

	v.MustBuild(t, buildvm.Images(first), d.Block())
	partly := func(t *testing.T) {
		out := dry(t, buildvm.Images(second))
		if got := row(t, out, second); !regexp.MustCompile(`^5\.24\d*MB 4\.19\d*MB 1\.0[45]\d*MB$`).MatchString(got) {
			t.Errorf("the row is %s", got)
		}
	}
	t.Run("cache", partly)
	t.Run("no such image", func(t *testing.T) {
		out := dry(t, buildvm.Images(second, reg.Addr+"/none:1"))
		row(t, out, second)
		if !strings.Contains(out, "1 of 2 references failed: ") {
			t.Errorf("succeeded:\n%s", out)
		}
	})
	// The layers are there, though no layer manifest says so.
	t.Run("failed build", func(t *testing.T) {
		if out, err := v.Build(t, buildvm.Images(second, reg.Addr+"/none:1"), d.Block()); err == nil {
			t.Fatalf("the build succeeded:\n%s", out)
		}
		out := dry(t, buildvm.Images(first, second))
		if got := row(t, out, "total, shared layers once"); !strings.HasSuffix(got, " 0B") {
			t.Errorf("the total is %s", got)
		}
	})
}

// TestTooSmall has more compressed bytes to pull than a disk has room for.
func TestTooSmall(t *testing.T) {
	t.Parallel()
	v := debian(t)
	reg := registry.New(t, registry.Config{})
	smallImage, largeImage := newImage(t, layer(t, map[string]int{"small": 1000})), newImage(t, layer(t, map[string]int{"large": 100 << 20}))
	small, large := pushed(t, reg, "small:1", smallImage), pushed(t, reg, "large:1", largeImage)
	d := newDisk(t, v, 64)
	fails := func(t *testing.T) {
		before, sum := v.State(t), checksum(t, d)
		reg.Reset()
		out, err := v.Build(t, buildvm.Images(small, large), d.Block())
		want := regexp.MustCompile(`the disk has room for \S+MB, but what is to be pulled takes 104\.9MB compressed, and more than that unpacked; use a larger disk, or list fewer images$`)
		if err == nil || !want.MatchString(errorLine(t, out)) {
			t.Errorf("packer build: %v\n%s", err, out)
		}
		if blobs := append(layerBlobs(t, reg, smallImage), layerBlobs(t, reg, largeImage)...); len(blobs) > 0 {
			t.Errorf("fetched layers %v", blobs)
		}
		if diff := cmp.Diff(before, v.State(t)); diff != "" {
			t.Errorf("the VM changed: %s", diff)
		}
		if checksum(t, d) != sum {
			t.Error("the disk changed")
		}
	}
	t.Run("blank", fails)
	v.MustBuild(t, buildvm.Images(small), d.Block())
	t.Run("cache", fails)
}

// TestGrow gives a cache disk to a build that has become larger, as one made from an
// image with a larger size.
func TestGrow(t *testing.T) {
	t.Parallel()
	v := debian(t)
	reg := registry.New(t, registry.Config{})
	small := pushed(t, reg, "small:1", newImage(t, layer(t, map[string]int{"small": 1000})))
	large := pushed(t, reg, "large:1", newImage(t, layer(t, map[string]int{"large": 100 << 20})))
	d := newDisk(t, v, 64)
	v.MustBuild(t, buildvm.Images(small), d.Block())
	run(t, "truncate", "--size=256M", d.Image)
	run(t, "losetup", "--set-capacity", d.Device)

	sum := checksum(t, d)
	v.MustBuild(t, buildvm.Images(small, large), d.Block(), "dry_run = true")
	if checksum(t, d) != sum {
		t.Error("a dry run changed the disk")
	}
	before := v.State(t)
	out := v.MustBuild(t, buildvm.Images(small, large), d.Block())
	for _, want := range []string{
		"growing the file system on " + d.Device + " by 201.3MB to the size of the disk",
		"warning: the disk may be too small: ", // about 315MB if its files could be compressed
	} {
		if !strings.Contains(out, want) {
			t.Errorf("does not say %q", want)
		}
	}
	if diff := cmp.Diff(before, v.State(t)); diff != "" {
		t.Errorf("the VM changed: %s", diff)
	}
	run(t, "e2fsck", "-f", "-n", d.Device)
	if m, _ := d.Manifest(t); len(m.Images) != 2 {
		t.Errorf("the layer manifest has %v", names(m))
	}
	if out := v.MustBuild(t, buildvm.Images(small, large), d.Block()); strings.Contains(out, "growing") {
		t.Errorf("grew again:\n%s", out)
	}
}

// TestCatalog takes the images of a registry that asks for a password, beside those of a
// list.
func TestCatalog(t *testing.T) {
	t.Parallel()
	v := debian(t)
	const user, password = "robot", "correct-horse"
	reg := registry.New(t, registry.Config{Username: user, Password: password})
	for _, ref := range []string{"apps/editor:latest", "apps/editor:v1", "apps/team/desktop:v1", "apps/team/desktop:v2", "apps/old:v1", "other:v1"} {
		image := newImage(t, layer(t, map[string]int{strings.ReplaceAll(ref, "/", "-"): 1000}))
		if err := remote.Write(parse(t, reg.Addr+"/"+ref), image, remote.WithAuth(&authn.Basic{Username: user, Password: password})); err != nil {
			t.Fatal(err)
		}
	}
	d := newDisk(t, v, 64)
	auth := fmt.Sprintf("registry_auth {\n server = %q\n username = %q\n password = %q\n}", reg.Addr, user, password)
	catalog := func(options string) string {
		return fmt.Sprintf("catalog {\n repository = %q\n%s\n}\n", reg.Addr+"/apps", options)
	}
	v.MustBuild(t, buildvm.Images(reg.Addr+"/other:v1", reg.Addr+"/apps/editor:v1"), d.Block(), auth,
		catalog("exclude = [\"old\"]\n tags = [\"v.*\"]"), catalog(""))
	m, data := d.Manifest(t)
	got := slices.DeleteFunc(names(m), func(n string) bool { return strings.Contains(n, "@") })
	slices.Sort(got)
	var want []string
	for _, ref := range []string{"apps/editor:latest", "apps/editor:v1", "apps/team/desktop:v1", "apps/team/desktop:v2", "other:v1"} {
		want = append(want, reg.Addr+"/"+ref)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Error(diff)
	}

	before, sum := v.State(t), checksum(t, d)
	for _, tt := range []struct {
		name    string
		options []string
		want    string
	}{
		{"too many", []string{auth, catalog("limit = 3\n tags = [\".*\"]")}, "catalog[0]: " + reg.Addr + "/apps has 5 tags that match, more than limit = 3"},
		{"nothing", []string{auth, catalog(`tags = ["none"]`)}, "catalog[0]: " + reg.Addr + "/apps has no image that matches"},
		{"no password", []string{catalog("")}, "catalog[0]: listing " + reg.Addr + "/apps: apps: the registry refused access (401 Unauthorized); set registry_auth"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			out, err := v.Build(t, append(tt.options, d.Block())...)
			if err == nil || !strings.Contains(errorLine(t, out), tt.want) {
				t.Errorf("does not say %q: %v\n%s", tt.want, err, out)
			}
		})
	}
	if diff := cmp.Diff(before, v.State(t)); diff != "" {
		t.Errorf("the VM changed: %s", diff)
	}
	if _, after := d.Manifest(t); !bytes.Equal(after, data) || checksum(t, d) != sum {
		t.Error("the disk changed")
	}
}
