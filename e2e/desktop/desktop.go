// Package desktop makes images like those that the project is for: a streamed desktop
// with a browser, 1.5 GB of files in three layers, and a small one beside it that shares
// its base. They are made of Debian's packages, once, and kept in the cache folder.
package desktop

import (
	"context"
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"

	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/mutate"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"golang.org/x/sys/unix"

	"github.com/selkies-project/packer-plugin-selkies/e2e/host"
)

// Image is an image in a registry and how to start it.
type Image struct {
	Ref string
	// Command runs until it ends, having said Want. Without one the container is
	// started with the image's own command and left running.
	Command []string
	Want    string
	// Packed is what a pull transfers; Unpacked what lies on a disk then, if known.
	Packed, Unpacked int64
}

// recipe is one of the images: a Debian base and on it one layer for each list of
// packages. Images that begin with the same lists share those layers.
type recipe struct {
	repository string
	layers     [][]string
	// command is what a container of the image runs until it ends, having said want.
	command []string
	want    string
}

// basePackages make the base layer, besides Debian's essential ones.
var basePackages = []string{"ca-certificates"}

// recipes are what a streamed desktop consists of, and a small image beside it.
var recipes = []recipe{
	{
		repository: "demo/desktop",
		layers: [][]string{
			{
				"xfce4", "xfce4-terminal", "xfce4-taskmanager", "mousepad", "ristretto", "greybird-gtk-theme",
				"elementary-xfce-icon-theme", "dbus-x11", "xvfb", "x11vnc", "xterm", "x11-xserver-utils", "pulseaudio",
				"libgl1-mesa-dri", "mesa-vulkan-drivers", "mesa-utils", "gstreamer1.0-plugins-good", "gstreamer1.0-x",
				"fonts-dejavu", "fonts-noto-cjk", "fonts-noto-color-emoji", "python3", "locales",
			},
			{"chromium", "chromium-l10n"},
		},
		command: []string{
			"chromium", "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage",
			"--user-data-dir=/tmp/profile", "--dump-dom", "data:text/html,<title>the browser works</title>",
		},
		want: "the browser works",
	},
	{
		repository: "demo/shell",
		layers:     [][]string{{"vim-tiny", "less"}},
		command:    []string{"cat", "/etc/os-release"},
		want:       "bookworm",
	},
}

// install is run in the new layer. No service is started in it, and no index of
// packages stays.
const install = `printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d
chmod +x /usr/sbin/policy-rc.d
export DEBIAN_FRONTEND=noninteractive LC_ALL=C.UTF-8
apt-get update -qq
apt-get install -qq -y --no-install-recommends "$@"
apt-get clean
rm -rf /usr/sbin/policy-rc.d /var/lib/apt/lists/* /var/log/*.log /var/log/apt /var/cache/debconf/*-old /var/lib/dpkg/*-old
`

// cleanBase empties what debootstrap copied from this host.
func cleanBase(dir string) error {
	for f, contents := range map[string]string{"etc/hostname": "desktop\n", "etc/resolv.conf": ""} {
		if err := os.WriteFile(filepath.Join(dir, f), []byte(contents), 0o644); err != nil {
			return err
		}
	}
	lists, err := filepath.Glob(filepath.Join(dir, "var/lib/apt/lists/*"))
	for _, l := range lists {
		err = errors.Join(err, os.RemoveAll(l))
	}
	return err
}

// Blobs is the folder in which the layers lie packed, for a registry to serve them
// from: pushing copies none.
func Blobs() (string, error) { return host.Cache("demo/blobs") }

// Push makes the images, or takes them from the cache folder where an earlier run put
// them, and pushes them to the registry, whose directory is blobs.
func Push(ctx context.Context, registry, blobs string) ([]Image, error) {
	var images []Image
	for _, r := range recipes {
		var layers []blob
		for n := range len(r.layers) + 1 {
			b, err := desktopLayer(ctx, blobs, r.layers[:n])
			if err != nil {
				return nil, fmt.Errorf("making %s: %w", r.repository, err)
			}
			layers = append(layers, b)
		}
		w, err := push(ctx, registry, blobs, r, layers)
		if err != nil {
			return nil, fmt.Errorf("pushing %s: %w", r.repository, err)
		}
		images = append(images, w)
	}
	return images, nil
}

// layerDir is where the files of the last of lists are kept, for the layers above.
func layerDir(lists [][]string) (string, error) {
	cache, err := host.Cache("demo/layers")
	if err != nil {
		return "", err
	}
	data, err := json.Marshal([]any{host.Suite, install, basePackages, lists})
	if err != nil {
		return "", err
	}
	return filepath.Join(cache, fmt.Sprintf("%.8x", sha256.Sum256(data))), nil
}

