// Package registry is a container registry on loopback that records what is asked
// of it, and can be told what to do wrong. Manifests are handled by go-containerregistry's registry. Blobs lie in a
// directory and are served from there: that registry hashes a blob on every request
// and does not know open ranges, with which clients resume a download.
package registry

import (
	"context"
	"crypto/subtle"
	"errors"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	ggcr "github.com/google/go-containerregistry/pkg/registry"
	v1 "github.com/google/go-containerregistry/pkg/v1"
)

// Config says how a registry behaves. Its zero value is open, fast and on a free port.
type Config struct {
	// Addr is where to listen, "127.0.0.1:0" by default.
	Addr string
	// Dir keeps the blobs. It is made if missing, and may have some of an earlier run.
	Dir string
	// Username and Password, if set, are asked of every request.
	Username, Password string
	// Tokens has clients bring a token for the password, from the registry itself.
	Tokens bool
	// Latency is added to every request.
	Latency time.Duration
}

// Registry is a running registry, or one that was stopped.
type Registry struct {
	// Addr is the host and port that references begin with.
	Addr string

	config  Config
	handler http.Handler

	mu      sync.Mutex
	server  *http.Server
	served  chan struct{}
	count   Count
	choose  func(*http.Request) Fault
	private string // the repository that Protect was called for
	tokens  []string
}

// Count is what was asked of a registry and what it answered.
type Count struct {
	ManifestHeads, ManifestGets int
	BlobHeads, BlobGets         int
	// ManifestBytes and BlobBytes are the bodies of the answers.
	ManifestBytes, BlobBytes int64
	// Blobs are the digests of the blobs that were fetched, in order, also in part.
	Blobs []string
	// Unauthorized are the requests that were refused for want of credentials.
	Unauthorized int
}

// Start starts a registry.
func Start(config Config) (*Registry, error) {
	if config.Addr == "" {
		config.Addr = "127.0.0.1:0"
	}
	if err := os.MkdirAll(config.Dir, 0o755); err != nil {
		return nil, fmt.Errorf("starting registry: %w", err)
	}
	r := &Registry{Addr: config.Addr, config: config}
	r.handler = ggcr.New(
		ggcr.WithBlobHandler(blobs(config.Dir)),
		ggcr.Logger(log.New(io.Discard, "", 0)),
	)
	return r, r.Start()
}

// New starts a registry for a test and stops it at the test's end.
func New(t testing.TB, config Config) *Registry {
	t.Helper()
	if config.Dir == "" {
		config.Dir = t.TempDir()
	}
	r, err := Start(config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := r.Stop(); err != nil {
			t.Error(err)
		}
	})
	return r
}

// Start starts a registry that was stopped, on the same port and with the same
// contents.
func (r *Registry) Start() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.server != nil {
		return nil
	}
	l, err := net.Listen("tcp", r.Addr)
	if err != nil {
		return fmt.Errorf("starting registry: %w", err)
	}
	r.Addr = l.Addr().String()
	server, served := &http.Server{Handler: http.HandlerFunc(r.serve)}, make(chan struct{})
	go func() {
		// It ends by Close only.
		_ = server.Serve(l)
		close(served)
	}()
	r.server, r.served = server, served
	return nil
}

// Stop ends the registry and every connection to it.
func (r *Registry) Stop() error {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.server == nil {
		return nil
	}
	err := r.server.Close()
	<-r.served
	r.server = nil
	return err
}

// Warm reads all blobs into the page cache.
func (r *Registry) Warm() error {
	files, err := filepath.Glob(filepath.Join(r.config.Dir, "*", "*"))
	if err != nil {
		return err
	}
	for _, file := range files {
		f, err := os.Open(file)
		if err != nil {
			return err
		}
		_, err = io.Copy(io.Discard, f)
		f.Close()
		if err != nil {
			return err
		}
	}
	return nil
}

// Reset forgets what was counted and returns it.
func (r *Registry) Reset() Count {
	r.mu.Lock()
	defer r.mu.Unlock()
	count := r.count
	r.count = Count{}
	return count
}

// Count is what was asked since the start or the last Reset.
func (r *Registry) Count() Count {
	r.mu.Lock()
	defer r.mu.Unlock()
	count := r.count
	count.Blobs = append([]string(nil), count.Blobs...)
	return count
}

