package imagecache

import (
	"bytes"
	"strings"
	"testing"
	"time"

	"github.com/containerd/platforms"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/types"
	"github.com/opencontainers/go-digest"
)

// FuzzChoose picks a platform's manifest of an index.
func FuzzChoose(f *testing.F) {
	id := digest.FromString("manifest").String()
	f.Add([]byte(`{"manifests":[{"digest":"`+id+`","platform":{"os":"linux","architecture":"amd64"}}]}`), "linux/amd64")
	f.Add([]byte(`{"manifests":[{"platform":{"os":"linux","architecture":"arm","variant":"v9\n"}},{"digest":"x","platform":{}},{}]}`), "linux/arm/v7")
	f.Add([]byte(`{"manifests":[{"digest":"../..","platform":{"os":"linux","architecture":"amd64"}}]}`), "linux/amd64")
	f.Add([]byte(`{"manifests":null}`), "linux/arm64/v8")
	f.Fuzz(func(t *testing.T, index []byte, platform string) {
		p, err := platforms.Parse(platform)
		if err != nil {
			return
		}
		if got, err := choose(index, p); err == nil && got.Validate() != nil {
			t.Fatalf("chose %q", got)
		}
	})
}

// hostileImage is an image whose registry gives these bytes, which its client has looked at.
type hostileImage struct {
	v1.Image
	manifest, config []byte
}

func (i hostileImage) RawConfigFile() ([]byte, error) {
	_, err := v1.ParseManifest(bytes.NewReader(i.manifest))
	return i.config, err
}

// FuzzComplete reads an image's manifest and config, and uses what they say.
func FuzzComplete(f *testing.F) {
	layer, config := digest.FromString("layer").String(), `"config":{"mediaType":"application/vnd.oci.image.config.v1+json"}`
	one := `{"os":"linux","architecture":"amd64","rootfs":{"type":"layers","diff_ids":["` + layer + `"]}}`
	f.Add([]byte(`{`+config+`,"layers":[{"digest":"`+layer+`","size":7}]}`), []byte(one))
	f.Add([]byte(`{`+config+`,"layers":[{}]}`), []byte(one))
	f.Add([]byte(`{`+config+`,"layers":[{"digest":"`+layer+`","size":-7}]}`), []byte(one))
	f.Add([]byte(`{`+config+`,"layers":[{"digest":"`+layer+`"}]}`), []byte(strings.Replace(one, layer, "x", 1)))
	f.Add([]byte(`{`+config+`}`), []byte(`{"os":"linux","architecture":"amd64"}`))
	ref, err := parseReference("images[0]", "example.com/a:1")
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, image, config []byte) {
		w := &wanted{refs: []reference{ref}, remote: hostileImage{manifest: image, config: config}}
		desc := &remote.Descriptor{Manifest: image}
		desc.MediaType = types.OCIManifestSchema1
		if w.complete(desc, platforms.MustParse("linux/amd64")) != nil {
			return
		}
		if len(w.chain) != len(w.blobs) || len(w.names()) == 0 {
			t.Fatalf("took %d layers of %d blobs", len(w.chain), len(w.blobs))
		}
		p := pullProgress([]*wanted{w}, nil, time.Time{})
		p.event(w, event{ID: "x", Status: "Downloading"})
		if _, total, kept := p.counts(); total < 0 || kept < 0 {
			t.Fatalf("to pull are %d bytes, kept %d", total, kept)
		}
	})
}

// FuzzMounts reads a build VM's table of mounts and looks for a store in it.
func FuzzMounts(f *testing.F) {
	f.Add("22 1 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n91 22 8:16 /a\\040b /mnt/x\\134040y rw - ext4 /dev/disk\\011one rw\n", "/var/lib/docker")
	f.Add("22 1 8:1 /x /var rw - ext4 /dev/sda1 rw\n23 1 8:1 / /../var rw - ext4 x rw", "/var/../..")
	f.Add("22 1 99999999999999999999:1 / / rw - ext4 /dev/sda1 rw\n", "")
	f.Add("22 1 8:1 \\777 \\000 rw - - -\n\n", "relative")
	f.Fuzz(func(t *testing.T, table, dataRoot string) {
		mounts, err := parseMounts(table)
		if err != nil {
			if strings.Contains(err.Error(), "\n") {
				t.Fatalf("an error of several lines: %q", err)
			}
			return
		}
		if len(mounts) != strings.Count(strings.TrimSuffix(table, "\n")+"\n", "\n") && table != "" {
			t.Fatalf("%d mounts of %q", len(mounts), table)
		}
		_, _, _ = storeDisk(mounts, dataRoot)
	})
}
