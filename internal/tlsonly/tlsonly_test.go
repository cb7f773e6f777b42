package tlsonly

import (
	"errors"
	"net/http"
	"testing"
)

// sent fails every request that reaches it.
type sent struct{}

var errSent = errors.New("sent")

func (sent) RoundTrip(*http.Request) (*http.Response, error) { return nil, errSent }

func TestTransport(t *testing.T) {
	for url, want := range map[string]error{
		"https://registry.example.com/v2/": errSent,
		"https://10.0.0.1/v2/":             errSent,
		"http://127.0.0.1:5000/v2/":        errSent,
		"http://127.0.0.2/v2/":             errSent,
		"http://[::1]:5000/v2/":            errSent,
		"http://localhost:5000/v2/":        errSent,
		"http://10.0.0.1:5000/v2/":         ErrPlainHTTP,
		"http://192.168.1.1/v2/":           ErrPlainHTTP,
		"http://registry.localhost/v2/":    ErrPlainHTTP,
		"http://localhost.example.com/v2/": ErrPlainHTTP,
		"http://registry.example.com/v2/":  ErrPlainHTTP,
	} {
		req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, url, nil)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := (transport{sent{}}).RoundTrip(req); !errors.Is(err, want) {
			t.Errorf("%s: %v, want %v", url, err, want)
		}
	}
}
