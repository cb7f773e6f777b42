//go:build e2e

package provisioner_test

import (
	"bytes"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"sigs.k8s.io/yaml"

	"github.com/selkies-project/packer-plugin-selkies/e2e/buildvm"
	"github.com/selkies-project/packer-plugin-selkies/e2e/host"
	"github.com/selkies-project/packer-plugin-selkies/e2e/packer"
	"github.com/selkies-project/packer-plugin-selkies/e2e/registry"
	"github.com/selkies-project/packer-plugin-selkies/e2e/release"
	"github.com/selkies-project/packer-plugin-selkies/version"
)

// The names of a release, as Packer's getter puts them together.
const (
	repository = "selkies-project/packer-plugin-selkies"
	plugin     = "packer-plugin-selkies_v1.2.3_x5.0_linux_amd64"
	injector   = "selkies-image-injector_v1.2.3_linux_amd64"
	image      = "selkies-image-injector_v1.2.3_image.txt"
)

// TestRelease makes a release, has packer init install it for a template that requires the
// plugin, and builds a cache with it.
func TestRelease(t *testing.T) {
	t.Parallel()
	tree := t.TempDir()
	dist := makeRelease(t, tree)
	if err := release.Check(dist, release.Platforms{Plugin: []string{"linux/amd64"}, Injector: []string{"linux/amd64"}}); err != nil {
		t.Error(err)
	}
	checkImage(t, tree, dist)

	dir := t.TempDir()
	p, err := packer.Bare(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	template := filepath.Join(dir, "template.pkr.hcl")
	reg := registry.New(t, registry.Config{})
	ref := pushed(t, reg, "app:1", newImage(t, layer(t, map[string]int{"a": 1000})))
	v := debian(t)
	d := newDisk(t, v, 64)
	text := `
packer {
  required_plugins {
    selkies = {
      source  = "github.com/selkies-project/selkies"
      version = "~> 1.0"
    }
  }
}
source "null" "vm" {` + v.Communicator("root") + `}
build {
  sources = ["source.null.vm"]
  provisioner "selkies-image-cache" {
    ` + buildvm.Images(ref) + d.Block() + `
  }
}
`
	if err := os.WriteFile(template, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}

	init := p.Command(t.Context(), "init", template)
	init.Env = append(init.Env, releaseHost(t, dist)...)
	out, err := host.Output(init)
	if err != nil {
		t.Fatal(err)
	}
	installed := filepath.Join(dir, "plugins/github.com/selkies-project/selkies", plugin)
	if want := "Installed plugin github.com/selkies-project/selkies v1.2.3 in \"" + installed + "\"\n"; out != want {
		t.Errorf("packer init said %q, want %q", out, want)
	}
	build := p.Command(t.Context(), "build", template)
	build.Env = append(build.Env, "DOCKER_CONFIG="+dir)
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("packer build: %v\n%s", err, out)
	}
	if m, _ := d.Manifest(t); m.Tool != "packer-plugin-selkies/1.2.3" || !slices.Contains(names(m), ref) {
		t.Errorf("the cache was written by %s and has %q", m.Tool, names(m))
	}
}

