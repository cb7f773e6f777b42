package imagecache

import (
	"fmt"
	"net/http"
	"net/http/httptest"
	"strings"
	"testing"

	"github.com/google/go-containerregistry/pkg/authn"
)

// TestPlainHTTPRefused has a registry that leads to plain HTTP elsewhere: for a token, and
// for the manifest. Nothing is sent there, the address is for documentation.
func TestPlainHTTPRefused(t *testing.T) {
	const elsewhere = "http://192.0.2.1:5000/"
	for what, handler := range map[string]http.HandlerFunc{
		"token": func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("WWW-Authenticate", fmt.Sprintf("Bearer realm=%q,service=registry", elsewhere))
			w.WriteHeader(http.StatusUnauthorized)
		},
		"manifest": func(w http.ResponseWriter, req *http.Request) {
			if req.URL.Path != "/v2/" {
				http.Redirect(w, req, elsewhere, http.StatusTemporaryRedirect)
			}
		},
	} {
		t.Run(what, func(t *testing.T) {
			server := httptest.NewServer(handler)
			defer server.Close()
			host := server.Listener.Addr().String()
			ref, err := parseReference("images[0]", host+"/app:1")
			if err != nil {
				t.Fatal(err)
			}
			r := &registries{keychain: authn.NewMultiKeychain(configured{{Server: host, Username: "robot", Password: "secret"}})}
			_, err = r.get(t.Context(), ref, ref.String())
			if err == nil || !strings.HasSuffix(err.Error(), "plain HTTP is refused, except to loopback; set insecure_registries") {
				t.Errorf("error is %v", err)
			}
		})
	}
}
