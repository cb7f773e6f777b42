package gcp

import (
	"errors"
	"fmt"
	"net/http"
	"regexp"
	"slices"
	"strings"

	"google.golang.org/api/googleapi"
)

// permissionRE finds the permission in the refusals of Compute Engine (Required
// 'compute.disks.create' permission for ...) and GKE (Required
// "container.clusters.list" permission(s) for ...).
var permissionRE = regexp.MustCompile(`['"]([a-z]+\.[A-Za-z]+\.[A-Za-z]+)['"]`)

// roles are the least predefined roles by permission; docs/iam.md says what each is
// for. The first prefix that fits counts.
var roles = []struct{ prefix, role string }{
	{"compute.images.get", "roles/compute.imageUser"},
	{"compute.images.list", "roles/compute.imageUser"},
	{"compute.images.useReadOnly", "roles/compute.imageUser"},
	{"compute.", "roles/compute.storageAdmin"},
	{"container.clusters.get", "roles/container.clusterViewer"},
	{"container.clusters.list", "roles/container.clusterViewer"},
	{"container.", "roles/container.admin"},
	{"iam.serviceAccounts.", "roles/iam.serviceAccountTokenCreator"},
}

// role is the least predefined role that has a permission, or "".
func role(permission string) string {
	for _, r := range roles {
		if strings.HasPrefix(permission, r.prefix) {
			return r.role
		}
	}
	return ""
}

// Explain makes one line of an API's error, with a remedy where there is one. Errors
// of other kinds stay as they are.
func Explain(err error) error {
	e, ok := errors.AsType[*googleapi.Error](err)
	if !ok {
		return err
	}
	text := strings.Join(strings.Fields(e.Message), " ")
	if text == "" {
		text = http.StatusText(e.Code)
	}
	switch {
	case reason(e, "accessNotConfigured", "SERVICE_DISABLED"):
		text += "; enable the API with gcloud services enable"
	case isQuota(e):
		text += "; ask for a higher quota, or ask for less"
	case e.Code == http.StatusUnauthorized:
		text += "; the credentials are not accepted, renew them"
	case e.Code == http.StatusForbidden:
		if m := permissionRE.FindStringSubmatch(text); m != nil && role(m[1]) != "" {
			text += fmt.Sprintf("; the permission %s is missing, grant %s", m[1], role(m[1]))
		} else {
			text += "; a role is missing, see docs/iam.md"
		}
	}
	return &explained{fmt.Sprintf("%s (%d)", text, e.Code), err}
}

type explained struct {
	text string
	err  error
}

func (e *explained) Error() string { return e.text }
func (e *explained) Unwrap() error { return e.err }

// IsNotFound tells whether the API has no such thing.
func IsNotFound(err error) bool { return code(err) == http.StatusNotFound }

// IsConflict tells whether the thing is there already, or was changed meanwhile.
func IsConflict(err error) bool {
	return code(err) == http.StatusConflict || code(err) == http.StatusPreconditionFailed
}

// IsInUse tells whether something else uses the thing.
func IsInUse(err error) bool {
	const inUse = "resourceInUseByAnotherResource"
	if e, ok := errors.AsType[*OperationError](err); ok {
		return e.Code == "RESOURCE_IN_USE_BY_ANOTHER_RESOURCE"
	}
	e, ok := errors.AsType[*googleapi.Error](err)
	return ok && reason(e, inUse)
}

// isTransient tells whether the same request may do better in a moment: lost
// connections, overload and failures on the API's side.
func isTransient(err error) bool {
	e, ok := errors.AsType[*googleapi.Error](err)
	if !ok {
		return true
	}
	return e.Code >= 500 || e.Code == http.StatusTooManyRequests || reason(e, "rateLimitExceeded")
}

func code(err error) int {
	if e, ok := errors.AsType[*googleapi.Error](err); ok {
		return e.Code
	}
	if e, ok := errors.AsType[*OperationError](err); ok {
		return e.Status
	}
	return 0
}

func isQuota(e *googleapi.Error) bool { return reason(e, "quotaExceeded", "QUOTA_EXCEEDED") }

// reason looks for a reason in both forms in which Google's APIs give them.
func reason(e *googleapi.Error, reasons ...string) bool {
	for _, item := range e.Errors {
		if slices.Contains(reasons, item.Reason) {
			return true
		}
	}
	for _, d := range e.Details {
		if m, ok := d.(map[string]any); ok {
			if r, ok := m["reason"].(string); ok && slices.Contains(reasons, r) {
				return true
			}
		}
	}
	return false
}
