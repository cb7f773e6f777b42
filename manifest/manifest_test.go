package manifest

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/specs-go"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
	"github.com/santhosh-tekuri/jsonschema/v6"
)

var update = flag.Bool("update", false, "write the golden file and the documented example")

var amd64 = ocispec.Platform{OS: "linux", Architecture: "amd64"}

func descriptor(t testing.TB, mediaType string, v any) ocispec.Descriptor {
	t.Helper()
	b, err := json.Marshal(v)
	if err != nil {
		t.Fatal(err)
	}
	return ocispec.Descriptor{MediaType: mediaType, Digest: digest.FromBytes(b), Size: int64(len(b)), Data: b}
}

// image is an image of the given layers; with indexed it stands in an index.
func image(t testing.TB, repo, tag string, indexed bool, diffs ...string) Image {
	t.Helper()
	var config ocispec.Image
	config.Platform = amd64
	config.RootFS.Type = "layers"
	m := ocispec.Manifest{Versioned: specs.Versioned{SchemaVersion: 2}, MediaType: ocispec.MediaTypeImageManifest}
	for _, d := range diffs {
		config.RootFS.DiffIDs = append(config.RootFS.DiffIDs, digest.FromString(d))
		m.Layers = append(m.Layers, ocispec.Descriptor{
			MediaType: ocispec.MediaTypeImageLayerGzip, Digest: digest.FromString("gzip of " + d), Size: 100,
		})
	}
	img := Image{Config: descriptor(t, ocispec.MediaTypeImageConfig, config)}
	m.Config = img.Config
	m.Config.Data = nil
	img.Manifest = descriptor(t, ocispec.MediaTypeImageManifest, m)
	if indexed {
		entry := img.Manifest
		entry.Data = nil
		entry.Platform = &amd64
		index := descriptor(t, ocispec.MediaTypeImageIndex, ocispec.Index{
			Versioned: specs.Versioned{SchemaVersion: 2},
			MediaType: ocispec.MediaTypeImageIndex,
			Manifests: []ocispec.Descriptor{entry},
		})
		img.Index = &index
	}
	img.Names = []string{repo + ":" + tag, repo + "@" + img.Target().Digest.String()}
	return img
}

// of is a manifest of the images, with the layers that they need.
func of(t testing.TB, images ...Image) *Manifest {
	t.Helper()
	m := &Manifest{
		SchemaVersion: SchemaVersion,
		Platform:      amd64,
		Created:       time.Date(2026, 11, 23, 10, 0, 0, 0, time.UTC),
		Tool:          "packer-plugin-selkies/0.1.0",
		Store:         Store{Driver: DriverOverlay2, Root: "docker", EngineVersion: "20.10.24"},
		Images:        images,
	}
	seen := map[digest.Digest]bool{}
	for _, img := range images {
		diffIDs, err := img.DiffIDs()
		if err != nil {
			t.Fatal(err)
		}
		var parent digest.Digest
		for _, d := range diffIDs {
			id := chainID(parent, d)
			if !seen[id] {
				seen[id] = true
				m.Layers = append(m.Layers, Layer{
					ChainID: id, DiffID: d, Parent: parent, Directory: id.Encoded(), Size: 1 << 20,
				})
			}
			parent = id
		}
	}
	return m
}

func example(t testing.TB) *Manifest {
	return of(t,
		image(t, "docker.io/library/debian", "12", true, "base"),
		image(t, "localhost:5000/apps/desktop", "1.4", false, "base", "desktop", "desktop", "browser"),
	)
}

