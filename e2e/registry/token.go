package registry

import (
	"crypto/rand"
	"encoding/json"
	"fmt"
	"net/http"
	"slices"
	"strings"
)

// tokenPath is where a registry with Config.Tokens gives them out.
const tokenPath = "/token"

// TokenPrefix is what every token begins with.
const TokenPrefix = "e2e-bearer-"

// Tokens are those that were given out.
func (r *Registry) Tokens() []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	return slices.Clone(r.tokens)
}

// bears says whether a request has a token that was given out.
func (r *Registry) bears(req *http.Request) bool {
	token, ok := strings.CutPrefix(req.Header.Get("Authorization"), "Bearer ")
	return ok && slices.Contains(r.Tokens(), token)
}

// serveToken gives a token for a password, as Docker's token authentication has it, or
// for an identity token, as its OAuth2 form has it. An identity token is the password
// with anything after it, so that it can be another each time.
func (r *Registry) serveToken(w http.ResponseWriter, req *http.Request) {
	identity := req.PostFormValue("refresh_token")
	if !r.hasPassword(req) && (r.config.Password == "" || !strings.HasPrefix(identity, r.config.Password)) {
		r.refuse(w, `Basic realm="e2e"`)
		return
	}
	token := TokenPrefix + rand.Text()
	r.mu.Lock()
	r.tokens = append(r.tokens, token)
	r.mu.Unlock()
	w.Header().Set("Content-Type", "application/json")
	_ = json.NewEncoder(w).Encode(map[string]any{"token": token, "access_token": token, "expires_in": 300}) // or the client has gone
}

// challenge is what a client without credentials is told to bring.
func (r *Registry) challenge() string {
	if r.config.Tokens {
		return fmt.Sprintf(`Bearer realm="http://%s%s",service="e2e"`, r.Addr, tokenPath)
	}
	return `Basic realm="e2e"`
}

func (r *Registry) refuse(w http.ResponseWriter, challenge string) {
	r.record(func(c *Count) { c.Unauthorized++ })
	w.Header().Set("WWW-Authenticate", challenge)
	http.Error(w, `{"errors":[{"code":"UNAUTHORIZED","message":"authentication required"}]}`, http.StatusUnauthorized)
}
