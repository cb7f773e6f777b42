// Package gcp stands in for what of Google Cloud cannot run on a test machine:
// Compute Engine's images, disks, instances and operations, and GKE's clusters, as
// the REST APIs serve them to the real client libraries and to the real
// googlecompute builder. It keeps state, takes its time, refuses what Google
// refuses with Google's errors, and fails where a test wants it to.
//
// All APIs are on one address: URL is the endpoint of Google's Go clients
// (option.WithEndpoint), URL + "/compute/v1/" that of the googlecompute builder
// (custom_endpoints). The metadata server is there too.
package gcp

import (
	"bytes"
	"context"
	"crypto/rsa"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"cloud.google.com/go/compute/apiv1/computepb"
	"cloud.google.com/go/container/apiv1/containerpb"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/proto"
)

// Config says how the server behaves. Its zero value keeps records only and
// completes every operation before it is asked about.
type Config struct {
	// Addr is where to listen, "127.0.0.1:0" by default.
	Addr string
	// Token, if set, is the access token that every request must bring.
	Token string
	// Zones are those of every project, DefaultZones by default.
	Zones []string
	// PageSize is how many items a page has at most, 500 by default, as Google's.
	PageSize int
	// OperationTime is what each operation takes at least.
	OperationTime time.Duration
	// Hardware, if set, makes disks, images and instances real.
	Hardware Hardware
	// Now is the server's clock, time.Now by default.
	Now func() time.Time
}

// DefaultZones are two regions with a gap in their letters, as Google has them.
var DefaultZones = []string{"europe-west4-a", "europe-west4-b", "us-central1-a", "us-central1-b", "us-central1-f"}

// Server is a running server.
type Server struct {
	// URL is the server's address, without a slash at its end.
	URL string

	config Config
	mux    *http.ServeMux
	server *http.Server
	served chan struct{}
	cancel context.CancelFunc // of all operations
	ctx    context.Context
	work   sync.WaitGroup

	mu         sync.Mutex
	images     table[*computepb.Image]
	disks      table[*computepb.Disk]
	instances  table[*computepb.Instance]
	operations map[string]*operation
	requests   map[string]*operation // by requestId
	clusters   []*containerpb.Cluster
	quotas     []quota
	faults     []*Fault
	denied     map[string]bool
	needed     map[string]bool
	calls      []string
	underWay   int        // calls and operations
	settled    *sync.Cond // underWay is 0
	lastID     uint64
	forward    time.Duration // of the clock
	keys       []*rsa.PublicKey
}

// Start starts a server.
func Start(config Config) (*Server, error) {
	if config.Addr == "" {
		config.Addr = "127.0.0.1:0"
	}
	if config.Zones == nil {
		config.Zones = DefaultZones
	}
	if config.PageSize == 0 {
		config.PageSize = 500
	}
	if config.Now == nil {
		config.Now = time.Now
	}
	l, err := net.Listen("tcp", config.Addr)
	if err != nil {
		return nil, fmt.Errorf("starting the Google API server: %w", err)
	}
	s := &Server{
		URL: "http://" + l.Addr().String(), config: config, mux: http.NewServeMux(), served: make(chan struct{}),
		images: table[*computepb.Image]{}, disks: table[*computepb.Disk]{}, instances: table[*computepb.Instance]{},
		operations: map[string]*operation{}, requests: map[string]*operation{},
		denied: map[string]bool{}, needed: map[string]bool{},
	}
	s.settled = sync.NewCond(&s.mu)
	s.ctx, s.cancel = context.WithCancel(context.Background())
	s.serveImages()
	s.serveDisks()
	s.serveInstances()
	s.serveOperations()
	s.serveLocations()
	s.serveClusters()
	s.serveCredentials()
	s.mux.HandleFunc("/", func(w http.ResponseWriter, r *http.Request) {
		writeError(w, &Error{Code: http.StatusNotImplemented, Reason: "notImplemented",
			Message: fmt.Sprintf("package gcp has no %s %s: add it beside the methods of the same resource", r.Method, r.URL.Path)})
	})
	s.server = &http.Server{Handler: s.mux}
	go func() {
		// It ends by Close only.
		_ = s.server.Serve(l)
		close(s.served)
	}()
	return s, nil
}