func TestGolden(t *testing.T) {
	got, err := example(t).Encode()
	if err != nil {
		t.Fatal(err)
	}
	const golden = "testdata/manifest.json"
	if *update {
		if err := os.WriteFile(golden, got, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(golden)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(string(want), string(got)); diff != "" {
		t.Errorf("encoding differs from %s; if that is meant, run go test ./manifest -update (-want +got):\n%s", golden, diff)
	}
}

// TestDocumentedExample compares the example of docs/layer-manifest.md, in which digests and
// inlined documents are cut short, with what is written.
func TestDocumentedExample(t *testing.T) {
	got, err := of(t, image(t, "docker.io/library/debian", "12", true, "base", "tools")).Encode()
	if err != nil {
		t.Fatal(err)
	}
	got = regexp.MustCompile(`(sha256:[0-9a-f]{8}|"data": "\w{8})[\w+/=]+`).ReplaceAll(got, []byte("$1…"))
	const page = "../docs/layer-manifest.md"
	text, err := os.ReadFile(page)
	if err != nil {
		t.Fatal(err)
	}
	block := regexp.MustCompile("(?s)```json\n(.*?)```\n")
	if *update {
		text = block.ReplaceAllLiteral(text, fmt.Appendf(nil, "```json\n%s```\n", got))
		if err := os.WriteFile(page, text, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	var want string
	if m := block.FindSubmatch(text); m != nil {
		want = string(m[1])
	}
	if diff := cmp.Diff(want, string(got)); diff != "" {
		t.Errorf("%s has another example; go test ./manifest -update writes it (-page +written):\n%s", page, diff)
	}
}

func TestEncodingIsCanonical(t *testing.T) {
	// Two images on one base.
	branches := func() *Manifest {
		return of(t,
			image(t, "localhost:5000/apps/desktop", "1.4", false, "base", "desktop"),
			image(t, "localhost:5000/apps/game", "2", false, "base", "game"),
		)
	}
	a, b := branches(), branches()
	slices.Reverse(b.Images)
	for i := range b.Images {
		slices.Reverse(b.Images[i].Names)
	}
	b.Created = b.Created.In(time.FixedZone("CET", 3600)).Add(time.Millisecond)
	// Siblings in another order; parents have to stay first.
	if len(b.Layers) != 3 || b.Layers[1].Parent != b.Layers[2].Parent {
		t.Fatalf("layers 1 and 2 are no siblings: %+v", b.Layers)
	}
	b.Layers[1], b.Layers[2] = b.Layers[2], b.Layers[1]
	idA, errA := a.ID()
	idB, errB := b.ID()
	if errA != nil || errB != nil || idA != idB {
		t.Fatalf("cache IDs differ: %s (%v), %s (%v)", idA, errA, idB, errB)
	}
	b.Tool = "another"
	if idB, _ = b.ID(); idA == idB {
		t.Fatal("other content has the same cache ID")
	}
}

// write makes a cache disk at dir of m.
func write(t *testing.T, m *Manifest, dir string) {
	t.Helper()
	data, err := m.Encode()
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(filepath.Join(dir, Dir), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, Path), data, 0o644); err != nil {
		t.Fatal(err)
	}
}

func TestRead(t *testing.T) {
	dir := t.TempDir()
	if _, err := Read(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("Read of an empty directory: %v, want fs.ErrNotExist", err)
	}
	want := example(t)
	write(t, want, dir)
	got, err := Read(dir)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(want, got); diff != "" {
		t.Errorf("read differs from written (-want +got):\n%s", diff)
	}
}

func TestReadID(t *testing.T) {
	dir := t.TempDir()
	if _, err := ReadID(dir); !errors.Is(err, fs.ErrNotExist) {
		t.Fatalf("ReadID of an empty directory: %v, want fs.ErrNotExist", err)
	}
	m := example(t)
	want, err := m.ID()
	if err != nil {
		t.Fatal(err)
	}
	write(t, m, dir)
	got, err := ReadID(dir)
	_, read, errRead := ReadWithID(dir)
	if err != nil || errRead != nil || got != want || read != want {
		t.Errorf("ReadID: %s, %v; ReadWithID: %s, %v; want %s", got, err, read, errRead, want)
	}
}

func TestReadRefusesAFileOutsideTheDisk(t *testing.T) {
	outside, dir := t.TempDir(), t.TempDir()
	write(t, example(t), outside)
	if err := os.Symlink(filepath.Join(outside, Dir), filepath.Join(dir, Dir)); err != nil {
		t.Fatal(err)
	}
	if _, err := Read(dir); err == nil || !strings.Contains(err.Error(), "escapes") {
		t.Fatalf("Read followed a link out of the disk: %v", err)
	}
}

// TestReadRefuses reads what must not be opened, or not to its end.
func TestReadRefuses(t *testing.T) {
	for name, c := range map[string]struct {
		make func(file string) error
		want string
	}{
		"10 GB": {func(file string) error {
			return errors.Join(os.WriteFile(file, []byte(`{"schemaVersion":1`), 0o644), os.Truncate(file, 10<<30))
		}, "larger than 67108864 bytes"},
		"directory": {func(file string) error { return os.Mkdir(file, 0o755) }, "not a regular file"},
		"a link":    {func(file string) error { return os.Symlink("/dev/zero", file) }, "not a regular file"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			file := filepath.Join(dir, Path)
			if err := errors.Join(os.Mkdir(filepath.Dir(file), 0o755), c.make(file)); err != nil {
				t.Fatal(err)
			}
			_, err := Read(dir)
			if err == nil || !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), file) || !strings.Contains(err.Error(), "build the disk again") {
				t.Errorf("Read() = %v, want an error with %q", err, c.want)
			}
		})
	}
}