// makeRelease runs goreleaser as for the tag v1.2.3, for this machine's platform alone, in
// a copy of the source in tree. It returns the folder of what would be published.
func makeRelease(t *testing.T, tree string) string {
	t.Helper()
	source, err := host.Source(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	// A real clone has a remote, which goreleaser asks for the name of the repository.
	prepare := exec.CommandContext(t.Context(), "sh", "-ec", `
git -C "$1" ls-files -z --cached --others --exclude-standard | tar -C "$1" -c --null --no-recursion -T - | tar -x -C "$2"
cd "$2"
git init -q
git add -A
git -c user.name=e2e -c user.email=e2e@localhost commit -qm release
git tag v1.2.3
git remote add origin https://github.com/`+repository, "sh", source, tree)
	if _, err := host.Output(prepare); err != nil {
		t.Fatal(err)
	}
	path := os.Getenv("PATH")
	for _, tool := range []string{"goreleaser", "cyclonedx-gomod"} {
		dir, err := host.Tool(t.Context(), tool)
		if err != nil {
			t.Fatal(err)
		}
		path = dir + ":" + path
	}
	home, fingerprint := signingKey(t)
	cmd := exec.CommandContext(t.Context(), "make", "-s", "release", "RELEASE_FLAGS=--skip=publish --config="+onePlatform(t, tree))
	cmd.Dir = tree
	cmd.Env = append(os.Environ(), "PATH="+path, "GNUPGHOME="+home, "GPG_FINGERPRINT="+fingerprint)
	if _, err := host.Output(cmd); err != nil {
		t.Fatal(err)
	}
	dist := filepath.Join(tree, "build/dist")
	verify(t, dist, home)
	return dist
}

// signingKey makes a key for gpg, in a folder of its own.
func signingKey(t *testing.T) (home, fingerprint string) {
	t.Helper()
	home = t.TempDir()
	run := func(args ...string) string {
		cmd := exec.Command(args[0], args[1:]...)
		cmd.Env = append(os.Environ(), "GNUPGHOME="+home)
		out, err := host.Output(cmd)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	// gpg leaves its agent running.
	t.Cleanup(func() { run("gpgconf", "--kill", "all") })
	run("gpg", "--batch", "--passphrase", "", "--quick-generate-key", "e2e", "ed25519", "sign", "never")
	for line := range strings.Lines(run("gpg", "--batch", "--with-colons", "--list-secret-keys")) {
		if f := strings.Split(line, ":"); f[0] == "fpr" {
			return home, f[9]
		}
	}
	t.Fatal("gpg lists no key")
	return
}

// onePlatform is the configuration of releases without platforms other than this one.
func onePlatform(t *testing.T, tree string) string {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(tree, ".goreleaser.yml"))
	if err != nil {
		t.Fatal(err)
	}
	var config map[string]any
	if err := yaml.Unmarshal(data, &config); err != nil {
		t.Fatal(err)
	}
	platforms := map[string][]string{}
	for _, build := range config["builds"].([]any) {
		b := build.(map[string]any)
		id := fmt.Sprint(b["id"])
		for _, goos := range b["goos"].([]any) {
			for _, goarch := range b["goarch"].([]any) {
				platforms[id] = append(platforms[id], fmt.Sprint(goos, "/", goarch))
			}
		}
		b["goos"], b["goarch"] = []string{"linux"}, []string{"amd64"}
	}
	want := map[string][]string{"plugin": release.All.Plugin, "injector": release.All.Injector}
	if diff := cmp.Diff(want, platforms); diff != "" {
		t.Errorf("a release's platforms (-want +got):\n%s", diff)
	}
	if data, err = yaml.Marshal(config); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(t.TempDir(), "goreleaser.yml")
	if err := os.WriteFile(file, data, 0o600); err != nil {
		t.Fatal(err)
	}
	return file
}

// verify runs the commands by which SECURITY.md has readers verify a release.
func verify(t *testing.T, dist, home string) {
	t.Helper()
	data, err := os.ReadFile("../../SECURITY.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, begin := range []string{"gpg --verify ", "sha256sum --check ", "cat selkies-image-injector_"} {
		_, line, found := strings.Cut(string(data), "\n    "+begin)
		line, _, _ = strings.Cut(line, "\n")
		if !found {
			t.Errorf("SECURITY.md does not have %s", begin)
		}
		cmd := exec.CommandContext(t.Context(), "sh", "-ec", strings.ReplaceAll(begin+line, "_v"+version.Version+"_", "_v1.2.3_"))
		cmd.Dir = dist
		cmd.Env = append(os.Environ(), "GNUPGHOME="+home)
		if _, err := host.Output(cmd); err != nil {
			t.Error(err)
		}
	}
}

// checkImage finds the archive's injector in the container image whose digest is part of
// the release, for each platform that nodes have.
func checkImage(t *testing.T, tree, dist string) {
	t.Helper()
	all, err := layout.ImageIndexFromPath(filepath.Join(tree, "build/injector-image"))
	if err != nil {
		t.Fatal(err)
	}
	top, err := all.IndexManifest()
	if err != nil {
		t.Fatal(err)
	}
	digest := top.Manifests[0].Digest
	published, err := os.ReadFile(filepath.Join(dist, image))
	if err != nil {
		t.Fatal(err)
	}
	if want := "selkies-image-injector:1.2.3@" + digest.String() + "\n"; !strings.HasSuffix(string(published), want) {
		t.Errorf("the release says that the image is %q, want %q", published, want)
	}
	index, err := all.ImageIndex(digest)
	if err != nil {
		t.Fatal(err)
	}
	m, err := index.IndexManifest()
	if err != nil {
		t.Fatal(err)
	}
	if v := m.Annotations["org.opencontainers.image.version"]; v != "1.2.3" {
		t.Errorf("the image is of version %q", v)
	}
	var platforms []string
	for _, desc := range m.Manifests {
		platforms = append(platforms, desc.Platform.String())
		if !desc.Platform.Equals(v1.Platform{OS: "linux", Architecture: "amd64"}) {
			continue
		}
		img, err := index.Image(desc.Digest)
		if err != nil {
			t.Fatal(err)
		}
		files := mutate.Extract(img)
		defer files.Close()
		inImage, err := release.Untar(files)
		if err != nil {
			t.Fatal(err)
		}
		archived, err := release.Archived(filepath.Join(dist, injector+".tar.gz"))
		if err != nil {
			t.Fatal(err)
		}
		got, want := inImage["usr/local/bin/selkies-image-injector"].Data, archived["selkies-image-injector"].Data
		if !bytes.Equal(got, want) {
			t.Errorf("the image's injector has %d bytes, the archive's %d; they differ", len(got), len(want))
		}
		program := filepath.Join(t.TempDir(), "selkies-image-injector")
		if err := os.WriteFile(program, want, 0o700); err != nil {
			t.Fatal(err)
		}
		if said, err := host.Output(exec.CommandContext(t.Context(), program, "version")); err != nil || strings.TrimSpace(said) != "1.2.3" {
			t.Errorf("the injector's version is %q, %v", said, err)
		}
	}
	if want := []string{"linux/amd64", "linux/arm64"}; !slices.Equal(platforms, want) {
		t.Errorf("the image is for %q, want %q", platforms, want)
	}
}

// releaseHost serves dist where packer init looks for releases, and is what a packer
// needs in its environment to look there: the names of hosts are in Packer's code, so a
// proxy takes all that it sends to port 443.
func releaseHost(t *testing.T, dist string) []string {
	t.Helper()
	mux := http.NewServeMux()
	mux.HandleFunc("GET api.github.com/repos/"+repository+"/git/matching-refs/tags", func(w http.ResponseWriter, _ *http.Request) {
		fmt.Fprint(w, `[{"ref": "refs/tags/v1.2.3"}, {"ref": "refs/tags/v0.9.0"}]`)
	})
	files := http.FileServer(http.Dir(dist))
	mux.Handle("GET github.com/"+repository+"/releases/download/v1.2.3/", http.StripPrefix("/"+repository+"/releases/download/v1.2.3", files))
	// Packer looks there first, for plugins of its makers.
	mux.HandleFunc("GET releases.hashicorp.com/", http.NotFound)
	mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		t.Errorf("packer init asked for %s %s%s", r.Method, r.Host, r.URL.Path)
		http.NotFound(w, r)
	})
	addr, ca := registry.ServeTLS(t, "127.0.0.1:0", []string{"api.github.com", "github.com", "releases.hashicorp.com"}, mux)

	proxy := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Method != http.MethodConnect {
			t.Errorf("packer init sent %s %s without TLS", r.Method, r.URL)
			return
		}
		upstream, err := net.Dial("tcp", addr)
		if err != nil {
			t.Error(err)
			return
		}
		defer upstream.Close()
		conn, _, err := http.NewResponseController(w).Hijack()
		if err != nil {
			t.Error(err)
			return
		}
		defer conn.Close()
		fmt.Fprint(conn, "HTTP/1.1 200 OK\r\n\r\n")
		go func() { _, _ = io.Copy(upstream, conn) }()
		_, _ = io.Copy(conn, upstream)
	}))
	t.Cleanup(proxy.Close)

	file := filepath.Join(t.TempDir(), "ca.pem")
	if err := os.WriteFile(file, ca, 0o600); err != nil {
		t.Fatal(err)
	}
	return []string{"HTTPS_PROXY=" + proxy.URL, "NO_PROXY=", "SSL_CERT_FILE=" + file, "SSL_CERT_DIR=" + t.TempDir(), "PACKER_GITHUB_API_TOKEN="}
}