// desktopLayer makes the last of the layers that lists describe, and describes it.
func desktopLayer(ctx context.Context, blobs string, lists [][]string) (blob, error) {
	dir, err := layerDir(lists)
	if err != nil {
		return blob{}, err
	}
	var b blob
	if data, err := os.ReadFile(dir + ".json"); err == nil {
		if err := json.Unmarshal(data, &b); err != nil {
			return b, fmt.Errorf("reading %s.json: %w; remove it", dir, err)
		}
		if _, err := os.Stat(b.path(blobs)); err == nil {
			return b, nil
		}
	}
	base, err := host.Root(ctx, basePackages, "demo 1", cleanBase)
	if err != nil {
		return b, err
	}
	files := base
	if len(lists) > 0 {
		if files, err = installLayer(ctx, base, dir, lists); err != nil {
			return b, err
		}
	}
	fmt.Printf("    packing a layer of %s\n", describe(lists))
	if b, err = writeBlob(files, blobs); err != nil {
		return b, err
	}
	data, err := json.Marshal(b)
	if err != nil {
		return b, err
	}
	return b, os.WriteFile(dir+".json", data, 0o644)
}

func describe(lists [][]string) string {
	if len(lists) == 0 {
		return "Debian " + host.Suite
	}
	return strings.Join(lists[len(lists)-1], " ")
}

// installLayer installs the packages of the last list on the layers below it, and
// returns the directory with what that changed.
func installLayer(ctx context.Context, base, dir string, lists [][]string) (string, error) {
	upper := filepath.Join(dir, "upper")
	if _, err := os.Stat(filepath.Join(dir, "complete")); err == nil {
		return upper, nil
	}
	lower := []string{base}
	for n := 1; n < len(lists); n++ {
		below, err := layerDir(lists[:n])
		if err != nil {
			return "", err
		}
		if _, err := installLayer(ctx, base, below, lists[:n]); err != nil {
			return "", err
		}
		lower = append([]string{filepath.Join(below, "upper")}, lower...)
	}
	if err := os.RemoveAll(dir); err != nil {
		return "", err
	}
	root := filepath.Join(dir, "root")
	for _, d := range []string{upper, filepath.Join(dir, "work"), root} {
		if err := os.MkdirAll(d, 0o755); err != nil {
			return "", err
		}
	}
	fmt.Printf("    installing %s (once)\n", describe(lists))
	// The mounts, and processes that packages start, end with the namespaces.
	script := `mount -t overlay overlay -o "redirect_dir=off,metacopy=off,index=off,lowerdir=$1,upperdir=$2/upper,workdir=$2/work" "$2/root"
cd "$2/root"
mount -t proc proc proc
mount -t sysfs -o ro sysfs sys
mount --rbind /dev dev
mount --bind /etc/resolv.conf etc/resolv.conf
install=$3
shift 3
exec chroot . sh -ec "$install" install "$@"`
	args := append([]string{"--mount", "--pid", "--fork", "--kill-child", "sh", "-ec", script, "layer",
		strings.Join(lower, ":"), dir, install}, lists[len(lists)-1]...)
	cmd := exec.CommandContext(ctx, "unshare", args...)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	log, err := cmd.CombinedOutput()
	if err != nil {
		return "", fmt.Errorf("installing packages: %w; the end of the output: %s", err, log[max(0, len(log)-1000):])
	}
	// A cache that was cut off must not pass for a complete one.
	unix.Sync()
	return upper, os.WriteFile(filepath.Join(dir, "complete"), nil, 0o644)
}

func push(ctx context.Context, registry, blobs string, r recipe, layers []blob) (Image, error) {
	image := mutate.ConfigMediaType(mutate.MediaType(empty.Image, types.OCIManifestSchema1), types.OCIConfigJSON)
	w := Image{Command: r.command, Want: r.want}
	for n, b := range layers {
		var err error
		image, err = mutate.Append(image, mutate.Addendum{
			Layer: layer{b, blobs}, MediaType: types.OCILayer,
			History: v1.History{CreatedBy: "install " + describe(r.layers[:n])},
		})
		if err != nil {
			return w, err
		}
		w.Packed += b.Packed
		w.Unpacked += b.Unpacked
	}
	config, err := image.ConfigFile()
	if err != nil {
		return w, err
	}
	config.OS, config.Architecture = "linux", "amd64"
	config.Config.Env = []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/root"}
	config.Config.Cmd = r.command
	if image, err = mutate.ConfigFile(image, config); err != nil {
		return w, err
	}
	ref, err := name.NewTag(registry + "/" + r.repository + ":latest")
	if err != nil {
		return w, err
	}
	w.Ref = ref.Name()
	return w, remote.Write(ref, image, remote.WithContext(ctx))
}
