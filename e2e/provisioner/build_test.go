//go:build e2e

package provisioner_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/http/httptest"
	"net/http/httputil"
	"net/url"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/docker/go-units"
	"github.com/google/go-cmp/cmp"
	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/santhosh-tekuri/jsonschema/v6"
	"golang.org/x/sys/unix"

	"github.com/selkies-project/packer-plugin-selkies/e2e/buildvm"
	"github.com/selkies-project/packer-plugin-selkies/e2e/host"
	"github.com/selkies-project/packer-plugin-selkies/e2e/images"
	"github.com/selkies-project/packer-plugin-selkies/e2e/machine"
	"github.com/selkies-project/packer-plugin-selkies/e2e/registry"
	"github.com/selkies-project/packer-plugin-selkies/manifest"
)

// TestBuild puts every shape of image on a blank disk, with Debian's Docker and
// with Docker 29, and finds the registry's own bytes and every layer there.
func TestBuild(t *testing.T) {
	t.Run("debian", func(t *testing.T) { testBuild(t, debian(t), false) })
	t.Run("upstream", func(t *testing.T) {
		v, err := bootVM(t.Context(), machine.Upstream)
		if err != nil {
			t.Fatal(err)
		}
		defer v.Close()
		// The VM's own Docker keeps images in containerd, as Docker 29 does unless told
		// otherwise; the daemon on the disk does not.
		if err := v.StartDocker(t.Context(), machine.Docker{Release: machine.Upstream, ImageStore: true}); err != nil {
			t.Fatal(err)
		}
		testBuild(t, v, true)
		t.Run("rebuild", func(t *testing.T) { testRebuild(t, v) })
		t.Run("progress", func(t *testing.T) { testProgress(t, v, false) })
		t.Run("own daemon", func(t *testing.T) {
			reg := registry.New(t, registry.Config{})
			refs := pushed(t, reg, "app:1", newImage(t, layer(t, map[string]int{"a": 1000})))
			out, err := v.Build(t, buildvm.Images(refs))
			if err == nil || !strings.Contains(errorLine(t, out), "docker on the build VM keeps its images in containerd") {
				t.Errorf("packer build: %v\n%s", err, out)
			}
		})
	})
}

