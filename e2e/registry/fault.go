package registry

import (
	"bytes"
	"compress/gzip"
	"net/http"
	"strconv"
	"sync"
)

// Fault is what a registry does wrong when it is asked for a manifest or a blob.
type Fault string

const (
	// Drop closes the connection in the middle of the answer.
	Drop Fault = "connection dropped"
	// Corrupt serves as many bytes, of which some are wrong.
	Corrupt Fault = "wrong bytes"
	// Busy answers 429 (too many requests).
	Busy Fault = "429"
	// Stall serves half of the answer and then nothing, until the client goes away.
	Stall Fault = "stalled"
	// Bomb answers with what expands without end, until the client goes away.
	Bomb Fault = "compression bomb"
)

// Disturb has choose say for each GET of a manifest or blob what goes wrong with it,
// "" for nothing. A choose that is nil ends it.
func (r *Registry) Disturb(choose func(*http.Request) Fault) {
	r.mu.Lock()
	defer r.mu.Unlock()
	r.choose = choose
}

// fault is what goes wrong with the request.
func (r *Registry) fault(req *http.Request) Fault {
	r.mu.Lock()
	choose := r.choose
	r.mu.Unlock()
	if choose == nil || req.Method != http.MethodGet {
		return ""
	}
	return choose(req)
}

func tooMany(w http.ResponseWriter) {
	w.Header().Set("Retry-After", "1")
	http.Error(w, `{"errors":[{"code":"TOOMANYREQUESTS","message":"you have reached your rate limit"}]}`, http.StatusTooManyRequests)
}

// member is a part of a gzip stream, which may have any number of them: a MiB of spaces, which
// JSON allows anywhere.
var member = sync.OnceValue(func() []byte {
	var b bytes.Buffer
	z := gzip.NewWriter(&b)
	_, _ = z.Write(bytes.Repeat([]byte(" "), 1<<20)) // a buffer does not fail
	_ = z.Close()
	return b.Bytes()
})

// expand serves a compression bomb.
func expand(w http.ResponseWriter) {
	w.Header().Set("Content-Type", "application/vnd.oci.image.manifest.v1+json")
	w.Header().Set("Content-Encoding", "gzip")
	for {
		if _, err := w.Write(member()); err != nil {
			return
		}
	}
}

// faulty is an answer that goes wrong in the middle.
type faulty struct {
	http.ResponseWriter
	req   *http.Request
	fault Fault
	// left is how many bytes are served before it goes wrong.
	left int
}

func (f *faulty) WriteHeader(status int) {
	length, _ := strconv.Atoi(f.Header().Get("Content-Length"))
	f.left = length / 2
	f.ResponseWriter.WriteHeader(status)
}

func (f *faulty) Write(p []byte) (int, error) {
	if f.fault == Corrupt {
		wrong := bytes.Clone(p)
		for i := 0; i < len(wrong); i += 1000 {
			wrong[i] ^= 1
		}
		return f.ResponseWriter.Write(wrong)
	}
	if len(p) <= f.left {
		f.left -= len(p)
		return f.ResponseWriter.Write(p)
	}
	_, _ = f.ResponseWriter.Write(p[:f.left])
	// What it would say of the connection says less than the client.
	_ = http.NewResponseController(f.ResponseWriter).Flush()
	if f.fault == Stall {
		<-f.req.Context().Done()
	}
	panic(http.ErrAbortHandler)
}