// New starts a server for a test and stops it at the test's end. The log of a
// failed test has the calls.
func New(t testing.TB, config Config) *Server {
	t.Helper()
	s, err := Start(config)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := s.Close(); err != nil {
			t.Error(err)
		}
		if t.Failed() {
			t.Logf("calls to the Google API server:\n%s", strings.Join(s.Calls(), "\n"))
		}
	})
	return s
}

// Close stops the server and waits for the operations, which it cancels. It leaves
// the hardware as it is.
func (s *Server) Close() error {
	s.cancel()
	err := s.server.Close()
	<-s.served
	s.work.Wait()
	return err
}

// Calls are the methods called so far with the paths, in order, as in
// "disks.insert projects/p/zones/z/disks".
func (s *Server) Calls() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.calls)
}

// Resources are the names of all images, disks and instances, sorted, as in
// "projects/p/zones/z/disks/d".
func (s *Server) Resources() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Sorted(slices.Values(slices.Concat(s.images.names(), s.disks.names(), s.instances.names())))
}

// Settle waits for the calls that have come in so far and the operations that they start:
// a client that is gone does not end them.
func (s *Server) Settle() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for s.underWay > 0 {
		s.settled.Wait()
	}
}

// ended is called when a call or an operation that is counted in underWay has ended.
func (s *Server) ended() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.underWay--; s.underWay == 0 {
		s.settled.Broadcast()
	}
}

// call is a request that is being answered.
type call struct {
	*Server
	*http.Request
	body  []byte
	fault Fault
}

// handle answers a method of an API. The handler runs under the server's lock.
func (s *Server) handle(name, pattern string, handler func(*call) (proto.Message, error)) {
	verb, path, _ := strings.Cut(pattern, " ")
	s.mux.HandleFunc(verb+" "+path, func(w http.ResponseWriter, r *http.Request) {
		body, err := io.ReadAll(r.Body)
		if err != nil {
			panic(http.ErrAbortHandler) // the client is gone
		}
		s.mu.Lock()
		s.calls = append(s.calls, name+" "+strings.TrimPrefix(r.URL.Path, "/compute/v1/"))
		c := &call{Server: s, Request: r, body: body, fault: s.nextFault(name)}
		s.underWay++
		s.mu.Unlock()
		defer s.ended()

		answer, err := c.answer(handler)
		if c.fault.LoseAnswer {
			panic(http.ErrAbortHandler)
		}
		if err != nil {
			writeError(w, err)
			return
		}
		w.Header().Set("Content-Type", "application/json; charset=UTF-8")
		// A client that is gone is not the server's trouble.
		_, _ = w.Write(answer)
	})
}