func testBuild(t *testing.T, v *vm, zstd bool) {
	reg := registry.New(t, registry.Config{})
	catalogue, err := images.Catalogue(world.busybox)
	if err != nil {
		t.Fatal(err)
	}
	if !zstd {
		catalogue = slices.DeleteFunc(catalogue, func(i images.Image) bool { return i.Zstd })
	}
	refs, err := images.Push(t.Context(), reg.Addr, catalogue)
	if err != nil {
		t.Fatal(err)
	}
	// A tag with its digest, from a list as people write them.
	digest, err := catalogue[0].Digest()
	if err != nil {
		t.Fatal(err)
	}
	list := filepath.Join(t.TempDir(), "images.txt")
	pinned := reg.Addr + "/" + catalogue[0].Repository + ":pinned"
	if err := remote.Tag(parse(t, pinned).(name.Tag), catalogue[0].Image); err != nil {
		t.Fatal(err)
	}
	text := "# desktops\n\n" + pinned + "@" + digest.String() + "  # pinned\n"
	if err := os.WriteFile(list, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	output := filepath.Join(t.TempDir(), "manifest.json")
	d := newDisk(t, v, 1024)
	before := v.State(t) + v.Network(t)

	v.MustBuild(t, buildvm.Images(refs...), d.Block(), "image_list_file = \""+list+"\"", "manifest_output = \""+output+"\"", "verify = true", "keep_blobs = true")

	if diff := cmp.Diff(before, v.State(t)+v.Network(t)); diff != "" {
		t.Errorf("the build changed the VM: %s", diff)
	}
	m, data := d.Manifest(t)
	local, err := os.ReadFile(output)
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(local, data) {
		t.Error("manifest_output is not what is on the disk")
	}
	checkSchema(t, data)
	byName := map[string]manifest.Image{}
	for _, img := range m.Images {
		for _, n := range img.Names {
			byName[n] = img
		}
	}
	for _, ref := range append(refs, pinned, pinned[:strings.LastIndex(pinned, ":")]+"@"+digest.String()) {
		img, ok := byName[ref]
		if !ok {
			t.Errorf("%s is not in the manifest", ref)
			continue
		}
		checkDescriptors(t, ref, img)
	}
	d.Mount(t, func(dir string) {
		for _, l := range m.Layers {
			if fi, err := os.Stat(filepath.Join(dir, m.LayerPath(l))); err != nil || !fi.IsDir() {
				t.Errorf("layer %s: %v", l.ChainID, err)
			}
		}
		checkBlobs(t, dir, m)
	})
	t.Run("injector", func(t *testing.T) { testInject(t, v, d, refs) })
}

// testInject has the injector read what the build wrote, on the machine it was built on.
func testInject(t *testing.T, v *vm, d *buildvm.Disk, refs []string) {
	if err := v.Install(world.injector, "/usr/local/bin/selkies-image-injector"); err != nil {
		t.Fatal(err)
	}
	const dir = "/mnt/disks/cache"
	detach := v.MountDisk(t, d.Image, dir, "ro,noload")
	defer detach()
	defer func() { v.Output(t, "umount", dir) }()
	v.Output(t, "selkies-image-injector", "verify", "--cache", dir)
	v.Output(t, "selkies-image-injector", "inject", "--runtime", "containerd", "--cache", dir)
	for _, ref := range refs {
		t.Run(ref[strings.Index(ref, "/")+1:], func(t *testing.T) { v.CompareImage(t, "k8s.io", ref) })
	}
	v.Output(t, "selkies-image-injector", "eject", "--runtime", "containerd")
	for _, ref := range refs {
		v.Output(t, "ctr", "-n", "pulled", "images", "remove", ref)
	}
}

// checkSchema asks a third party whether the manifest is what its schema promises.
func checkSchema(t *testing.T, data []byte) {
	t.Helper()
	src, err := host.Source(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	schema, err := jsonschema.NewCompiler().Compile(filepath.Join(src, "docs/layer-manifest.schema.json"))
	if err != nil {
		t.Fatal(err)
	}
	doc, err := jsonschema.UnmarshalJSON(bytes.NewReader(data))
	if err != nil {
		t.Fatal(err)
	}
	if err := schema.Validate(doc); err != nil {
		t.Error(err)
	}
}

// checkDescriptors compares an image's index, manifest and config with what the
// registry serves.
func checkDescriptors(t *testing.T, ref string, img manifest.Image) {
	t.Helper()
	desc, err := remote.Get(parse(t, ref))
	if err != nil {
		t.Fatal(err)
	}
	if got := img.Target(); string(got.Digest) != desc.Digest.String() || !bytes.Equal(got.Data, desc.Manifest) || got.MediaType != string(desc.MediaType) {
		t.Errorf("%s: %s %s is not what the registry serves", ref, got.MediaType, got.Digest)
	}
	image, err := desc.Image() // linux/amd64 of an index
	if err != nil {
		t.Fatal(err)
	}
	raw, err := image.RawManifest()
	if err != nil {
		t.Fatal(err)
	}
	config, err := image.RawConfigFile()
	if err != nil {
		t.Fatal(err)
	}
	if !bytes.Equal(img.Manifest.Data, raw) || !bytes.Equal(img.Config.Data, config) {
		t.Errorf("%s: manifest or config is not what the registry serves", ref)
	}
}

func checkBlobs(t *testing.T, dir string, m *manifest.Manifest) {
	t.Helper()
	if !m.Store.Blobs {
		t.Error("store.blobs is false")
	}
	for _, img := range m.Images {
		blobs, err := img.LayerBlobs()
		if err != nil {
			t.Fatal(err)
		}
		for _, b := range blobs {
			f, err := os.Open(filepath.Join(dir, manifest.BlobsDir, b.Digest.Algorithm().String(), b.Digest.Encoded()))
			if err != nil {
				t.Error(err)
				continue
			}
			got, err := b.Digest.Algorithm().FromReader(f)
			f.Close()
			if err != nil || got != b.Digest {
				t.Errorf("blob %s hashes to %s: %v", b.Digest, got, err)
			}
		}
	}
}

// TestRebuild builds several times on one disk: only what is new is pulled, what is
// no longer listed leaves, and without a change not a byte of the manifest changes.
func TestRebuild(t *testing.T) {
	t.Parallel()
	testRebuild(t, debian(t))
}

func testRebuild(t *testing.T, v *vm) {
	reg := registry.New(t, registry.Config{})
	shared := layer(t, map[string]int{"shared": 3 << 20})
	added := layer(t, map[string]int{"added": 1 << 20})
	first := pushed(t, reg, "app:1", newImage(t, shared))
	newer := newImage(t, shared, added)
	second := pushed(t, reg, "app:2", newer)
	another := newImage(t, layer(t, map[string]int{"other": 1 << 20}))
	other := pushed(t, reg, "other:1", another)
	size := func(image v1.Image, i int) int64 { return layerDescriptor(t, image, i).Size }
	counts := func(pulled, kept int64) string {
		return "pulled " + units.HumanSize(float64(pulled)) + ", kept " + units.HumanSize(float64(kept))
	}
	d := newDisk(t, v, 256)

	v.MustBuild(t, buildvm.Images(first, other), d.Block())
	_, generation1 := d.Manifest(t)

	t.Run("unchanged", func(t *testing.T) {
		reg.Reset()
		out := v.MustBuild(t, buildvm.Images(first, other), d.Block())
		if blobs := layerBlobs(t, reg, newer); len(blobs) > 0 {
			t.Errorf("pulled %v", blobs)
		}
		if _, data := d.Manifest(t); !bytes.Equal(data, generation1) {
			t.Errorf("the manifest changed: %s", cmp.Diff(string(generation1), string(data)))
		}
		if want := counts(0, size(newer, 0)+size(another, 0)); !strings.Contains(out, want) {
			t.Errorf("does not say %q:\n%s", want, out)
		}
	})
	t.Run("newer", func(t *testing.T) {
		reg.Reset()
		page := filepath.Join(t.TempDir(), "cache.html")
		out := v.MustBuild(t, buildvm.Images(second, other), d.Block(), "report = \""+page+"\"")
		checkReport(t, page, second, other)
		if diff := cmp.Diff([]string{layerDescriptor(t, newer, 1).Digest.String()}, layerBlobs(t, reg, newer)); diff != "" {
			t.Errorf("blobs pulled: %s", diff)
		}
		m, _ := d.Manifest(t)
		if got := names(m); !slices.Contains(got, second) || slices.Contains(got, first) {
			t.Errorf("names are %v", got)
		}
		if !strings.Contains(out, "removed "+first) {
			t.Errorf("does not say that it removed %s:\n%s", first, out)
		}
		if want := counts(size(newer, 1), size(newer, 0)+size(another, 0)); !strings.Contains(out, want) {
			t.Errorf("does not say %q:\n%s", want, out)
		}
	})
	t.Run("moved tag", func(t *testing.T) {
		// The tag's earlier image must leave the store, although nothing names it.
		tag := parse(t, second).(name.Tag)
		if err := remote.Write(tag, newImage(t, added)); err != nil {
			t.Fatal(err)
		}
		v.MustBuild(t, buildvm.Images(second, other), d.Block())
		m, _ := d.Manifest(t)
		d.Mount(t, func(dir string) {
			stored, err := filepath.Glob(filepath.Join(dir, m.Store.Root, "image/overlay2/imagedb/content/sha256/*"))
			if err != nil || len(stored) != len(m.Images) {
				t.Errorf("the store has %d images, the manifest %d (%v)", len(stored), len(m.Images), err)
			}
		})
	})
}

// checkReport finds in the report of a build what only a build knows: that one image was
// pulled and the other was there, what came before, and how full the disk is.
func checkReport(t *testing.T, page, pulled, kept string) {
	t.Helper()
	data, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{
		`(?s)>` + regexp.QuoteMeta(pulled) + `<.*?data-name="Build time" data-value="[1-9]\d*">.*?data-name="Change" data-value="new"`,
		`(?s)>` + regexp.QuoteMeta(kept) + `<.*?data-name="Build time" data-value="0"><small>was there</small></td>.*?data-name="Change" data-value="same"`,
		`1 image is new, 0 have been updated, 1 is gone and 1 is as it was`,
		`aria-label="2\d\d MB in all: [1-9]`, // the disk has 256 MiB
	} {
		if !regexp.MustCompile(want).Match(data) {
			t.Errorf("the report lacks %s", want)
		}
	}
}

// TestProgress has a registry so slow that the build tells how far it is.
func TestProgress(t *testing.T) {
	t.Parallel()
	testProgress(t, debian(t), true)
}

func testProgress(t *testing.T, v *vm, keepBlobs bool) {
	reg := registry.New(t, registry.Config{})
	image := newImage(t, layer(t, map[string]int{"large": 8 << 20}))
	pushed(t, reg, "app:1", image)
	large := layerDescriptor(t, image, 0)
	// 640 kB/s take longer than the ten seconds after which progress is told, for Docker
	// as for the blobs that are kept.
	addr := serveBlob(t, reg, large.Digest, func(w http.ResponseWriter, _ *http.Request, resp *http.Response) {
		tick := time.NewTicker(100 * time.Millisecond)
		defer tick.Stop()
		for {
			if _, err := io.CopyN(w, resp.Body, 64<<10); err != nil {
				return
			}
			w.(http.Flusher).Flush()
			<-tick.C
		}
	})
	ref := addr + "/app:1"
	d := newDisk(t, v, 256)
	out := v.MustBuild(t, buildvm.Images(ref), d.Block(), fmt.Sprintf("keep_blobs = %t", keepBlobs))

	const some = `[1-7](\.\d+)?MB of `
	total := units.HumanSize(float64(large.Size))
	wants := []string{`: pulled ` + regexp.QuoteMeta(total) + `, kept 0B`}
	doing := []string{"pulling"}
	if keepBlobs {
		doing = append(doing, "keeping blobs")
		wants = append(wants, `: copied `+regexp.QuoteMeta(total)+` of blobs, kept 0B`)
	}
	for _, what := range doing {
		wants = append(wants, `: `+what+`: 0 of 1 images, `+some+regexp.QuoteMeta(total)+`, \d+(\.\d+)?kB/s, about \d+s left\n.*`+
			`:   `+regexp.QuoteMeta(ref)+`: `+some+regexp.QuoteMeta(total))
	}
	for _, want := range wants {
		if !regexp.MustCompile(want).MatchString(out) {
			t.Errorf("does not say %s:\n%s", want, out)
		}
	}
}

// TestLabel finds a disk by its label, and keeps what is no longer listed if asked.
func TestLabel(t *testing.T) {
	t.Parallel()
	v := debian(t)
	reg := registry.New(t, registry.Config{})
	first := pushed(t, reg, "app:1", newImage(t, layer(t, map[string]int{"first": 1000})))
	second := pushed(t, reg, "app:2", newImage(t, layer(t, map[string]int{"second": 1000})))
	d := newDisk(t, v, 64)
	before := v.State(t)
	v.MustBuild(t, buildvm.Images(first), d.Block(`mount_point = "/mnt/else/where"`, `docker_root = "var/lib/docker"`))
	if diff := cmp.Diff(before, v.State(t)); diff != "" {
		t.Errorf("the VM changed: %s", diff)
	}
	out := v.MustBuild(t, buildvm.Images(second), `disk {
    label       = "selkies-cache"
    docker_root = "var/lib/docker"
  }`, "prune = false")
	if strings.Contains(out, "removed ") {
		t.Errorf("removed something:\n%s", out)
	}
	m, _ := d.Manifest(t)
	if m.Store.Root != "var/lib/docker" {
		t.Errorf("store.root is %q", m.Store.Root)
	}
	if got := names(m); !slices.Contains(got, second) || slices.Contains(got, first) {
		t.Errorf("names are %v", got)
	}
	d.Mount(t, func(dir string) {
		stored, err := filepath.Glob(filepath.Join(dir, m.Store.Root, "image/overlay2/imagedb/content/sha256/*"))
		if err != nil || len(stored) != 2 {
			t.Errorf("the store has %d images (%v)", len(stored), err)
		}
	})
}

// TestUser logs in as a user who is not root.
func TestUser(t *testing.T) {
	t.Parallel()
	v := debian(t)
	reg := registry.New(t, registry.Config{})
	ref := pushed(t, reg, "app:1", newImage(t, layer(t, map[string]int{"a": 1000})))
	d := newDisk(t, v, 64)
	v.Output(t, "useradd", "--create-home", "builder")
	v.Output(t, "cp", "--recursive", "/root/.ssh", "/home/builder/")
	v.Output(t, "chown", "--recursive", "builder", "/home/builder/.ssh")
	// The machine has no sudo; a setpriv that may is as good.
	v.Output(t, "install", "--mode=4755", "/usr/bin/setpriv", "/usr/local/bin/asroot")

	out, err := world.packer.Build(t, v.Communicator("builder"), buildvm.Images(ref), d.Block()).CombinedOutput()
	if err == nil || !strings.Contains(errorLine(t, string(out)), "allow sudo without a password or set execute_command") {
		t.Errorf("packer build: %v\n%s", err, out)
	}
	execute := `execute_command = "asroot --reuid=0 --regid=0 --clear-groups {{ .Command }}"`
	out, err = world.packer.Build(t, v.Communicator("builder"), buildvm.Images(ref), d.Block(), execute).CombinedOutput()
	if err != nil {
		t.Fatalf("packer build: %v\n%s", err, out)
	}
	if m, _ := d.Manifest(t); len(m.Images) != 1 {
		t.Errorf("recorded %d images", len(m.Images))
	}
}

// TestRetry has a registry that fails the first requests of Docker.
func TestRetry(t *testing.T) {
	t.Parallel()
	v := debian(t)
	reg := registry.New(t, registry.Config{})
	pushed(t, reg, "app:1", newImage(t, layer(t, map[string]int{"a": 1000})))
	proxy := httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: reg.Addr})
	var requests atomic.Int32
	front := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if strings.HasPrefix(r.UserAgent(), "docker/") && strings.Contains(r.URL.Path, "/manifests/") && requests.Add(1) <= 2 {
			http.Error(w, "come back later", http.StatusServiceUnavailable)
			return
		}
		proxy.ServeHTTP(w, r)
	}))
	defer front.Close()
	ref := front.Listener.Addr().String() + "/app:1"

	d := newDisk(t, v, 64)
	out, err := v.Build(t, buildvm.Images(ref), d.Block(), "max_pull_attempts = 1")
	if err == nil || !strings.Contains(errorLine(t, out), "(1 attempts; see max_pull_attempts)") {
		t.Errorf("packer build: %v\n%s", err, out)
	}
	requests.Store(0)
	out = v.MustBuild(t, buildvm.Images(ref), d.Block())
	if !strings.Contains(out, "trying again in ") {
		t.Errorf("does not say that it tries again:\n%s", out)
	}
}