func (r *Registry) serve(w http.ResponseWriter, req *http.Request) {
	if r.config.Latency > 0 {
		select {
		case <-time.After(r.config.Latency):
		case <-req.Context().Done():
			return
		}
	}
	if r.config.Tokens && req.URL.Path == tokenPath {
		r.serveToken(w, req)
		return
	}
	if !r.authorized(req) {
		r.refuse(w, r.challenge())
		return
	}
	path := strings.Split(strings.TrimPrefix(req.URL.Path, "/v2/"), "/")
	if len(path) < 3 || (req.Method != http.MethodGet && req.Method != http.MethodHead) {
		r.handler.ServeHTTP(w, req)
		return
	}
	switch fault := r.fault(req); fault {
	case "":
	case Busy:
		tooMany(w)
		return
	case Bomb:
		expand(w)
		return
	default:
		w = &faulty{ResponseWriter: w, req: req, fault: fault}
	}
	head := req.Method == http.MethodHead
	body := &counter{ResponseWriter: w, head: head}
	switch kind, name := path[len(path)-2], path[len(path)-1]; kind {
	case "manifests":
		r.record(func(c *Count) {
			if head {
				c.ManifestHeads++
			} else {
				c.ManifestGets++
			}
		})
		body.add = func(n int64) { r.record(func(c *Count) { c.ManifestBytes += n }) }
		r.handler.ServeHTTP(body, req)
	case "blobs":
		r.record(func(c *Count) {
			if head {
				c.BlobHeads++
			} else {
				c.BlobGets++
				c.Blobs = append(c.Blobs, name)
			}
		})
		body.add = func(n int64) { r.record(func(c *Count) { c.BlobBytes += n }) }
		r.serveBlob(body, req, name)
	default:
		r.handler.ServeHTTP(w, req)
		return
	}
	body.end()
}

func (r *Registry) serveBlob(w http.ResponseWriter, req *http.Request, name string) {
	h, err := v1.NewHash(name)
	if err != nil {
		r.handler.ServeHTTP(w, req) // for the error's form
		return
	}
	f, err := os.Open(blobs(r.config.Dir).path(h))
	if err != nil {
		r.handler.ServeHTTP(w, req)
		return
	}
	defer f.Close()
	w.Header().Set("Docker-Content-Digest", name)
	w.Header().Set("Content-Type", "application/octet-stream")
	http.ServeContent(w, req, "", time.Time{}, f)
}

// Protect has credentials asked from now on, in requests for one repository alone.
func (r *Registry) Protect(repository, username, password string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.private, r.config.Username, r.config.Password = repository, username, password
}

func (r *Registry) authorized(req *http.Request) bool {
	if r.config.Tokens {
		return r.bears(req)
	}
	return r.hasPassword(req)
}

func (r *Registry) hasPassword(req *http.Request) bool {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.config.Username == "" && r.config.Password == "" {
		return true
	}
	if r.private != "" && !strings.HasPrefix(req.URL.Path, "/v2/"+r.private+"/") {
		return true
	}
	user, password, _ := req.BasicAuth()
	return subtle.ConstantTimeCompare([]byte(user+"\x00"+password), []byte(r.config.Username+"\x00"+r.config.Password)) == 1
}

func (r *Registry) record(f func(*Count)) {
	r.mu.Lock()
	defer r.mu.Unlock()
	f(&r.count)
}

// counter counts the bytes of an answer's body: all that its header promises before
// the first is sent, since the client may be done with the last one before this
// process is, and less at the end if the client went away.
type counter struct {
	http.ResponseWriter
	head        bool
	add         func(n int64)
	promised, n int64
}

func (c *counter) WriteHeader(status int) {
	if length, err := strconv.ParseInt(c.Header().Get("Content-Length"), 10, 64); err == nil && !c.head {
		c.promised = length
		c.add(length)
	}
	c.ResponseWriter.WriteHeader(status)
}

func (c *counter) Write(p []byte) (int, error) {
	n, err := c.ResponseWriter.Write(p)
	c.n += int64(n)
	return n, err
}

// ReadFrom keeps the way by which the kernel copies a file to a connection.
func (c *counter) ReadFrom(src io.Reader) (int64, error) {
	n, err := io.Copy(c.ResponseWriter, src)
	c.n += n
	return n, err
}

func (c *counter) end() {
	if !c.head && c.n != c.promised {
		c.add(c.n - c.promised)
	}
}

// blobs is the directory in which blobs lie as <algorithm>/<hex>, as in an OCI image
// layout. go-containerregistry's own has the same form, but hashes the blob for Stat.
type blobs string

func (b blobs) path(h v1.Hash) string { return filepath.Join(string(b), h.Algorithm, h.Hex) }

func (b blobs) Stat(_ context.Context, _ string, h v1.Hash) (int64, error) {
	fi, err := os.Stat(b.path(h))
	if errors.Is(err, os.ErrNotExist) {
		return 0, ggcr.ErrNotFound
	}
	if err != nil {
		return 0, err
	}
	return fi.Size(), nil
}

func (b blobs) Get(_ context.Context, _ string, h v1.Hash) (io.ReadCloser, error) {
	f, err := os.Open(b.path(h))
	if errors.Is(err, os.ErrNotExist) {
		return nil, ggcr.ErrNotFound
	}
	return f, err
}

// Put writes through a temporary file, since another push may write the same blob.
func (b blobs) Put(ctx context.Context, repo string, h v1.Hash, rc io.ReadCloser) error {
	return ggcr.NewDiskBlobHandler(string(b)).(ggcr.BlobPutHandler).Put(ctx, repo, h, rc)
}
