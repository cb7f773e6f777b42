package trace

import (
	"bytes"
	"math"
	"strings"
	"testing"

	"github.com/google/go-cmp/cmp"
	"github.com/opencontainers/go-digest"
)

func example() *Trace {
	return &Trace{
		SchemaVersion: SchemaVersion,
		Image:         digest.FromString("config"),
		Command:       []string{"desktop", "--title=<a & b>"},
		Seconds:       30,
		Files:         []File{{0, "bin/sh"}, {2, "usr/lib/libx.so.1"}},
		Ranges:        []Range{{0, 0, 4096}, {1, 8192, 131072}, {0, 16384, 4096}},
	}
}

func TestEncode(t *testing.T) {
	got, err := example().Encode()
	if err != nil {
		t.Fatal(err)
	}
	want := `{"schemaVersion":1,"image":"` + digest.FromString("config").String() + `",` +
		`"command":["desktop","--title=<a & b>"],"seconds":30,` +
		`"files":[{"layer":0,"path":"bin/sh"},{"layer":2,"path":"usr/lib/libx.so.1"}],` +
		`"ranges":[[0,0,4096],[1,8192,131072],[0,16384,4096]]}` + "\n"
	if string(got) != want {
		t.Errorf("Encode() = %s\nwant %s", got, want)
	}
	back, err := Decode(got)
	if err != nil {
		t.Fatal(err)
	}
	if diff := cmp.Diff(example(), back); diff != "" {
		t.Error(diff)
	}
	if n := back.Bytes(); n != 139264 {
		t.Errorf("it has %d bytes", n)
	}
}

func TestValidate(t *testing.T) {
	for name, c := range map[string]struct {
		spoil func(*Trace)
		want  string
	}{
		"schema":     {func(t *Trace) { t.SchemaVersion = 2 }, "schemaVersion is 2"},
		"image":      {func(t *Trace) { t.Image = "sha256:../../x" }, `image is "sha256:../../x"`},
		"seconds":    {func(t *Trace) { t.Seconds = -1 }, "seconds is -1"},
		"layer":      {func(t *Trace) { t.Files[0].Layer = -1 }, "files[0]: layer is -1"},
		"outside":    {func(t *Trace) { t.Files[1].Path = "../../etc/shadow" }, `files[1]: path "../../etc/shadow"`},
		"absolute":   {func(t *Trace) { t.Files[1].Path = "/etc/shadow" }, "is absolute"},
		"newline":    {func(t *Trace) { t.Files[1].Path = "a\nb" }, "control characters"},
		"twice":      {func(t *Trace) { t.Files[1] = t.Files[0] }, "there twice"},
		"no file":    {func(t *Trace) { t.Ranges[0].File = 2 }, "ranges[0]: there is no file 2"},
		"before":     {func(t *Trace) { t.Ranges[0].Offset = -1 }, "ranges[0]: 4096 bytes at -1"},
		"empty":      {func(t *Trace) { t.Ranges[0].Length = 0 }, "ranges[0]: 0 bytes"},
		"overflow":   {func(t *Trace) { t.Ranges[0].Offset = math.MaxInt64 }, "ranges[0]: 4096 bytes"},
		"too long":   {func(t *Trace) { t.Ranges[0].Length = math.MaxInt64 }, "longer than any disk"},
		"many files": {func(t *Trace) { t.Files = make([]File, maxFiles+1) }, "20001 files"},
	} {
		t.Run(name, func(t *testing.T) {
			tr := example()
			c.spoil(tr)
			err := tr.Validate()
			if err == nil || !strings.Contains(err.Error(), c.want) || strings.Contains(err.Error(), "\n") {
				t.Errorf("error is %v, want %q in one line", err, c.want)
			}
			if _, err := tr.Encode(); err == nil {
				t.Error("it can be encoded")
			}
		})
	}
}

func TestDecode(t *testing.T) {
	good, err := example().Encode()
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct{ data, want string }{
		"empty":     {"", "truncated"},
		"truncated": {string(good[:len(good)/2]), "truncated"},
		"newer":     {`{"schemaVersion":2,"files":"another shape"}`, "schemaVersion is 2, this version reads 1"},
		"shape":     {`{"schemaVersion":1,"ranges":[{}]}`, "access trace: "},
		"far file":  {`{"schemaVersion":1,"ranges":[[9000000000000000000,0,1]]}`, "range of file"},
		"too large": {strings.Repeat(" ", MaxSize) + "{}", "more than"},
	} {
		t.Run(name, func(t *testing.T) {
			if _, err := Decode([]byte(c.data)); err == nil || !strings.Contains(err.Error(), c.want) {
				t.Errorf("error is %v, want %q", err, c.want)
			}
		})
	}
}

// FuzzDecode reads what a disk may have in a trace's place.
func FuzzDecode(f *testing.F) {
	good, err := example().Encode()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(good)
	f.Add([]byte(`{"schemaVersion":1}`))
	f.Add(bytes.ReplaceAll(good, []byte("bin/sh"), []byte("../../etc")))
	f.Add(bytes.ReplaceAll(good, []byte("4096"), []byte("-1")))
	f.Add(bytes.ReplaceAll(good, []byte("[0,0,4096]"), []byte("[]")))
	f.Fuzz(func(t *testing.T, data []byte) {
		tr, err := Decode(data)
		if err != nil {
			if strings.Contains(err.Error(), "\n") {
				t.Fatalf("error has several lines: %q", err)
			}
			return
		}
		again, err := tr.Encode()
		if err != nil {
			t.Fatal(err)
		}
		back, err := Decode(again)
		if err != nil {
			t.Fatal(err)
		}
		third, err := back.Encode()
		if err != nil || !bytes.Equal(again, third) {
			t.Fatalf("encoded again: %s, %v, first %s", third, err, again)
		}
	})
}