// TestKeepBlobs has a registry that serves the Packer host one blob in part at first, and
// another not at all.
func TestKeepBlobs(t *testing.T) {
	t.Parallel()
	v := debian(t)
	reg := registry.New(t, registry.Config{})
	var refs, blobs []string
	sizes := map[string]int64{}
	for i := range 8 {
		image := newImage(t, layer(t, map[string]int{fmt.Sprint("file", i): 100 << 10}))
		pushed(t, reg, fmt.Sprintf("app-%d:1", i), image)
		l := layerDescriptor(t, image, 0)
		blobs = append(blobs, l.Digest.String())
		sizes[l.Digest.String()] = l.Size
	}
	cut, gone := blobs[0], blobs[7]
	proxy := httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: reg.Addr})
	var mu sync.Mutex
	var asked []string
	open, most := 0, 0
	sound := false
	front := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		_, blob, ok := strings.Cut(r.URL.Path, "/blobs/")
		if !ok || !slices.Contains(blobs, blob) || strings.HasPrefix(r.UserAgent(), "docker/") {
			proxy.ServeHTTP(w, r)
			return
		}
		mu.Lock()
		asked = append(asked, blob)
		first := !slices.Contains(asked[:len(asked)-1], blob)
		open++
		most = max(most, open)
		mu.Unlock()
		time.Sleep(200 * time.Millisecond)
		switch {
		case sound:
			proxy.ServeHTTP(w, r)
		case blob == gone:
			http.NotFound(w, r)
		case blob == cut && first:
			w.Header().Set("Content-Length", fmt.Sprint(sizes[blob]))
			_, _ = w.Write(make([]byte, sizes[blob]/2))
		default:
			proxy.ServeHTTP(w, r)
		}
		mu.Lock()
		open--
		mu.Unlock()
	}))
	defer front.Close()
	for i := range blobs {
		refs = append(refs, fmt.Sprintf("%s/app-%d:1", front.Listener.Addr(), i))
	}
	d := newDisk(t, v, 64)
	// As many at once as there may be, beside sshd's limit on sessions.
	out, err := v.Build(t, buildvm.Images(refs...), d.Block(), "keep_blobs = true", "concurrency = 6")
	want := "1 of 8 references failed: " + refs[7] + " (images[7]): keeping blob " + gone + " of " + refs[7] + ": not found in the registry; push the image again"
	if err == nil || !strings.Contains(errorLine(t, out), want) {
		t.Errorf("packer build: %v\n%s", err, out)
	}
	if again := "keeping blob " + cut + " of " + refs[0] + ": unexpected EOF; trying again in 1s (attempt 2 of 5)"; !strings.Contains(out, again) {
		t.Errorf("does not say %q:\n%s", again, out)
	}
	slices.Sort(asked)
	if diff := cmp.Diff(slices.Sorted(slices.Values(append([]string{cut}, blobs...))), asked); diff != "" {
		t.Errorf("blobs asked for: %s", diff)
	}
	if most < 2 {
		t.Error("never asked for two blobs at once")
	}

	asked, sound = nil, true
	v.MustBuild(t, buildvm.Images(refs...), d.Block(), "keep_blobs = true", "concurrency = 6")
	if diff := cmp.Diff([]string{gone}, asked); diff != "" {
		t.Errorf("blobs asked for by the next build: %s", diff)
	}
	m, _ := d.Manifest(t)
	d.Mount(t, func(dir string) { checkBlobs(t, dir, m) })
}

