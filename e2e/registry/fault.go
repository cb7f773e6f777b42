package registry

import (
	"bytes"
	"net/http"
	"strconv"
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
