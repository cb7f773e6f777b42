// Package tlsonly keeps what is asked of registries, and the credentials with it, off plain
// HTTP.
package tlsonly

import (
	"errors"
	"net"
	"net/http"

	"github.com/google/go-containerregistry/pkg/v1/remote"
)

// ErrPlainHTTP is in the error of a request that was not sent since anyone between could
// read it.
var ErrPlainHTTP = errors.New("plain HTTP is refused, except to loopback")

// Transport is remote.DefaultTransport without plain HTTP, except to loopback. Without it
// go-containerregistry asks registries at private addresses (RFC 1918) and below .localhost
// in plain HTTP as well, if HTTPS fails or takes 300 ms, and any registry can send it to a
// plain HTTP address for a token.
var Transport http.RoundTripper = transport{remote.DefaultTransport}

type transport struct{ inner http.RoundTripper }

func (t transport) RoundTrip(req *http.Request) (*http.Response, error) {
	if req.URL.Scheme != "https" && !loopback(req.URL.Hostname()) {
		if req.Body != nil {
			req.Body.Close()
		}
		return nil, ErrPlainHTTP
	}
	return t.inner.RoundTrip(req)
}

func loopback(host string) bool {
	return host == "localhost" || net.ParseIP(host).IsLoopback()
}