// answer calls the handler, unless a fault is in its way, and encodes its answer.
func (c *call) answer(handler func(*call) (proto.Message, error)) ([]byte, error) {
	if c.fault.Delay > 0 {
		select {
		case <-time.After(c.fault.Delay):
		case <-c.Context().Done():
		case <-c.ctx.Done():
		}
	}
	if c.fault.Hold != nil {
		select {
		case <-c.fault.Hold:
		case <-c.ctx.Done():
		}
	}
	if c.fault.LoseRequest {
		panic(http.ErrAbortHandler)
	}
	if c.fault.Error != nil {
		return nil, c.fault.Error
	}
	if t := c.config.Token; t != "" && c.Header.Get("Authorization") != "Bearer "+t {
		return nil, &Error{Code: http.StatusUnauthorized, Reason: "authError", Status: "UNAUTHENTICATED",
			Message: "Request had invalid authentication credentials. Expected OAuth 2 access token, login cookie or other valid authentication credential."}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	m, err := handler(c)
	if err != nil {
		return nil, err
	}
	return protojson.Marshal(m)
}

// project is the path of the project that the call is about.
func (c *call) project() string { return "projects/" + c.PathValue("project") }

// zone is the path of the zone that the call is about. It must be there.
func (c *call) zone() (string, error) {
	name := c.PathValue("zone")
	path := c.project() + "/zones/" + name
	if !slices.Contains(c.config.Zones, name) {
		return "", invalid("zone", name, "Unknown zone.")
	}
	return path, nil
}

// decode reads the body. Like Google's servers, it refuses fields that it does not
// know.
func (c *call) decode(m proto.Message) error {
	body := c.body
	if bytes.Contains(body, []byte("null")) {
		// The googlecompute builder sends [null] for no access configuration.
		var v any
		if err := json.Unmarshal(body, &v); err == nil {
			body, _ = json.Marshal(withoutNull(v))
		}
	}
	if err := protojson.Unmarshal(body, m); err != nil {
		return &Error{Code: http.StatusBadRequest, Reason: "badRequest", Message: "Invalid JSON payload received. " + err.Error()}
	}
	return nil
}

func withoutNull(v any) any {
	switch v := v.(type) {
	case []any:
		v = slices.DeleteFunc(v, func(e any) bool { return e == nil })
		for i := range v {
			v[i] = withoutNull(v[i])
		}
		return v
	case map[string]any:
		for k := range v {
			v[k] = withoutNull(v[k])
		}
	}
	return v
}

// now is the time on the server's clock.
func (s *Server) now() time.Time { return s.config.Now().Add(s.forward) }

// Forward puts the server's clock forward, and does what is due by then: instances
// whose time is up end, if that is how they were made.
func (s *Server) Forward(d time.Duration) {
	s.mu.Lock()
	s.forward += d
	started := (&call{Server: s, Request: new(http.Request)}).endOverdue()
	s.mu.Unlock()
	for _, op := range started {
		<-op.done
	}
}

// timestamp is the time in Google's form: in the time of its headquarters, so that
// comparing it with others as text goes wrong.
func (s *Server) timestamp() *string {
	return new(s.now().In(time.FixedZone("PST", -8*60*60)).Format("2006-01-02T15:04:05.000-07:00"))
}

func (s *Server) newID() *uint64 {
	s.lastID++
	return new(4_000_000_000_000_000_000 + s.lastID)
}

// Error is an error as Google's APIs answer it.
type Error struct {
	// Code is the HTTP status.
	Code int
	// Reason is the machine-readable kind, as in "notFound".
	Reason string
	// Status is the canonical code of newer APIs, as in "PERMISSION_DENIED".
	Status  string
	Message string
}

func (e *Error) Error() string { return fmt.Sprintf("%d %s: %s", e.Code, e.Reason, e.Message) }

func writeError(w http.ResponseWriter, err error) {
	e, ok := errors.AsType[*Error](err)
	if !ok {
		e = &Error{Code: http.StatusInternalServerError, Reason: "backendError", Message: err.Error()}
	}
	body := map[string]any{
		"code":    e.Code,
		"message": e.Message,
		"errors":  []any{map[string]any{"message": e.Message, "domain": "global", "reason": e.Reason}},
	}
	if e.Status != "" {
		body["status"] = e.Status
	}
	w.Header().Set("Content-Type", "application/json; charset=UTF-8")
	w.WriteHeader(e.Code)
	_ = json.NewEncoder(w).Encode(map[string]any{"error": body})
}

func notFound(path string) *Error {
	return &Error{Code: http.StatusNotFound, Reason: "notFound", Message: fmt.Sprintf("The resource '%s' was not found", path)}
}

func alreadyExists(path string) *Error {
	return &Error{Code: http.StatusConflict, Reason: "alreadyExists", Message: fmt.Sprintf("The resource '%s' already exists", path)}
}

func notReady(path string) *Error {
	return &Error{Code: http.StatusBadRequest, Reason: "resourceNotReady", Message: fmt.Sprintf("The resource '%s' is not ready", path)}
}

func inUse(path, user string) *Error {
	return &Error{Code: http.StatusBadRequest, Reason: "resourceInUseByAnotherResource",
		Message: fmt.Sprintf("The disk resource '%s' is already being used by '%s'", path, user)}
}

func invalid(field, value, why string) *Error {
	return &Error{Code: http.StatusBadRequest, Reason: "invalid", Message: fmt.Sprintf("Invalid value for field '%s': '%s'. %s", field, value, why)}
}
