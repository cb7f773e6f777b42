package imagecache

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"net/http"
	"regexp"
	"slices"
	"strings"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	"github.com/google/go-containerregistry/pkg/v1/google"
	"github.com/google/go-containerregistry/pkg/v1/remote"
	"github.com/google/go-containerregistry/pkg/v1/remote/transport"
	"golang.org/x/sync/errgroup"
)

const (
	defaultCatalogLimit = 100
	defaultTag          = "latest"
)

// attachedRE are the tags that cosign and the OCI distribution specification's referrers
// schema give to signatures and the like, which are newer than the image they belong to.
var attachedRE = regexp.MustCompile(`^sha256-[0-9a-f]{64}(\.|$)`)

// catalog is one catalog block, ready for use.
type catalog struct {
	// from says where the block stands, for errors: `catalog[0]`.
	from     string
	registry name.Registry
	// root is where the walk begins, nil for the whole registry.
	root                   *name.Repository
	include, exclude, tags []*regexp.Regexp
	limit                  int
}

func newCatalog(from string, block Catalog, insecure []string) (*catalog, error) {
	c := &catalog{from: from, limit: cmp.Or(block.Limit, defaultCatalogLimit)}
	if c.limit < 1 {
		return nil, fmt.Errorf("%s: limit is %d; choose 1 or more", from, block.Limit)
	}
	host, path, nested := strings.Cut(block.Repository, "/")
	if !strings.ContainsAny(host, ".:") && host != "localhost" {
		return nil, fmt.Errorf("%s: repository %q does not begin with a registry; set it to host[:port] or host[:port]/path", from, block.Repository)
	}
	var opts []name.Option
	if slices.Contains(insecure, host) {
		opts = append(opts, name.Insecure)
	}
	var err error
	if c.registry, err = name.NewRegistry(host, opts...); err != nil {
		return nil, fmt.Errorf("%s: repository %q: %w", from, block.Repository, err)
	}
	if nested {
		root, err := name.NewRepository(host+"/"+path, opts...)
		if err != nil {
			return nil, fmt.Errorf("%s: repository %q: %w", from, block.Repository, err)
		}
		c.root = &root
	}
	for _, option := range []struct {
		name     string
		patterns []string
		compiled *[]*regexp.Regexp
	}{{"include", block.Include, &c.include}, {"exclude", block.Exclude, &c.exclude}, {"tags", block.Tags, &c.tags}} {
		for _, p := range option.patterns {
			re, err := regexp.Compile(`^(?:` + p + `)$`)
			if err != nil {
				return nil, fmt.Errorf("%s: %s: %q is not a regular expression: %w", from, option.name, p, err)
			}
			*option.compiled = append(*option.compiled, re)
		}
	}
	return c, nil
}

// host is the registry's, as references have it.
func (c *catalog) host() string { return registryHost(c.registry.RegistryStr()) }

func (c *catalog) String() string {
	if c.root == nil {
		return c.host()
	}
	return c.host() + "/" + c.root.RepositoryStr()
}

// target is what credentials are looked up for.
func (c *catalog) target() authn.Resource {
	if c.root == nil {
		return c.registry
	}
	return *c.root
}

// below is a repository's name below the catalog's, "." for the catalog's own. It is not
// ok for one that lies elsewhere.
func (c *catalog) below(repository string) (rel string, ok bool) {
	if c.root == nil {
		return repository, true
	}
	if repository == c.root.RepositoryStr() {
		return ".", true
	}
	return strings.CutPrefix(repository, c.root.RepositoryStr()+"/")
}

// wants reports whether the filters take a repository.
func (c *catalog) wants(repository string) bool {
	rel, ok := c.below(repository)
	return ok && (len(c.include) == 0 || matches(c.include, rel)) && !matches(c.exclude, rel)
}

// references are a repository's tags as references have them.
func (c *catalog) references(repository string, tags []string) []string {
	refs := make([]string, len(tags))
	for i, t := range tags {
		refs[i] = c.host() + "/" + repository + ":" + t
	}
	return refs
}

func matches(patterns []*regexp.Regexp, s string) bool {
	return slices.ContainsFunc(patterns, func(re *regexp.Regexp) bool { return re.MatchString(s) })
}

// choose picks the tags to take of a plain list.
func (c *catalog) choose(tags []string) (chosen []string) {
	for _, t := range tags {
		if attachedRE.MatchString(t) {
			continue
		}
		if matches(c.tags, t) || len(c.tags) == 0 && t == defaultTag {
			chosen = append(chosen, t)
		}
	}
	return chosen
}

