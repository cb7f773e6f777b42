package docker

import (
	"encoding/json"
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
)

// FuzzRepositories merges names into what dockerd has: what is there stays, and what is
// written is read again.
func FuzzRepositories(f *testing.F) {
	id := digest.FromString("image").String()
	f.Add([]byte(`{"Repositories":{"debian":{"debian:12":"`+id+`","debian@`+id+`":"`+id+`"}}}`), "docker.io/library/debian:12")
	f.Add([]byte(`{"Repositories":{"debian":null}}`), "docker.io/library/debian:12")
	f.Add([]byte(`{"Repositories":null}`), "gcr.io/p/x:1")
	f.Add([]byte(`{"repositories":{"a":{"a:1":"x"}},"Repositories":{"a":{"a:2":"y"}}}`), "docker.io/library/a:1")
	f.Add([]byte(`null`), "a")
	f.Add([]byte(``), "a")
	s := newStore(f)
	f.Fuzz(func(t *testing.T, file []byte, ref string) {
		if err := os.WriteFile(s.image("repositories.json"), file, 0o600); err != nil {
			t.Fatal(err)
		}
		before, err := s.readRepositories()
		if err != nil {
			return
		}
		n, err := familiar(ref)
		if err != nil {
			return
		}
		was := before.get(n)
		ours := digest.FromString("ours")
		if set := before.set(n, newName{id: ours}); set != (was == "") {
			t.Fatalf("%q was %q and was set: %t", n.ref, was, set)
		}
		if err := s.writeRepositories(before); err != nil {
			t.Fatal(err)
		}
		after, err := s.readRepositories()
		if err != nil {
			t.Fatalf("wrote what it cannot read: %v", err)
		}
		if got := after.get(n); got != was && (was != "" || got != ours) {
			t.Fatalf("%q was %q and is %q", n.ref, was, got)
		}
	})
}

// FuzzFamiliar turns names into dockerd's.
func FuzzFamiliar(f *testing.F) {
	for _, seed := range []string{"docker.io/library/debian:12", "debian", "localhost:5000/a/b@sha256:" + strings.Repeat("0", 64),
		"gcr.io/p/x:1@sha256:" + strings.Repeat("a", 64), "a:\x1b[31m", "[::1]:5000/x:1", "index.docker.io/library/a"} {
		f.Add(seed)
	}
	f.Fuzz(func(t *testing.T, ref string) {
		n, err := familiar(ref)
		if err != nil {
			return
		}
		if !strings.HasPrefix(n.ref, n.repository) {
			t.Fatalf("%q is %q in %q", ref, n.ref, n.repository)
		}
		named, err := reference.ParseNormalizedNamed(n.ref)
		if err != nil {
			t.Fatalf("%q became %q: %v", ref, n.ref, err)
		}
		if again, err := familiar(named.String()); err != nil || again != n {
			t.Fatalf("%q became %q, and that %q (%v)", ref, n.ref, again.ref, err)
		}
		n.tagged()
	})
}

// FuzzStore reads the files of a layer, its parents and a record of ours.
func FuzzStore(f *testing.F) {
	chain, parent := digest.FromString("chain"), digest.FromString("parent")
	f.Add(ownID(chain), parent.String(), ownLink(chain), "l/"+ownLink(parent), "/var/lib/selkies-image-cache/"+parent.Encoded()+"/x")
	f.Add("../../../etc", "../..", "../../..", "l/../../..:/etc", "/var/lib/selkies-image-cache/../../etc")
	f.Add("a\nb", chain.String(), "A,upperdir=/", "l/A:l/B", "/etc")
	s := newStore(f)
	f.Fuzz(func(t *testing.T, cacheID, up, link, lower, target string) {
		write(t, filepath.Join(s.layerdb(chain), "cache-id"), cacheID)
		write(t, filepath.Join(s.layerdb(chain), "parent"), up)
		state, id, err := s.layer(chain)
		if err == nil && state != layerDamaged && state != layerMissing && (id == "" || id != filepath.Base(id) || id == "..") {
			t.Fatalf("cache-id %q is taken for a directory", id)
		}
		ids, err := s.chain(chain)
		for _, id := range ids {
			if err == nil && id.Validate() != nil {
				t.Fatalf("parent %q is taken for a chain ID", id)
			}
		}
		write(t, s.overlay("id", "link"), link)
		write(t, s.overlay("id", "lower"), lower)
		if link, lower, err := s.links("id"); err == nil && (strings.ContainsAny(link, "/,:\n\\") || strings.ContainsAny(lower, ",\n\\.")) {
			t.Fatalf("link %q and lower %q are taken for ones", link, lower)
		}
		diff := s.overlay("id", "diff")
		os.Remove(diff)
		if os.Symlink(target, diff) == nil {
			if id := s.generation("id"); id != "" && id.Validate() != nil {
				t.Fatalf("%q is taken for a link to generation %q", target, id)
			}
		}
	})
}

