package gcp

import (
	"cmp"
	"encoding/base64"
	"encoding/binary"
	"fmt"
	"hash/fnv"
	"maps"
	"net/http"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"cloud.google.com/go/compute/apiv1/computepb"
	"google.golang.org/protobuf/proto"
)

// resource is what images, disks and instances have in common.
type resource interface {
	proto.Message
	GetName() string
	GetStatus() string
	GetCreationTimestamp() string
}

// table has the resources of a kind by their path, "projects/p/zones/z/disks/d".
type table[T resource] map[string]T

func (t table[T]) names() []string { return slices.Collect(maps.Keys(t)) }

// get is the resource of a path.
func (t table[T]) get(path string) (T, error) {
	r, ok := t[path]
	if !ok {
		return r, notFound(path)
	}
	return r, nil
}

// page is what a call asks for of the resources below a parent, and the token of
// the next page.
func (t table[T]) page(c *call, parent string) ([]string, string, error) {
	match, err := parseFilter(c.FormValue("filter"))
	if err != nil {
		return nil, "", err
	}
	var paths []string
	for path, r := range t {
		if !strings.HasPrefix(path, parent+"/") {
			continue
		}
		ok, err := match(r)
		if err != nil {
			return nil, "", err
		}
		if ok {
			paths = append(paths, path)
		}
	}
	key := func(path string) position { return position{0, path} }
	switch order := c.FormValue("orderBy"); order {
	case "", "name":
	case "creationTimestamp desc":
		key = func(path string) position { return position{age(t[path]), path} }
	default:
		return nil, "", invalid("orderBy", order, `Only "name" and "creationTimestamp desc" are supported.`)
	}
	slices.SortFunc(paths, func(a, b string) int { return key(a).compare(key(b)) })

	size := c.config.PageSize
	if v := c.FormValue("maxResults"); v != "" {
		n, err := strconv.Atoi(v)
		if err != nil || n < 0 || n > 500 {
			return nil, "", invalid("maxResults", v, "Must be between 0 and 500, inclusive.")
		}
		if n > 0 {
			size = min(size, n)
		}
	}
	if token := c.FormValue("pageToken"); token != "" {
		last, err := parsePosition(token)
		if err != nil {
			return nil, "", invalid("pageToken", token, "Use the nextPageToken of the page before.")
		}
		// The last of the page before may have gone since.
		paths = slices.DeleteFunc(paths, func(path string) bool { return key(path).compare(last) <= 0 })
	}
	if len(paths) <= size {
		return paths, "", nil
	}
	paths = paths[:size]
	return paths, key(paths[size-1]).String(), nil
}

// position is where a resource stands in a sorted list.
type position struct {
	age  int64 // 0 when sorted by name
	path string
}

func (p position) compare(other position) int {
	return cmp.Or(cmp.Compare(p.age, other.age), strings.Compare(p.path, other.path))
}

// String is a page token.
func (p position) String() string {
	return base64.URLEncoding.EncodeToString(fmt.Appendf(nil, "%d %s", p.age, p.path))
}

func parsePosition(token string) (p position, err error) {
	text, err := base64.URLEncoding.DecodeString(token)
	if err != nil {
		return p, err
	}
	_, err = fmt.Sscanf(string(text), "%d %s", &p.age, &p.path)
	return p, err
}

// age orders resources from the newest to the oldest.
func age(r resource) int64 {
	created, err := time.Parse(time.RFC3339, r.GetCreationTimestamp())
	if err != nil {
		return 0
	}
	return -created.UnixNano()
}

// apiPrefixes are what an absolute address of a resource may begin with.
var apiPrefixes = []string{"https://www.googleapis.com/compute/v1/", "https://compute.googleapis.com/compute/v1/", "/compute/v1/"}

// selfLink is the address of a resource, which is Google's wherever the server is.
func selfLink(path string) *string { return new(apiPrefixes[0] + path) }

// parseLink is the path that a reference in a request leads to: a whole address, or
// one that begins at "projects/" or below the call's project.
func (c *call) parseLink(link string) string {
	for _, prefix := range apiPrefixes {
		link = strings.TrimPrefix(link, prefix)
	}
	if strings.HasPrefix(link, "global/") || strings.HasPrefix(link, "zones/") || strings.HasPrefix(link, "regions/") {
		link = c.project() + "/" + link
	}
	return link
}

func inProject(path, project string) bool { return strings.HasPrefix(path, project+"/") }

var (
	nameRE       = regexp.MustCompile(`^[a-z]([-a-z0-9]{0,61}[a-z0-9])?$`)
	labelKeyRE   = regexp.MustCompile(`^[\p{Ll}\p{Lo}][\p{Ll}\p{Lo}\p{N}_-]{0,62}$`)
	labelValueRE = regexp.MustCompile(`^[\p{Ll}\p{Lo}\p{N}_-]{0,63}$`)
)

func checkName(field, name string) error {
	if !nameRE.MatchString(name) {
		return invalid(field, name, `Must be a match of regex '(?:[a-z](?:[-a-z0-9]{0,61}[a-z0-9])?)'`)
	}
	return nil
}

func checkLabels(labels map[string]string) error {
	if len(labels) > 64 {
		return invalid("resource.labels", "", "A resource can have at most 64 labels.")
	}
	for k, v := range labels {
		if !labelKeyRE.MatchString(k) {
			return invalid("resource.labels", "", fmt.Sprintf("Label key '%s' violates format constraints. The key must start with a lowercase character, can only contain lowercase letters, numeric characters, underscores and dashes. The key can be at most 63 characters long.", k))
		}
		if !labelValueRE.MatchString(v) {
			return invalid("resource.labels", "", fmt.Sprintf("Label value '%s' violates format constraints. The value can only contain lowercase letters, numeric characters, underscores and dashes. The value can be at most 63 characters long.", v))
		}
	}
	return nil
}

// fingerprint stands for the labels or metadata that a change is made to.
func fingerprint(items map[string]string) *string {
	h := fnv.New64a()
	for _, k := range slices.Sorted(maps.Keys(items)) {
		fmt.Fprintf(h, "%q=%q\n", k, items[k])
	}
	return new(base64.StdEncoding.EncodeToString(binary.BigEndian.AppendUint64(nil, h.Sum64())))
}

// checkFingerprint fails if what the caller changed has been changed by others.
func checkFingerprint(what, given string, now *string) error {
	if given != *now {
		return &Error{Code: http.StatusPreconditionFailed, Reason: "conditionNotMet",
			Message: what + " fingerprint either invalid or resource " + strings.ToLower(what) + " have changed"}
	}
	return nil
}

// noResults is what an aggregated list has for a zone without any.
func noResults(zone string) *computepb.Warning {
	return &computepb.Warning{Code: new("NO_RESULTS_ON_PAGE"),
		Message: new(fmt.Sprintf("There are no results for scope '%s' on this page.", zone))}
}

// idText is a resource's number as other resources refer to it.
func idText(id uint64) string { return strconv.FormatUint(id, 10) }