// TestInsecureRegistry pulls in plain HTTP from an address that is not loopback, if it may.
// With addresses like this one go-containerregistry would do so unasked.
func TestInsecureRegistry(t *testing.T) {
	t.Parallel()
	v := debian(t)
	const ip, user, password = "10.255.77.77", "robot", "battery-staple"
	v.Output(t, "ip", "address", "add", ip+"/32", "dev", "lo")
	t.Cleanup(func() { v.Run(context.Background(), "ip", "address", "delete", ip+"/32", "dev", "lo") })
	reg := registry.New(t, registry.Config{Addr: ip + ":0", Username: user, Password: password})
	auth := remote.WithAuth(&authn.Basic{Username: user, Password: password})
	if err := remote.Write(parse(t, reg.Addr+"/app:1"), newImage(t, layer(t, map[string]int{"a": 1000})), auth); err != nil {
		t.Fatal(err)
	}
	d := newDisk(t, v, 64)
	options := []string{buildvm.Images(reg.Addr + "/app:1"), d.Block(), registryAuth(reg.Addr, user, password)}
	before := reg.Count()
	if out, err := v.Build(t, options...); err == nil || !strings.Contains(errorLine(t, out), "set insecure_registries") {
		t.Errorf("packer build: %v\n%s", err, out)
	}
	if diff := cmp.Diff(before, reg.Count()); diff != "" {
		t.Errorf("the registry was asked in plain HTTP: %s", diff)
	}
	v.MustBuild(t, append(options, `insecure_registries = ["`+reg.Addr+`"]`)...)
}