// TestDecodeExhausting decodes what is small as bytes and large in memory, or deep.
func TestDecodeExhausting(t *testing.T) {
	const million = 1_000_000
	many := func(element string) string {
		return "[" + strings.Repeat(element+",", million) + element + "]"
	}
	inlined := func(config string) []byte {
		m := example(t)
		img := &m.Images[1]
		b := []byte(config)
		img.Config.Data, img.Config.Size, img.Config.Digest = b, int64(len(b)), digest.FromBytes(b)
		var im ocispec.Manifest
		if err := json.Unmarshal(img.Manifest.Data, &im); err != nil {
			t.Fatal(err)
		}
		im.Config = img.Config
		im.Config.Data = nil
		img.Manifest = descriptor(t, ocispec.MediaTypeImageManifest, im)
		img.Names = img.Names[:1]
		b, err := json.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		return b
	}
	const values = "has more than 250000 values"
	for name, c := range map[string]struct {
		data []byte
		want string
	}{
		"a million layers":    {[]byte(`{"schemaVersion":1,"layers":` + many("{}") + "}"), values},
		"a million images":    {[]byte(`{"schemaVersion":1,"images":` + many("{}") + "}"), values},
		"a million names":     {[]byte(`{"schemaVersion":1,"images":[{"names":` + many(`""`) + "}]}"), values},
		"a million diff IDs":  {inlined(`{"rootfs":{"diff_ids":` + many(`""`) + "}}"), values},
		"a million histories": {inlined(`{"history":` + many(`{}`) + "}"), values},
		"deep":                {[]byte(strings.Repeat(`{"a":`, 100_000)), "exceeded max depth"},
		"deep config":         {inlined(strings.Repeat(`{"a":`, 100_000) + "1" + strings.Repeat("}", 100_000)), "exceeded max depth"},
		"501 layers":          {inlined(`{"os":"linux","architecture":"amd64","rootfs":{"diff_ids":[""` + strings.Repeat(`,""`, 500) + "]}}"), "config lists 501 layers, the kernel mounts 500"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := Decode(c.data)
			if err == nil || !strings.Contains(err.Error(), c.want) || !strings.HasSuffix(err.Error(), "build the disk again") {
				t.Errorf("Decode() = %v, want an error with %q", err, c.want)
			}
			if err != nil && len(err.Error()) > 1000 {
				t.Errorf("the error has %d bytes", len(err.Error()))
			}
		})
	}
}

