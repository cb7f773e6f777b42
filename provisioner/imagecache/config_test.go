package imagecache

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
)

func TestPrepare(t *testing.T) {
	dir := t.TempDir()
	write := func(name, text string) string {
		file := filepath.Join(dir, name)
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		return file
	}
	with := func(kv ...any) map[string]any {
		m := map[string]any{"images": []string{"debian:12"}}
		for i := 0; i < len(kv); i += 2 {
			m[kv[i].(string)] = kv[i+1]
		}
		return m
	}
	disk := func(kv ...string) map[string]string {
		m := map[string]string{"device": "/dev/sdb"}
		for i := 0; i < len(kv); i += 2 {
			m[kv[i]] = kv[i+1]
		}
		return m
	}
	digest := "@sha256:" + strings.Repeat("a", 64)
	catalog := func(kv ...any) []map[string]any {
		m := map[string]any{"repository": "registry:5000/apps"}
		for i := 0; i < len(kv); i += 2 {
			m[kv[i].(string)] = kv[i+1]
		}
		return []map[string]any{m}
	}
	tests := []struct {
		name   string
		config map[string]any
		want   string // of the error, empty for none
	}{
		{"images only", with(), ""},
		{"everything", with("disk", disk("mount_point", "/mnt/a", "format", "always", "docker_root", "var/docker"),
			"platform", "linux/arm64/v8", "concurrency", 6, "prune", false, "verify", true, "max_pull_attempts", 1,
			"execute_command", "doas {{ .Command }}", "keep_blobs", true, "insecure_registries", []string{"10.0.0.1:5000"}), ""},
		{"list only", map[string]any{"image_list_file": write("ok", "# list\n\n debian:12 # stable\nregistry:5000/a/b"+digest+"\n")}, ""},
		{"tag and its digest", with("images", []string{"app:1", "app" + digest}), ""},
		{"catalog only", map[string]any{"catalog": catalog("include", []string{"a|b/.*"}, "exclude", []string{"c"}, "tags", []string{"v[0-9]+"}, "limit", 5)}, ""},
		{"catalog of a registry", map[string]any{"catalog": catalog("repository", "localhost")}, ""},
		{"catalog without repository", map[string]any{"catalog": []map[string]any{{}}}, `catalog[0]: repository "" does not begin with a registry`},
		{"catalog without registry", with("catalog", catalog("repository", "apps/a")), `catalog[0]: repository "apps/a" does not begin with a registry`},
		{"catalog with a malformed repository", with("catalog", catalog("repository", "registry:5000/Apps")), `catalog[0]: repository "registry:5000/Apps"`},
		{"catalog with a slash too many", with("catalog", catalog("repository", "registry:5000/")), `catalog[0]: repository "registry:5000/"`},
		{"include", with("catalog", catalog("include", []string{"a", "*"})), `catalog[0]: include: "*" is not a regular expression`},
		{"tags", with("catalog", catalog("tags", []string{"v(1"})), `catalog[0]: tags: "v(1" is not a regular expression`},
		{"limit", with("catalog", catalog("limit", -1)), "catalog[0]: limit is -1"},
		{"dry_run", with("dry_run", true), ""},
		{"nothing", map[string]any{}, "images and image_list_file name no image"},
		{"empty list", map[string]any{"image_list_file": write("empty", "# nothing\n")}, "name no image"},
		{"missing list", with("image_list_file", filepath.Join(dir, "none")), "image_list_file: open "},
		{"malformed", with("images", []string{"debian", "De bian"}), `images[1]: "De bian"`},
		{"malformed in list", with("image_list_file", write("bad", "ok\nbad::\n")), `bad:2: "bad::"`},
		{"comment without blank", with("image_list_file", write("hash", "ok#1\n")), `hash:1: "ok#1"`},
		{"upper case", with("images", []string{"UPPER/case"}), `images[0]: "UPPER/case"`},
		{"bad digest", with("images", []string{"app@sha256:abc"}), `images[0]: "app@sha256:abc"`},
		{"duplicate", with("image_list_file", write("twice", "\ndocker.io/library/debian:12\n")), `twice:2: "debian:12" is a duplicate of images[0]`},
		{"tag for two images", with("images", []string{"app:1", "app:1" + digest}), "images[1]: "},
		{"platform without architecture", with("platform", "amd64"), `platform "amd64"`},
		{"windows", with("platform", "windows/amd64"), `platform "windows/amd64"`},
		{"concurrency", with("concurrency", 7), "concurrency is 7"},
		{"attempts", with("max_pull_attempts", -1), "max_pull_attempts is -1"},
		{"execute_command without command", with("execute_command", "sudo"), "execute_command"},
		{"execute_command malformed", with("execute_command", "{{ .Command"), "execute_command"},
		{"disk without device", with("disk", map[string]string{}), "disk: set device or label"},
		{"device and label", with("disk", disk("label", "cache")), "disk: device and label are both set"},
		{"relative device", with("disk", disk("device", "sdb")), `disk.device "sdb"`},
		{"mount point", with("disk", disk("mount_point", "/mnt/a b")), `disk.mount_point "/mnt/a b"`},
		{"root as mount point", with("disk", disk("mount_point", "/")), `disk.mount_point "/"`},
		{"format", with("disk", disk("format", "maybe")), `disk.format is "maybe"`},
		{"format and label", with("disk", map[string]string{"label": "a", "format": "always"}), "disk.format"},
		{"absolute docker_root", with("disk", disk("docker_root", "/docker")), `disk.docker_root "/docker"`},
		{"docker_root outside", with("disk", disk("docker_root", "../docker")), `disk.docker_root "../docker"`},
		{"docker_host and disk", with("disk", disk(), "docker_host", "unix:///a"), "docker_host and disk are both set"},
		{"registry_auth incomplete", with("registry_auth", []map[string]string{{"server": "a"}}), "registry_auth[0]: set server, username and password"},
		{"registry_auth twice", with("registry_auth", []map[string]string{
			{"server": "docker.io", "username": "u", "password": "p"}, {"server": "https://index.docker.io/v1/", "username": "u", "password": "p"},
		}), "registry_auth[1]: server "},
		{"trace", with("injector", write("injector", ""), "trace", []map[string]any{{"image": "debian"}, {"image": "debian:12", "command": []string{"a"}, "seconds": 600}}), ""},
		{"trace without injector", with("trace", []map[string]any{{"image": "debian:12"}}), "trace needs injector: the selkies-image-injector for linux/amd64"},
		{"no injector there", with("injector", filepath.Join(dir, "none"), "trace", []map[string]any{{"image": "debian:12"}}), "injector: stat "},
		{"injector is a directory", with("injector", dir, "trace", []map[string]any{{"image": "debian:12"}}), "is not a regular file"},
		{"trace of nothing", with("injector", write("injector", ""), "trace", []map[string]any{{}}), `trace[0].image: ""`},
		{"trace twice", with("injector", write("injector", ""), "trace", []map[string]any{{"image": "debian"}, {"image": "debian:latest"}}), `trace[1].image: "debian:latest" has a trace block before`},
		{"trace too long", with("injector", write("injector", ""), "trace", []map[string]any{{"image": "debian", "seconds": 601}}), "trace[0].seconds is 601"},
		{"insecure_registries", with("insecure_registries", []string{"http://a"}), `insecure_registries[0]: "http://a"`},
		{"unknown option", with("imges", "a"), "imges"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var p Provisioner
			err := p.Prepare(tt.config)
			if tt.want == "" {
				if err != nil {
					t.Fatal(err)
				}
				return
			}
			if err == nil || !strings.Contains(err.Error(), tt.want) {
				t.Errorf("error is %v, want one with %q", err, tt.want)
			}
		})
	}
}

func TestNames(t *testing.T) {
	digest := "sha256:" + strings.Repeat("a", 64)
	tests := []struct{ ref, tag, lookup string }{
		{"debian", "docker.io/library/debian:latest", ""},
		{"user/app:1", "docker.io/user/app:1", ""},
		{"localhost:5000/app", "localhost:5000/app:latest", ""},
		{"gcr.io/p/app@" + digest, "", digest},
		{"app:1@" + digest, "docker.io/library/app:1", digest},
	}
	for _, tt := range tests {
		ref, err := parseReference("images[0]", tt.ref)
		if err != nil {
			t.Fatal(err)
		}
		got := []string{ref.tag(), ref.pinned().String()}
		if diff := cmp.Diff([]string{tt.tag, tt.lookup}, got); diff != "" {
			t.Errorf("%s: %s", tt.ref, diff)
		}
	}
}