// TestOwnDaemon fills the store of the VM's own Docker, and leaves alone what it
// did not put there.
func TestOwnDaemon(t *testing.T) {
	t.Parallel()
	v := debian(t)
	reg := registry.New(t, registry.Config{})
	mine := pushed(t, reg, "mine:1", newImage(t, layer(t, map[string]int{"mine": 1000})))
	first := pushed(t, reg, "app:1", newImage(t, layer(t, map[string]int{"first": 1000})))
	second := pushed(t, reg, "app:2", newImage(t, layer(t, map[string]int{"second": 1000})))

	// The machine's /var/lib/docker is a directory of a disk that it has nowhere else.
	t.Run("part of a disk", func(t *testing.T) {
		before := v.State(t)
		out, err := v.Build(t, buildvm.Images(first))
		if err == nil || !strings.Contains(errorLine(t, out), "lies on the mount /var/lib/docker, which shows only ") {
			t.Errorf("packer build: %v\n%s", err, out)
		}
		if diff := cmp.Diff(before, v.State(t)); diff != "" {
			t.Errorf("the VM changed: %s", diff)
		}
	})

	// As a boot disk has it, but for the place where its root is.
	d := newDisk(t, v, 256)
	run(t, "mkfs.ext4", "-q", d.Device)
	stop := func(t *testing.T) {
		t.Helper()
		v.Output(t, "systemctl", "stop", "docker.socket", "docker.service")
	}
	stop(t)
	v.Output(t, "sh", "-ec", "mkdir -p /boot-disk; mount "+d.Device+" /boot-disk; mkdir -p /boot-disk/var/lib/docker; mount --bind /boot-disk/var/lib/docker /var/lib/docker")
	t.Cleanup(func() {
		if err := v.StartDocker(context.Background(), machine.Docker{Release: machine.Debian}); err != nil {
			t.Fatal(err)
		}
	})
	if err := v.StartDocker(t.Context(), machine.Docker{Release: machine.Debian}); err != nil {
		t.Fatal(err)
	}
	v.Output(t, "docker", "pull", mine)
	v.Output(t, "docker", "create", "--network", "none", mine, "/none")

	v.MustBuild(t, buildvm.Images(first))
	v.MustBuild(t, buildvm.Images(second), `docker_host = "unix:///run/docker.sock"`)

	got := v.Output(t, "docker", "images", "--format", "{{.Repository}}:{{.Tag}}")
	if !strings.Contains(got, mine) || strings.Contains(got, first) || !strings.Contains(got, second) {
		t.Errorf("docker images:\n%s", got)
	}
	stop(t)
	v.Output(t, "umount", "/var/lib/docker", "/boot-disk")
	m, _ := d.Manifest(t)
	if m.Store.Root != "var/lib/docker" {
		t.Errorf("store.root is %q", m.Store.Root)
	}
	d.Mount(t, func(dir string) {
		for _, l := range m.Layers {
			if _, err := os.Stat(filepath.Join(dir, m.LayerPath(l), "second")); err != nil {
				t.Error(err)
			}
		}
	})

	// The same store under a daemon of its own: the container's layers have no image,
	// and stay.
	directories := func() (names []string) {
		d.Mount(t, func(dir string) {
			paths, err := filepath.Glob(filepath.Join(dir, "var/lib/docker/overlay2/*/diff"))
			if err != nil {
				t.Fatal(err)
			}
			for _, p := range paths {
				names = append(names, filepath.Base(filepath.Dir(p)))
			}
		})
		return names
	}
	before := directories()
	out := v.MustBuild(t, buildvm.Images(second), d.Block(`docker_root = "var/lib/docker"`))
	if !strings.Contains(out, "kept "+mine+", which is in use") {
		t.Errorf("does not say that %s stays:\n%s", mine, out)
	}
	if diff := cmp.Diff(before, directories()); diff != "" || len(before) != 4 {
		t.Errorf("layer directories: %s", diff)
	}
}