func TestValidate(t *testing.T) {
	other := digest.FromString("other")
	for name, c := range map[string]struct {
		spoil func(*Manifest)
		want  string
	}{
		"newer schema":         {func(m *Manifest) { m.SchemaVersion = 2 }, "schemaVersion is 2"},
		"no platform":          {func(m *Manifest) { m.Platform.OS = "" }, "platform"},
		"other platform":       {func(m *Manifest) { m.Platform.Architecture = "arm64" }, `config is for platform "linux/amd64"`},
		"platform escapes":     {func(m *Manifest) { m.Platform.Variant = "\x1b[31m" }, `platform has "\x1b[31m"`},
		"no time":              {func(m *Manifest) { m.Created = time.Time{} }, "created"},
		"other driver":         {func(m *Manifest) { m.Store.Driver = "btrfs" }, `store.driver is "btrfs"`},
		"absolute root":        {func(m *Manifest) { m.Store.Root = "/var/lib/docker" }, "store.root"},
		"root outside":         {func(m *Manifest) { m.Store.Root = "../docker" }, "store.root"},
		"root not clean":       {func(m *Manifest) { m.Store.Root = "a/../../b" }, "store.root"},
		"empty root":           {func(m *Manifest) { m.Store.Root = "" }, "store.root"},
		"directory outside":    {func(m *Manifest) { m.Layers[1].Directory = ".." }, "layers[1]: directory"},
		"directory in another": {func(m *Manifest) { m.Layers[1].Directory = "a/b" }, "one path element"},
		"directory newline":    {func(m *Manifest) { m.Layers[1].Directory = "a\nb" }, "control characters"},
		"directory escapes":    {func(m *Manifest) { m.Layers[1].Directory = "a\u009b31m" }, "control characters"},
		"directory itself":     {func(m *Manifest) { m.Layers[1].Directory = "." }, "one path element"},
		"directory twice":      {func(m *Manifest) { m.Layers[1].Directory = m.Layers[0].Directory }, "that of"},
		"negative size":        {func(m *Manifest) { m.Layers[1].Size = -1 }, "size is -1"},
		"chain ID":             {func(m *Manifest) { m.Layers[1].ChainID = other }, "does not follow"},
		"diff ID":              {func(m *Manifest) { m.Layers[0].DiffID = "sha256:abc" }, "diffID"},
		"parent escapes":       {func(m *Manifest) { m.Layers[1].Parent = "\x1b]0;\n" }, `parent "\x1b]0;\n"`},
		"parent missing":       {func(m *Manifest) { m.Layers[1].Parent = other }, "parent " + other.String()},
		"parent after child":   {func(m *Manifest) { m.Layers[0], m.Layers[1] = m.Layers[1], m.Layers[0] }, "parent"},
		"layer missing":        {func(m *Manifest) { m.Layers = m.Layers[:len(m.Layers)-1] }, "not among layers"},
		"layer twice":          {func(m *Manifest) { m.Layers = append(m.Layers, m.Layers[0]) }, "there twice"},
		"layer of no image":    {func(m *Manifest) { m.Images = m.Images[:1] }, "belongs to no image"},
		"no name":              {func(m *Manifest) { m.Images[0].Names = nil }, "images[0]: names is empty"},
		"name not normalised":  {func(m *Manifest) { m.Images[0].Names[0] = "debian:12" }, "not a normalised"},
		"name without tag":     {func(m *Manifest) { m.Images[0].Names[0] = "docker.io/library/debian" }, "not a normalised"},
		"name twice":           {func(m *Manifest) { m.Images[1].Names[0] = m.Images[0].Names[0] }, "is a name of images[0] too"},
		"name of other digest": {func(m *Manifest) { m.Images[0].Names[1] = "docker.io/library/debian@" + other.String() }, "not the digest"},
		"tag and digest": {func(m *Manifest) {
			m.Images[0].Names[0] += "@" + m.Images[0].Target().Digest.String()
		}, "two names"},
		"index bytes":        {func(m *Manifest) { m.Images[0].Index.Data[3] ^= 1 }, "index: digest is"},
		"manifest bytes":     {func(m *Manifest) { m.Images[1].Manifest.Data[3] ^= 1 }, "manifest: digest is"},
		"config bytes":       {func(m *Manifest) { m.Images[1].Config.Data[3] ^= 1 }, "config: digest is"},
		"config size":        {func(m *Manifest) { m.Images[1].Config.Size++ }, "size is"},
		"manifest as index":  {func(m *Manifest) { m.Images[1].Manifest.MediaType = ocispec.MediaTypeImageIndex }, "not that of an image manifest"},
		"index as manifest":  {func(m *Manifest) { m.Images[0].Index.MediaType = ocispec.MediaTypeImageManifest }, "not that of an index"},
		"config as artifact": {func(m *Manifest) { m.Images[0].Config.MediaType = "application/x\x1b" }, `media type is "application/x\x1b"`},
		"config of another": {func(m *Manifest) {
			m.Images[1].Config = m.Images[0].Config
		}, "names config"},
		"long index": {func(m *Manifest) {
			index := descriptor(t, ocispec.MediaTypeImageIndex, ocispec.Index{Manifests: make([]ocispec.Descriptor, maxManifests+1)})
			m.Images[0].Index = &index
			m.Images[0].Names = []string{"localhost:5000/x:1"}
		}, "index: it lists 1001 manifests"},
		"index of another": {func(m *Manifest) { m.Images[1].Index = m.Images[0].Index; m.Images[1].Names = m.Images[1].Names[:1] }, "does not list"},
	} {
		t.Run(name, func(t *testing.T) {
			m := example(t)
			c.spoil(m)
			err := m.Validate()
			if err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("Validate() = %v, want an error with %q", err, c.want)
			}
			if err != nil && strings.Contains(err.Error(), "\n") {
				t.Errorf("error has several lines: %q", err)
			}
		})
	}
}

