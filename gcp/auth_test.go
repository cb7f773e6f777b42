package gcp

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	fake "github.com/selkies-project/packer-plugin-selkies/e2e/gcp"
)

// wantScopes are what every token is asked for. That of the e-mail address is what the
// roles of a GKE cluster go by.
const wantScopes = "https://www.googleapis.com/auth/cloud-platform https://www.googleapis.com/auth/userinfo.email"

// wantToken has credentials get the token of a server by a call.
func wantToken(t *testing.T, s *fake.Server, a *Auth, call string) {
	t.Helper()
	if errs := a.Prepare(); len(errs) > 0 {
		t.Fatal(errs)
	}
	if got, err := a.token(t.Context()); err != nil || got != "issued" {
		t.Errorf("got token %q, error %v", got, err)
	}
	calls := s.Calls()
	if got, want := calls[len(calls)-1], call+" "+wantScopes; got != want {
		t.Errorf("the token comes by %s, want %s", got, want)
	}
}

// TestAuthKey has a service account's key.
func TestAuthKey(t *testing.T) {
	s := fake.New(t, fake.Config{Token: "issued"})
	file := s.Key(t)
	name := filepath.Join(t.TempDir(), "key.json")
	if err := os.WriteFile(name, file, 0o600); err != nil {
		t.Fatal(err)
	}
	wantToken(t, s, &Auth{CredentialsJSON: string(file)}, "oauth2.token")
	wantToken(t, s, &Auth{CredentialsFile: name}, "oauth2.token")
	t.Setenv("GOOGLE_APPLICATION_CREDENTIALS", name)
	wantToken(t, s, &Auth{}, "oauth2.token")

	other := fake.New(t, fake.Config{Token: "issued"})
	_, err := (&Auth{CredentialsJSON: strings.Replace(string(file), s.URL, other.URL, 1)}).token(t.Context())
	if err == nil || !strings.Contains(err.Error(), "invalid JWT signature") {
		t.Errorf("with a key that is not known the error is %v", err)
	}
}

// TestAuthAttached has the account attached to the machine or, by Workload Identity, to
// the pod.
func TestAuthAttached(t *testing.T) {
	s := fake.New(t, fake.Config{Token: "issued"})
	t.Setenv("GCE_METADATA_HOST", strings.TrimPrefix(s.URL, "http://"))
	// The user's own are not found.
	t.Setenv("GOOGLE_APPLICATION_CREDENTIALS", "")
	t.Setenv("HOME", t.TempDir())
	wantToken(t, s, &Auth{}, "metadata.token")
}