// TestTwoRegistries has one image in two registries, of which pods may name either.
func TestTwoRegistries(t *testing.T) {
	t.Parallel()
	v := debian(t)
	image := newImage(t, layer(t, map[string]int{"a": 1 << 20}))
	digest, err := image.Digest()
	if err != nil {
		t.Fatal(err)
	}
	one, two := registry.New(t, registry.Config{}), registry.New(t, registry.Config{})
	ref := pushed(t, one, "app:1", image)
	pushed(t, two, "app:1", image)
	pinned := two.Addr + "/app@" + digest.String()
	d := newDisk(t, v, 64)
	v.MustBuild(t, buildvm.Images(ref, pinned), d.Block(), "concurrency = 1", "verify = true")
	m, _ := d.Manifest(t)
	if len(m.Images) != 1 {
		t.Fatalf("recorded %d images", len(m.Images))
	}
	if diff := cmp.Diff(slices.Sorted(slices.Values([]string{ref, one.Addr + "/app@" + digest.String(), pinned})), m.Images[0].Names); diff != "" {
		t.Errorf("names: %s", diff)
	}
	if blobs := layerBlobs(t, two, image); len(blobs) > 0 {
		t.Errorf("the layer was pulled from both")
	}
	// Each stays what it is when the other is not there any more.
	if err := one.Stop(); err != nil {
		t.Fatal(err)
	}
	v.MustBuild(t, buildvm.Images(pinned), d.Block())
	if m, _ := d.Manifest(t); !slices.Equal(m.Images[0].Names, []string{pinned}) {
		t.Errorf("names are %v", m.Images[0].Names)
	}
}

