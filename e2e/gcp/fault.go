package gcp

import (
	"fmt"
	"maps"
	"net/http"
	"path"
	"slices"
	"time"
)

// Fault makes calls go wrong. Of Error, Operation, LoseRequest and LoseAnswer at most
// one is set; Delay, Hold and OperationHold may come with any of them or alone.
type Fault struct {
	// Call is the method, as in "disks.insert" or "disks.*".
	Call string
	// After is how many calls go well first.
	After int
	// Times is how many calls then go wrong, 1 by default.
	Times int

	// Delay comes before everything else.
	Delay time.Duration
	// Hold, if set, keeps the call until it is closed.
	Hold <-chan struct{}
	// Error is answered, and nothing is done.
	Error *Error
	// Operation is how the operation fails that the call starts.
	Operation *OperationError
	// OperationHold, if set, keeps the operation that the call starts until it is closed.
	OperationHold <-chan struct{}
	// LoseRequest breaks the connection, and nothing is done.
	LoseRequest bool
	// LoseAnswer does what was asked, but breaks the connection before the answer.
	LoseAnswer bool
}

// OperationError is how an operation fails.
type OperationError struct {
	// Code is Google's, as in "QUOTA_EXCEEDED".
	Code    string
	Message string
	// HTTPStatus is what the call would have been answered if the error had been
	// known by then.
	HTTPStatus int
}

func (e *OperationError) Error() string { return e.Code + ": " + e.Message }

// ZoneExhausted is what happens where a zone has no machine left to give.
func ZoneExhausted(zone string) *OperationError {
	return &OperationError{Code: "ZONE_RESOURCE_POOL_EXHAUSTED", HTTPStatus: http.StatusServiceUnavailable,
		Message: fmt.Sprintf("The zone '%s' does not have enough resources available to fulfill the request. Try a different zone, or try again later.", zone)}
}

// Inject adds a fault. The first one that fits a call counts.
func (s *Server) Inject(f Fault) {
	if f.Times == 0 {
		f.Times = 1
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.faults = append(s.faults, &f)
}

// nextFault is the fault of a call, none by default.
func (s *Server) nextFault(call string) Fault {
	for _, f := range s.faults {
		if ok, _ := path.Match(f.Call, call); !ok || f.Times == 0 {
			continue
		}
		if f.After > 0 {
			f.After--
			continue
		}
		f.Times--
		return *f
	}
	return Fault{}
}

// Deny takes a permission such as "compute.disks.create" from the caller.
func (s *Server) Deny(permission string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.denied[permission] = true
}

// Allow gives a permission back.
func (s *Server) Allow(permission string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.denied, permission)
}

// Needed are the permissions that calls have needed so far, sorted: what a role
// has to grant.
func (s *Server) Needed() []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Sorted(maps.Keys(s.needed))
}

// need fails unless the caller has the permission on the resource.
func (c *call) need(permission, resource string) error {
	c.needed[permission] = true
	if !c.denied[permission] {
		return nil
	}
	return &Error{Code: http.StatusForbidden, Reason: "forbidden",
		Message: fmt.Sprintf("Required '%s' permission for '%s'", permission, resource)}
}

// quota limits the total size of the disks of some types in a region.
type quota struct {
	project, region, metric string
	limit                   int64 // GB
}

// SetQuota limits a metric, SSD_TOTAL_GB or DISKS_TOTAL_GB, of a region. Setting it
// again changes it.
func (s *Server) SetQuota(project, region, metric string, limit int64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for i, q := range s.quotas {
		if q.project == "projects/"+project && q.region == region && q.metric == metric {
			s.quotas[i].limit = limit
			return
		}
	}
	s.quotas = append(s.quotas, quota{"projects/" + project, region, metric, limit})
}

// metrics are the quotas by the disk types that count towards them.
var metrics = map[string]string{
	"pd-standard": "DISKS_TOTAL_GB",
	"pd-balanced": "SSD_TOTAL_GB",
	"pd-ssd":      "SSD_TOTAL_GB",
}

// usage is what a project's disks take of a quota in a region, in GB.
func (s *Server) usage(q quota) int64 {
	var sum int64
	for name, d := range s.disks {
		if inProject(name, q.project) && region(path.Base(d.GetZone())) == q.region && metrics[path.Base(d.GetType())] == q.metric {
			sum += d.GetSizeGb()
		}
	}
	return sum
}

// checkQuota fails if a disk is one too many. Google finds that out while it makes
// the disk, not when it is asked to.
func (s *Server) checkQuota(project, zone, diskType string) *OperationError {
	for _, q := range s.quotas {
		if q.project != project || q.region != region(zone) || q.metric != metrics[diskType] || s.usage(q) <= q.limit {
			continue
		}
		return &OperationError{Code: "QUOTA_EXCEEDED", HTTPStatus: http.StatusForbidden,
			Message: fmt.Sprintf("Quota '%s' exceeded.  Limit: %d.0 in region %s.", q.metric, q.limit, q.region)}
	}
	return nil
}
