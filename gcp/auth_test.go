package gcp

import (
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// wantScopes are what every token is asked for. That of the e-mail address is what the
// roles of a GKE cluster go by.
var wantScopes = []string{"https://www.googleapis.com/auth/cloud-platform", "https://www.googleapis.com/auth/userinfo.email"}

// issuer stands in for a server that gives out access tokens. asked gives the scopes
// that a request is for.
func issuer(t *testing.T, asked func(*http.Request) []string) *httptest.Server {
	t.Helper()
	s := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if got := asked(r); !slices.Equal(got, wantScopes) {
			t.Errorf("%s is asked for a token for %q, want %q", r.URL.Path, got, wantScopes)
		}
		w.Header().Set("Content-Type", "application/json")
		if err := json.NewEncoder(w).Encode(map[string]any{"access_token": "issued", "token_type": "Bearer", "expires_in": 3600}); err != nil {
			t.Error(err)
		}
	}))
	t.Cleanup(s.Close)
	return s
}

func wantToken(t *testing.T, a *Auth) {
	t.Helper()
	if errs := a.Prepare(); len(errs) > 0 {
		t.Fatal(errs)
	}
	if got, err := a.token(t.Context()); err != nil || got != "issued" {
		t.Errorf("got token %q, error %v", got, err)
	}
}

// TestAuthKey has a service account's key.
func TestAuthKey(t *testing.T) {
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	s := issuer(t, func(r *http.Request) []string {
		parts := strings.Split(r.FormValue("assertion"), ".")
		if len(parts) != 3 {
			t.Errorf("%v is no JSON web token", parts)
			return nil
		}
		var claims struct{ Scope string }
		data, err := base64.RawURLEncoding.DecodeString(parts[1])
		if err == nil {
			err = json.Unmarshal(data, &claims)
		}
		if err != nil {
			t.Error(err)
		}
		return strings.Fields(claims.Scope)
	})
	file, err := json.Marshal(map[string]string{
		"type": "service_account", "project_id": "p", "client_email": "image-cache@p.iam.gserviceaccount.com", "private_key_id": "1",
		"private_key": string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})), "token_uri": s.URL,
	})
	if err != nil {
		t.Fatal(err)
	}
	name := filepath.Join(t.TempDir(), "key.json")
	if err := os.WriteFile(name, file, 0o600); err != nil {
		t.Fatal(err)
	}
	wantToken(t, &Auth{CredentialsJSON: string(file)})
	wantToken(t, &Auth{CredentialsFile: name})
	t.Setenv("GOOGLE_APPLICATION_CREDENTIALS", name)
	wantToken(t, &Auth{})
}

// TestAuthAttached has the account attached to the machine or, by Workload Identity, to
// the pod.
func TestAuthAttached(t *testing.T) {
	s := issuer(t, func(r *http.Request) []string {
		if r.URL.Path != "/computeMetadata/v1/instance/service-accounts/default/token" || r.Header.Get("Metadata-Flavor") != "Google" {
			t.Errorf("the metadata server is asked for %s", r.URL)
		}
		return strings.Split(r.FormValue("scopes"), ",")
	})
	t.Setenv("GCE_METADATA_HOST", strings.TrimPrefix(s.URL, "http://"))
	// The user's own are not found.
	t.Setenv("GOOGLE_APPLICATION_CREDENTIALS", "")
	t.Setenv("HOME", t.TempDir())
	wantToken(t, &Auth{})
}