// TestDamagedLayer has a byte change on the disk between two builds.
func TestDamagedLayer(t *testing.T) {
	t.Parallel()
	v := debian(t)
	reg := registry.New(t, registry.Config{})
	kept := pushed(t, reg, "kept:1", newImage(t, layer(t, map[string]int{"kept": 1000})))
	dropped := pushed(t, reg, "dropped:1", newImage(t, layer(t, map[string]int{"dropped": 1000})))
	d := newDisk(t, v, 64)
	v.MustBuild(t, buildvm.Images(kept, dropped), d.Block(), "verify = true")
	m, data := d.Manifest(t)
	dir := t.TempDir()
	if err := unix.Mount(d.Device, dir, "ext4", 0, ""); err != nil {
		t.Fatal(err)
	}
	files, err := filepath.Glob(filepath.Join(dir, m.Store.Root, "overlay2/*/diff/kept"))
	if err == nil && len(files) == 1 {
		err = os.WriteFile(files[0], make([]byte, 1000), 0o644)
	}
	if err := errors.Join(err, unix.Unmount(dir, 0)); err != nil || len(files) != 1 {
		t.Fatal(files, err)
	}

	out, err := v.Build(t, buildvm.Images(kept), d.Block(), "verify = true")
	if err == nil || !strings.Contains(errorLine(t, out), `build once with disk.format = "always" to fill the disk anew`) {
		t.Errorf("packer build: %v\n%s", err, out)
	}
	if _, after := d.Manifest(t); !bytes.Equal(after, data) {
		t.Error("the layer manifest changed")
	}
	d.Mount(t, func(dir string) {
		if files, err := filepath.Glob(filepath.Join(dir, m.Store.Root, "overlay2/*/diff/dropped")); err != nil || len(files) != 1 {
			t.Errorf("an image was removed that the layer manifest still has (%v)", err)
		}
	})
	v.MustBuild(t, buildvm.Images(kept), d.Block(`format = "always"`), "verify = true")
}