// FuzzRecord reads a record of ours and writes it again.
func FuzzRecord(f *testing.F) {
	id := digest.FromString("cache").String()
	f.Add([]byte(`{"cacheID":"` + id + `","created":"2026-01-01T00:00:00Z","overlay":"docker/overlay2","images":[{"id":"` + id + `","names":["a:1"],"layers":1,"added":["a:1"]}],"layers":{"` + id + `":{"diffID":"` + id + `","directory":"x"}},"metadata":{"sources":{"` + id + `":[{"Digest":"` + id + `","SourceRepository":"docker.io/library/a","HMAC":""}]},"diffIDs":{"` + id + `":"` + id + `"}}}`))
	f.Add([]byte(`{"images":null,"metadata":{"sources":{"":null}}}`))
	s := newStore(f)
	f.Fuzz(func(t *testing.T, data []byte) {
		r := &record{}
		if json.Unmarshal(data, r) != nil {
			return
		}
		r.CacheID = digest.Digest(id)
		if err := s.replace(r); err != nil {
			return // such as a time that JSON cannot have
		}
		rs, err := s.records()
		if err != nil || len(rs) != 1 {
			t.Fatalf("wrote what it cannot read: %v", err)
		}
		if !reflect.DeepEqual(rs[0].normal(), rs[0].normal().normal()) {
			t.Fatalf("%+v is not in order", rs[0].normal())
		}
	})
}

// FuzzDataRoot finds a dockerd's data root in its command line and configuration.
func FuzzDataRoot(f *testing.F) {
	f.Add("dockerd\x00--data-root\x00/x\x00", []byte(`{}`))
	f.Add("dockerd\x00-g/x\x00--config-file=/etc/docker/daemon.json\x00", []byte(`{"data-root":"/y","graph":"/z"}`))
	f.Add("dockerd\x00--data-root", []byte(``))
	proc := f.TempDir()
	f.Fuzz(func(t *testing.T, cmdline string, config []byte) {
		write(t, filepath.Join(proc, "cmdline"), cmdline)
		write(t, filepath.Join(proc, "root", configFile), string(config))
		if root, err := dataRoot(proc); err == nil && root == "" {
			t.Fatal("no data root")
		}
	})
}

// FuzzDistribution adds distribution metadata to what dockerd has, and takes it back.
func FuzzDistribution(f *testing.F) {
	blob, diffID := digest.FromString("blob"), digest.FromString("layer")
	f.Add([]byte(`[{"Digest":"`+blob.String()+`","SourceRepository":"docker.io/library/a","HMAC":""}]`), []byte(diffID))
	f.Add([]byte(`[{"Digest":"x","SourceRepository":"\n","HMAC":"y"},{}]`), []byte("x"))
	f.Add([]byte(`[]`), []byte(digest.FromString("the node's")))
	f.Add([]byte(`[null,`), []byte{})
	f.Add([]byte(`{}`), []byte("sha256:"))
	s := newStore(f)
	ours := newMetadata()
	ours.DiffIDs[blob] = diffID
	ours.addSource(diffID, blobSource{Digest: blob, SourceRepository: "docker.io/library/b"})
	f.Fuzz(func(t *testing.T, sources, of []byte) {
		write(t, s.sourcesFile(diffID), string(sources))
		write(t, s.diffIDFile(blob), string(of))
		before, knew := s.readSources(diffID), s.diffIDOf(blob)
		if err := s.addMetadata(s.missing(ours)); err != nil {
			t.Fatal(err)
		}
		if left := s.missing(ours); len(left.DiffIDs) > 0 || len(left.Sources) > 0 && len(before) < maxSources {
			t.Fatalf("%+v is still missing", left)
		}
		if err := s.removeMetadata(ours); err != nil {
			t.Fatal(err)
		}
		if knew != diffID && s.diffIDOf(blob) != knew {
			t.Fatalf("the node knew %s as %q", blob, knew)
		}
		for _, src := range s.readSources(diffID) {
			if !slices.Contains(before, src) {
				t.Fatalf("%+v has come and stays", src)
			}
		}
	})
}

// FuzzImageChain reads an image's config for its layers.
func FuzzImageChain(f *testing.F) {
	diffID := digest.FromString("layer").String()
	f.Add([]byte(`{"rootfs":{"diff_ids":["` + diffID + `","` + diffID + `"]}}`))
	f.Add([]byte(`{"rootfs":{"diff_ids":["x"]}}`))
	f.Add([]byte(`{"rootfs":{"diff_ids":[""]}}`))
	f.Add([]byte(`{"rootfs":null}`))
	s, id := newStore(f), digest.FromString("image")
	f.Fuzz(func(t *testing.T, config []byte) {
		write(t, s.imageContent(id), string(config))
		if top, err := s.imageChain(id); err == nil && top != "" {
			if _, err := s.chain(top); err != nil {
				t.Fatal(err)
			}
		}
	})
}

// FuzzStopped reads notes of stopped units: none but Docker's is started by one.
func FuzzStopped(f *testing.F) {
	f.Add([]byte(`["docker.socket","docker.service"]`))
	f.Add([]byte(`["docker.service","reboot.target"]`))
	f.Add([]byte(`["docker.ser`))
	f.Add([]byte(`null`))
	f.Add([]byte(`[]`))
	f.Add([]byte(`{"docker.service":true}`))
	f.Add([]byte(``))
	s := newStore(f)
	if err := os.MkdirAll(s.runDir(), 0o700); err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, note []byte) {
		if err := os.WriteFile(s.stoppedFile(), note, 0o600); err != nil {
			t.Fatal(err)
		}
		stopped, err := s.stoppedUnits()
		if err != nil {
			if stopped != nil || !strings.Contains(err.Error(), s.stoppedFile()) {
				t.Fatalf("%q and %v", stopped, err)
			}
			return
		}
		for _, u := range stopped {
			if !slices.Contains(units, u) {
				t.Fatalf("would start %q", u)
			}
		}
		again, err := json.Marshal(stopped)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(s.stoppedFile(), again, 0o600); err != nil {
			t.Fatal(err)
		}
		if got, err := s.stoppedUnits(); err != nil || !slices.Equal(got, stopped) {
			t.Fatalf("%q is read as %q, %v", stopped, got, err)
		}
	})
}
