package gcp

import (
	"crypto"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"net/http"
	"slices"
	"strings"
	"testing"
)

// cloudPlatform is the scope without which a token is good for none of the APIs.
const cloudPlatform = "https://www.googleapis.com/auth/cloud-platform"

// serveCredentials serves what gives out access tokens: the metadata server, which
// clients look for at what GCE_METADATA_HOST names, and the issuer that keys name. Both
// give Config.Token. Their calls are "metadata.token" and "oauth2.token".
func (s *Server) serveCredentials() {
	const metadata = "GET /computeMetadata/v1/"
	s.mux.HandleFunc(metadata, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Metadata-Flavor", "Google")
		http.NotFound(w, r) // as for what is not set
	})
	s.mux.HandleFunc(metadata+"instance/service-accounts/default/token", func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Metadata-Flavor") != "Google" {
			http.Error(w, "Missing Metadata-Flavor:Google header.", http.StatusForbidden)
			return
		}
		w.Header().Set("Metadata-Flavor", "Google")
		s.giveToken(w, "metadata.token", strings.Split(r.FormValue("scopes"), ","))
	})
	s.mux.HandleFunc("POST /token", func(w http.ResponseWriter, r *http.Request) {
		scopes, err := s.checkAssertion(r.FormValue("assertion"))
		if err != nil {
			w.WriteHeader(http.StatusBadRequest)
			_ = json.NewEncoder(w).Encode(map[string]string{"error": "invalid_grant", "error_description": err.Error()})
			return
		}
		s.giveToken(w, "oauth2.token", scopes)
	})
}

func (s *Server) giveToken(w http.ResponseWriter, call string, scopes []string) {
	s.mu.Lock()
	s.calls = append(s.calls, call+" "+strings.Join(scopes, " "))
	s.mu.Unlock()
	token := s.config.Token
	if !slices.Contains(scopes, cloudPlatform) {
		token = "of insufficient scope"
	}
	w.Header().Set("Content-Type", "application/json")
	// A client that is gone is not the server's trouble.
	_ = json.NewEncoder(w).Encode(map[string]any{"access_token": token, "token_type": "Bearer", "expires_in": 3599})
}

// Key makes a key of a service account, the content of a file as Google gives it.
func (s *Server) Key(t testing.TB) []byte {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	s.mu.Lock()
	s.keys = append(s.keys, &key.PublicKey)
	s.mu.Unlock()
	file, err := json.Marshal(map[string]string{
		"type": "service_account", "project_id": "p", "client_email": "image-cache@p.iam.gserviceaccount.com", "private_key_id": "1",
		"private_key": string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})), "token_uri": s.URL + "/token",
	})
	if err != nil {
		t.Fatal(err)
	}
	return file
}

// checkAssertion checks that a key has signed what asks for a token, and returns the
// scopes that it asks for.
func (s *Server) checkAssertion(assertion string) ([]string, error) {
	i := strings.LastIndex(assertion, ".")
	_, payload, ok := strings.Cut(assertion[:max(i, 0)], ".")
	if !ok {
		return nil, fmt.Errorf("%q is no JSON web token", assertion)
	}
	signature, err := base64.RawURLEncoding.DecodeString(assertion[i+1:])
	if err != nil {
		return nil, err
	}
	digest := sha256.Sum256([]byte(assertion[:i]))
	s.mu.Lock()
	keys := s.keys
	s.mu.Unlock()
	if !slices.ContainsFunc(keys, func(k *rsa.PublicKey) bool {
		return rsa.VerifyPKCS1v15(k, crypto.SHA256, digest[:], signature) == nil
	}) {
		return nil, errors.New("invalid JWT signature")
	}
	data, err := base64.RawURLEncoding.DecodeString(payload)
	if err != nil {
		return nil, err
	}
	var claims struct{ Scope string }
	err = json.Unmarshal(data, &claims)
	return strings.Fields(claims.Scope), err
}