func TestDecode(t *testing.T) {
	good, err := example(t).Encode()
	if err != nil {
		t.Fatal(err)
	}
	extra := append([]byte(`{"comment": {"by": "a later version"},`), good[1:]...)
	if _, err := Decode(extra); err != nil {
		t.Errorf("unknown field is fatal: %v", err)
	}
	for name, c := range map[string]struct {
		data []byte
		want string
	}{
		"empty":     {nil, "truncated"},
		"truncated": {good[:len(good)/2], "truncated"},
		"newer":     {[]byte(`{"schemaVersion": 2, "images": "another shape"}`), "schemaVersion is 2, this version reads 1"},
		"none":      {[]byte(`{}`), "schemaVersion is 0"},
		"trailing":  {append(slices.Clone(good), "{}"...), "not a layer manifest"},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := Decode(c.data); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("Decode() = %v, want an error with %q", err, c.want)
			}
		})
	}
}

func TestSchemaAcceptsWhatIsWritten(t *testing.T) {
	schema, err := jsonschema.NewCompiler().Compile("../docs/layer-manifest.schema.json")
	if err != nil {
		t.Fatal(err)
	}
	check := func(m *Manifest) error {
		b, err := json.Marshal(m)
		if err != nil {
			t.Fatal(err)
		}
		v, err := jsonschema.UnmarshalJSON(strings.NewReader(string(b)))
		if err != nil {
			t.Fatal(err)
		}
		return schema.Validate(v)
	}
	if err := check(example(t)); err != nil {
		t.Errorf("the schema refuses what Encode writes: %v", err)
	}
	for name, spoil := range map[string]func(*Manifest){
		"schema version":   func(m *Manifest) { m.SchemaVersion = 2 },
		"driver":           func(m *Manifest) { m.Store.Driver = "btrfs" },
		"absolute root":    func(m *Manifest) { m.Store.Root = "/docker" },
		"layer directory":  func(m *Manifest) { m.Layers[0].Directory = "a/b" },
		"digest":           func(m *Manifest) { m.Layers[0].ChainID = "sha256:abc" },
		"no name":          func(m *Manifest) { m.Images[0].Names = []string{} },
		"no inlined bytes": func(m *Manifest) { m.Images[0].Manifest.Data = nil },
	} {
		m := example(t)
		spoil(m)
		if check(m) == nil {
			t.Errorf("the schema accepts a broken %s", name)
		}
	}
}

func FuzzDecode(f *testing.F) {
	good, err := example(f).Encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add([]byte(`{"schemaVersion":1}`))
	f.Add([]byte(strings.ReplaceAll(string(good), `"docker"`, `"../../etc"`)))
	f.Add([]byte(strings.ReplaceAll(string(good), `"linux"`, `"lin\u0000ux"`)))
	f.Fuzz(func(t *testing.T, data []byte) {
		m, err := Decode(data)
		if err != nil {
			return
		}
		for _, l := range m.Layers {
			if p := m.LayerPath(l); !filepath.IsLocal(p) || strings.ContainsAny(p, "\n\x00") {
				t.Fatalf("accepted layer path %q", p)
			}
		}
		first, err := m.Encode()
		if err != nil {
			t.Fatalf("accepted what it cannot write: %v", err)
		}
		again, err := Decode(first)
		if err != nil {
			t.Fatalf("wrote what it does not accept: %v", err)
		}
		if second, err := again.Encode(); err != nil || string(first) != string(second) {
			t.Fatalf("encoding is not canonical (%v):\n%s\n%s", err, first, second)
		}
	})
}
