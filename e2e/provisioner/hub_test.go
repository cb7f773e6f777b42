//go:build e2e

package provisioner_test

import (
	"context"
	"net/http/httputil"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"github.com/selkies-project/packer-plugin-selkies/e2e/buildvm"
	"github.com/selkies-project/packer-plugin-selkies/e2e/registry"
)

// TestDockerHub takes Docker Hub's place for the Packer host and the VM, and asks for a
// password. The hub has one name in references, others on the network and yet another in
// Docker's configuration.
func TestDockerHub(t *testing.T) {
	t.Parallel()
	v := debian(t)
	const (
		ip, hosts      = "192.0.2.79", "192.0.2.79 index.docker.io registry-1.docker.io\n"
		user, password = "robot", "correct-horse"
		loginKey       = "https://index.docker.io/v1/"
	)
	v.Output(t, "ip", "address", "add", ip+"/32", "dev", "lo")
	t.Cleanup(func() { v.Run(context.Background(), "ip", "address", "delete", ip+"/32", "dev", "lo") })
	reg := registry.New(t, registry.Config{Username: user, Password: password})
	_, ca := registry.ServeTLS(t, ip+":443", []string{"index.docker.io", "registry-1.docker.io"}, httputil.NewSingleHostReverseProxy(&url.URL{Scheme: "http", Host: reg.Addr}))
	dir := t.TempDir()
	for name, data := range map[string][]byte{"ca.crt": ca, "hosts": []byte(hosts)} {
		if err := os.WriteFile(filepath.Join(dir, name), data, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	// Docker takes no certificates for the hub but those of the system.
	const vmCA = "/etc/ssl/certs/e2e-hub.pem"
	if err := v.WriteFile(vmCA, ca, 0o644); err != nil {
		t.Fatal(err)
	}
	vmHosts := v.Output(t, "cat", "/etc/hosts")
	if err := v.WriteFile("/etc/hosts", []byte(vmHosts+hosts), 0o644); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		_, _ = v.Run(context.Background(), "rm", vmCA)
		if err := v.WriteFile("/etc/hosts", []byte(vmHosts), 0o644); err != nil {
			t.Error(err)
		}
	})

	d := newDisk(t, v, 64)
	for i, tt := range []struct {
		ref, repository string
		options, env    []string
	}{
		{"tool:1", "library/tool", []string{registryAuth("docker.io", user, password)}, nil},
		{"team/app:1", "team/app", []string{registryAuth(loginKey, user, password)}, nil},
		{"docker.io/tool:2", "library/tool", []string{"keep_blobs = true"}, dockerConfig(t, loginKey, user, password)},
		{"index.docker.io/team/app:2", "team/app", []string{"keep_blobs = true"}, credentialHelper(t, `{"credsStore": "e2e"}`, loginKey, user, password)},
	} {
		t.Run(tt.ref, func(t *testing.T) {
			tag := tt.ref[strings.LastIndex(tt.ref, ":"):]
			image := newImage(t, layer(t, map[string]int{tt.ref: 1000 + i}))
			if err := remote.Write(parse(t, reg.Addr+"/"+tt.repository+tag), image, remote.WithAuth(&authn.Basic{Username: user, Password: password})); err != nil {
				t.Fatal(err)
			}
			cmd := v.PackerBuild(t, append(tt.options, buildvm.Images(tt.ref), d.Block())...)
			// The Packer host knows the hub's address in a mount namespace of its own.
			inNamespace := exec.CommandContext(t.Context(), "unshare", append([]string{"--mount", "--propagation=private",
				"sh", "-ec", `mount --bind "$0" /etc/hosts; exec "$@"`, filepath.Join(dir, "hosts")}, cmd.Args...)...)
			inNamespace.Dir, inNamespace.Env = cmd.Dir, append(append(cmd.Env, "SSL_CERT_FILE="+filepath.Join(dir, "ca.crt")), tt.env...)
			if out, err := inNamespace.CombinedOutput(); err != nil {
				t.Fatalf("packer build: %v\n%s", err, out)
			}
			digest, err := image.Digest()
			if err != nil {
				t.Fatal(err)
			}
			m, _ := d.Manifest(t)
			name := "docker.io/" + tt.repository
			if diff := cmp.Diff(slices.Sorted(slices.Values([]string{name + tag, name + "@" + digest.String()})), names(m)); diff != "" {
				t.Errorf("names: %s", diff)
			}
			if blobs := layerBlobs(t, reg, image); len(blobs) == 0 {
				t.Error("the image came from elsewhere")
			}
		})
	}
}