// chooseNewest picks the tags to take of Google's list, which says when a manifest was
// uploaded. By default that is the one uploaded last, under all of its tags, since they
// cost nothing and pods may go by any of them.
func (c *catalog) chooseNewest(manifests map[string]google.ManifestInfo) (chosen []string) {
	var newest google.ManifestInfo
	// In the order of digests, so that of two of the same millisecond it is always the
	// same that counts as newer.
	for _, d := range slices.Sorted(maps.Keys(manifests)) {
		m := manifests[d]
		m.Tags = slices.DeleteFunc(slices.Clone(m.Tags), attachedRE.MatchString)
		if len(c.tags) > 0 {
			chosen = append(chosen, c.choose(m.Tags)...)
		} else if len(m.Tags) > 0 && !m.Uploaded.Before(newest.Uploaded) {
			newest = m
		}
	}
	return append(chosen, newest.Tags...)
}

// listAll adds to refs what the catalogs find and refs does not have, sorted by name. A
// catalog that cannot be read ends the build: with a part of its images missing, pruning
// would take them off the disk.
func (r *registries) listAll(ctx context.Context, refs []reference, catalogs []*catalog, concurrency int) ([]reference, error) {
	known := map[string]bool{}
	for _, ref := range refs {
		known[ref.key()] = true
	}
	var found []reference
	for _, c := range catalogs {
		listed, err := r.list(ctx, c, concurrency)
		if err != nil {
			return nil, fmt.Errorf("%s: listing %s: %w", c.from, c, err)
		}
		if len(listed) == 0 {
			return nil, fmt.Errorf("%s: %s has no image that matches; check repository, include, exclude and tags", c.from, c)
		}
		if len(listed) > c.limit {
			return nil, fmt.Errorf("%s: %s has %d tags that match, more than limit = %d; narrow include, exclude or tags, or raise limit", c.from, c, len(listed), c.limit)
		}
		for _, s := range listed {
			ref, err := parseReference(c.from, s)
			if err != nil {
				return nil, err
			}
			if !known[ref.key()] {
				known[ref.key()] = true
				found = append(found, ref)
			}
		}
	}
	slices.SortFunc(found, func(a, b reference) int { return cmp.Compare(a.key(), b.key()) })
	return slices.Concat(refs, found), nil
}

// list is every host/repository:tag that the catalog asks for.
func (r *registries) list(ctx context.Context, c *catalog, concurrency int) ([]string, error) {
	if c.root != nil {
		if found, ok, err := r.walk(ctx, c); ok || err != nil {
			return found, err
		}
	}
	repositories, err := remote.Catalog(ctx, c.registry, r.options(ctx, c.host())...)
	switch {
	case err == nil:
	case c.root != nil && isStatus(err, http.StatusUnauthorized, http.StatusForbidden, http.StatusNotFound, http.StatusMethodNotAllowed):
		// Most public registries tell only the tags of a repository that is named.
		repositories = []string{c.root.RepositoryStr()}
	default:
		return nil, explainList(err)
	}
	repositories = slices.DeleteFunc(repositories, func(s string) bool { return !c.wants(s) })
	tags := make([][]string, len(repositories))
	var g errgroup.Group
	g.SetLimit(concurrency)
	for i, s := range repositories {
		g.Go(func() error {
			all, err := remote.List(c.registry.Repo(s), r.options(ctx, c.host())...)
			if err != nil && !isStatus(err, http.StatusNotFound) { // all of its tags were deleted
				return fmt.Errorf("%s: %w", s, explainList(err))
			}
			tags[i] = c.choose(all)
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		return nil, err
	}
	var found []string
	for i, s := range repositories {
		found = append(found, c.references(s, tags[i])...)
	}
	return found, nil
}

// walk lists a registry that speaks Google's extension of the tags list, which tells the
// repositories below one, and is not ok for others.
func (r *registries) walk(ctx context.Context, c *catalog) (found []string, ok bool, err error) {
	err = google.Walk(*c.root, func(repo name.Repository, list *google.Tags, err error) error {
		if repo == *c.root {
			if isStatus(err, http.StatusNotFound) {
				return nil
			}
			ok = err == nil && len(list.Children)+len(list.Manifests) > 0
		}
		if err != nil {
			return fmt.Errorf("%s: %w", repo.RepositoryStr(), explainList(err))
		}
		if c.wants(repo.RepositoryStr()) {
			found = append(found, c.references(repo.RepositoryStr(), c.chooseNewest(list.Manifests))...)
		}
		return nil
	},
		google.WithContext(ctx),
		google.WithAuthFromKeychain(r.keychain),
		google.WithTransport(r.transport(c.host())),
		google.WithUserAgent(toolName()),
	)
	return found, ok, err
}

func isStatus(err error, statuses ...int) bool {
	e, ok := errors.AsType[*transport.Error](err)
	return ok && slices.Contains(statuses, e.StatusCode)
}

// explainList is explainRegistry for a list.
func explainList(err error) error {
	if isStatus(err, http.StatusNotFound, http.StatusMethodNotAllowed) {
		return errors.New("the registry has no such repository, or does not list its repositories; set repository to one that it has")
	}
	return explainRegistry(err)
}
