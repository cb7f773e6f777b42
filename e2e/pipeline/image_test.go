//go:build e2e

package pipeline_test

import (
	"fmt"
	"os/exec"
	"strings"
	"testing"

	"github.com/selkies-project/packer-plugin-selkies/e2e/host"
	"github.com/selkies-project/packer-plugin-selkies/e2e/machine"
)

// runc has containers see Go and its caches of this host, in place of what the image
// golang has, and the network.
const runc = `#!/bin/sh
bundle= last=
for arg; do
	[ "$last" != --bundle ] || bundle=$arg
	last=$arg
done
[ -z "$bundle" ] || sed -i 's|"mounts":\[|&%s|' "$bundle/config.json"
exec runc "$@"
`

// bases makes stand-ins for the base images of the Dockerfile: golang is busybox, and
// distroless has what the Dockerfile says that it is for.
const bases = `
mkdir -p /tmp/golang/bin /tmp/golang/etc /tmp/golang/tmp /tmp/golang/usr/local/bin /tmp/static/etc/ssl/certs /tmp/static/tmp
for applet in $(busybox --list); do ln -s busybox /tmp/golang/bin/$applet; done
cp --remove-destination /bin/busybox /tmp/golang/bin
cat /etc/ssl/certs/ca-certificates.crt /root/ca.crt >/tmp/static/etc/ssl/certs/ca-certificates.crt
echo root:x:0:0:root:/root:/bin/sh >/tmp/golang/etc/passwd
chmod 1777 /tmp/static/tmp
tar -C /tmp/golang -c . | docker import -c 'ENV PATH=/usr/local/go/bin:/usr/local/bin:/bin GOPATH=/go GOTOOLCHAIN=local GOPROXY=off' - golang:1.26-bookworm
tar -C /tmp/static -c . | docker import -c 'ENV PATH=/usr/local/bin:/bin' - gcr.io/distroless/static-debian12
`

// packerImage has a real Docker build the Dockerfile and push the image, which trusts ca
// as well.
func packerImage(t *testing.T, image string, ca []byte) {
	t.Helper()
	top, err := host.Source(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	binds := map[string]string{"/src": top}
	var mounts strings.Builder
	for dir, variable := range map[string]string{"/usr/local/go": "GOROOT", "/go/pkg/mod": "GOMODCACHE", "/root/.cache/go-build": "GOCACHE"} {
		value, err := host.Output(exec.CommandContext(t.Context(), "go", "env", variable))
		if err != nil {
			t.Fatal(err)
		}
		binds["/host"+dir] = strings.TrimSpace(value)
		fmt.Fprintf(&mounts, `{"destination":"%[1]s","source":"/host%[1]s","type":"bind","options":["rbind"]},`, dir)
	}
	m := machine.New(t, machine.Config{Name: "docker", Binds: binds})
	if err := m.WriteFile("/root/ca.crt", ca, 0o644); err != nil {
		t.Fatal(err)
	}
	const runtime = "/usr/local/sbin/runc-with-go"
	if err := m.WriteFile(runtime, fmt.Appendf(nil, runc, mounts.String()), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := m.StartContainerd(t.Context(), machine.Containerd{Release: machine.Debian}); err != nil {
		t.Fatal(err)
	}
	if err := m.StartDocker(t.Context(), machine.Docker{Release: machine.Debian, Config: map[string]any{
		"runtimes": map[string]any{"with-go": map[string]string{"path": runtime}}, "default-runtime": "with-go",
	}}); err != nil {
		t.Fatal(err)
	}
	m.Output(t, "sh", "-ec", bases)
	m.Output(t, "sh", "-ec", `cd /src; docker build --network=none --file=example/gke/Dockerfile --tag="$1" . >&2`, "build", image)

	inImage := func(args ...string) string {
		return m.Output(t, append([]string{"docker", "run", "--rm", "--runtime=runc", "--network=none", "--user=65532:65532", "--read-only", "--tmpfs=/tmp",
			"--cap-drop=ALL", "--security-opt=no-new-privileges", "--volume=/src/example/gke:/template:ro", "--env=PKR_VAR_image_list_file=/template/images.txt", image}, args...)...)
	}
	plugins := strings.Fields(inImage("plugins", "installed"))
	if len(plugins) != 2 || !strings.HasPrefix(plugins[0], "/plugins/github.com/hashicorp/googlecompute/") || !strings.HasPrefix(plugins[1], "/plugins/github.com/selkies-project/selkies/") {
		t.Errorf("the image has the plugins %q", plugins)
	}
	inImage("validate", "-var", "project_id=broker", "-var", "zone="+zone, "-var", "cluster_pattern=^broker-", "-var", "injector_image=registry.example/injector:1",
		"-var", traces("registry.example/app:1"), "/template/image-cache.pkr.hcl")
	m.Output(t, "docker", "push", "-q", image)
}