// TestDaemonConfiguration finds out what the daemon on the disk takes from the VM: the
// certificates of registries and systemd's environment, but nothing that the VM's own
// daemon is given.
func TestDaemonConfiguration(t *testing.T) {
	t.Parallel()
	v := debian(t)
	// A documentation address, given to the loopback device: Docker takes any
	// certificate of a loopback address.
	const ip = "192.0.2.78"
	v.Output(t, "ip", "address", "add", ip+"/32", "dev", "lo")
	t.Cleanup(func() { v.Run(context.Background(), "ip", "address", "delete", ip+"/32", "dev", "lo") })
	reg := registry.New(t, registry.Config{})
	pushed(t, reg, "app:1", newImage(t, layer(t, map[string]int{"a": 1000})))
	addr, ca := registry.ServeTLS(t, ip+":0", nil, httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: reg.Addr}))
	caFile := filepath.Join(t.TempDir(), "ca.crt")
	if err := os.WriteFile(caFile, ca, 0o600); err != nil {
		t.Fatal(err)
	}
	build := func(options ...string) (string, error) {
		d := newDisk(t, v, 64)
		cmd := v.PackerBuild(t, append(options, buildvm.Images(addr+"/app:1"), d.Block(), "max_pull_attempts = 1")...)
		cmd.Env = append(cmd.Env, "SSL_CERT_FILE="+caFile)
		out, err := cmd.CombinedOutput()
		return string(out), err
	}

	out, err := build()
	if err == nil || !strings.Contains(errorLine(t, out), "/etc/docker/certs.d/"+addr+"/ca.crt") {
		t.Errorf("packer build: %v\n%s", err, out)
	}
	if err := v.WriteFile("/etc/docker/certs.d/"+addr+"/ca.crt", ca, 0o644); err != nil {
		t.Fatal(err)
	}
	// A proxy that the VM's own daemon has, and that nobody answers at.
	const proxy = "HTTPS_PROXY=http://127.0.0.1:1"
	if err := v.WriteFile("/etc/systemd/system/docker.service.d/proxy.conf", []byte("[Service]\nEnvironment="+proxy+"\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_, _ = v.Run(context.Background(), "rm", "-r", "/etc/docker/certs.d", "/etc/systemd/system/docker.service.d/proxy.conf")
		if err := v.StartDocker(context.Background(), machine.Docker{Release: machine.Debian}); err != nil {
			t.Error(err)
		}
	})
	if err := v.StartDocker(t.Context(), machine.Docker{Release: machine.Debian}); err != nil {
		t.Fatal(err)
	}
	if out, err := build(); err != nil {
		t.Errorf("packer build: %v\n%s", err, out)
	}

	v.Output(t, "systemctl", "set-environment", proxy)
	t.Cleanup(func() { v.Run(context.Background(), "systemctl", "unset-environment", "HTTPS_PROXY") })
	if out, err := build(); err == nil || !strings.Contains(errorLine(t, out), "proxyconnect") {
		t.Errorf("packer build: %v\n%s", err, out)
	}
}

func pushed(t *testing.T, reg *registry.Registry, ref string, image v1.Image) string {
	t.Helper()
	full := reg.Addr + "/" + ref
	if err := remote.Write(parse(t, full), image); err != nil {
		t.Fatal(err)
	}
	return full
}

func parse(t *testing.T, ref string) name.Reference {
	t.Helper()
	r, err := name.ParseReference(ref)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// layerBlobs are the layers among the blobs that were fetched.
func layerBlobs(t *testing.T, reg *registry.Registry, image v1.Image) []string {
	t.Helper()
	layers, err := image.Layers()
	if err != nil {
		t.Fatal(err)
	}
	var fetched []string
	for _, l := range layers {
		d, err := l.Digest()
		if err != nil {
			t.Fatal(err)
		}
		if slices.Contains(reg.Count().Blobs, d.String()) {
			fetched = append(fetched, d.String())
		}
	}
	return fetched
}

func names(m *manifest.Manifest) (names []string) {
	for _, img := range m.Images {
		names = append(names, img.Names...)
	}
	return names
}
