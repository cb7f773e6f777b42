package imagecache

import (
	"bufio"
	"cmp"
	"fmt"
	"os"
	"strings"

	dref "github.com/distribution/reference"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/opencontainers/go-digest"
)

// reference is one image reference of the configuration.
type reference struct {
	// from says where the reference stands, for errors: `images[3]` or
	// `images.txt:12`.
	from  string
	named dref.Named
	// repository is named's for the library that talks to registries.
	repository name.Repository
}

func (r reference) String() string { return dref.FamiliarString(r.named) }

// tag is the tag form, "docker.io/library/debian:12", or "" for a reference by
// digest only.
func (r reference) tag() string {
	if t, ok := r.named.(dref.Tagged); ok {
		return r.named.Name() + ":" + t.Tag()
	}
	return ""
}

// digested is the form that names d in the reference's repository.
func (r reference) digested(d digest.Digest) string {
	return r.named.Name() + "@" + d.String()
}

// pinned is the digest in the reference, or "".
func (r reference) pinned() digest.Digest {
	if d, ok := r.named.(dref.Digested); ok {
		return d.Digest()
	}
	return ""
}

// key is the same for references that would give one tag, or one image without a tag,
// to two.
func (r reference) key() string { return cmp.Or(r.tag(), r.named.String()) }

func (r reference) registry() string { return dref.Domain(r.named) }

func parseList(images []string) (refs []reference, errs []error) {
	for i, s := range images {
		ref, err := parseReference(fmt.Sprintf("images[%d]", i), s)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		refs = append(refs, ref)
	}
	return refs, errs
}

func parseListFile(file string) (refs []reference, errs []error) {
	f, err := os.Open(file)
	if err != nil {
		return nil, []error{fmt.Errorf("image_list_file: %w", err)}
	}
	defer f.Close()
	lines := bufio.NewScanner(f)
	for n := 1; lines.Scan(); n++ {
		line := strings.TrimSpace(stripComment(lines.Text()))
		if line == "" {
			continue
		}
		ref, err := parseReference(fmt.Sprintf("image_list_file %s:%d", file, n), line)
		if err != nil {
			errs = append(errs, err)
			continue
		}
		refs = append(refs, ref)
	}
	if err := lines.Err(); err != nil {
		errs = append(errs, fmt.Errorf("image_list_file %s: %w", file, err))
	}
	return refs, errs
}

// stripComment cuts a comment off. A "#" within a word is left for the parser of
// references to reject.
func stripComment(line string) string {
	for i, r := range line {
		if r == '#' && (i == 0 || line[i-1] == ' ' || line[i-1] == '\t') {
			return line[:i]
		}
	}
	return line
}

func parseReference(from, s string) (reference, error) {
	named, err := dref.ParseDockerRef(s)
	if err != nil {
		return reference{}, fmt.Errorf("%s: %q: %w", from, s, err)
	}
	// ParseDockerRef drops the tag of name:tag@digest, which pods go on to name.
	if full, err := dref.ParseNormalizedNamed(s); err == nil {
		named = dref.TagNameOnly(full)
	}
	// That library is the stricter one.
	repository, err := name.NewRepository(named.Name())
	if err != nil {
		return reference{}, fmt.Errorf("%s: %q: %w", from, s, err)
	}
	return reference{from: from, named: named, repository: repository}, nil
}

// duplicates finds references that are there twice, and tags that are to name two
// images.
func duplicates(refs []reference) (errs []error) {
	first := map[string]string{}
	for _, r := range refs {
		if from, ok := first[r.key()]; ok {
			errs = append(errs, fmt.Errorf("%s: %q is a duplicate of %s; remove one", r.from, r, from))
			continue
		}
		first[r.key()] = r.from
	}
	return errs
}

// registryHost brings the names of Docker Hub to the one that references use.
func registryHost(server string) string {
	server = strings.TrimSuffix(strings.TrimPrefix(strings.TrimPrefix(server, "https://"), "http://"), "/")
	switch server {
	case "index.docker.io", "registry-1.docker.io", "index.docker.io/v1", "hub.docker.com":
		return "docker.io"
	}
	return server
}
