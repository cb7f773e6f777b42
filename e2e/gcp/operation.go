package gcp

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"path"
	"strings"
	"time"

	"cloud.google.com/go/compute/apiv1/computepb"
	"google.golang.org/protobuf/proto"
)

// operation is one that was started.
type operation struct {
	record *computepb.Operation
	done   chan struct{}
}

// task is what an operation does.
type task struct {
	// kind is what the operation is called, as in "insert".
	kind string
	// target is the path of the resource that it changes, id its number.
	target string
	id     uint64
	// work takes its time, without the server's lock. It may be nil.
	work func(context.Context) error
	// end brings the records up to date, under the lock. err is what work returned.
	// What end returns is the operation's result.
	end func(err error) error
}

// start starts an operation. A second request with the ID of an earlier one gets
// that one's operation.
func (c *call) start(t task) *computepb.Operation {
	id := c.newID()
	scope := path.Dir(path.Dir(t.target))
	name := fmt.Sprintf("operation-%d-%d", c.now().UnixMilli(), *id)
	record := &computepb.Operation{
		Kind: new("compute#operation"), Id: id, Name: &name, OperationType: &t.kind,
		TargetLink: selfLink(t.target), TargetId: &t.id, SelfLink: selfLink(scope + "/operations/" + name),
		User: new("tester@example.com"), InsertTime: c.timestamp(), StartTime: c.timestamp(), Progress: new(int32(0)),
		Status: computepb.Operation_RUNNING.Enum(),
	}
	if strings.Contains(scope, "/zones/") {
		record.Zone = selfLink(scope)
	}
	op := &operation{record: record, done: make(chan struct{})}
	c.operations[scope+"/operations/"+name] = op
	if request := c.FormValue("requestId"); request != "" {
		c.requests[request] = op
	}
	c.underWay++
	c.work.Go(func() {
		defer c.ended()
		c.run(op, t)
	})
	// A copy: the operation goes on while the answer is sent.
	return proto.CloneOf(record)
}

// repeated is the operation of an earlier request with the same ID, nil if there
// was none.
func (c *call) repeated() *computepb.Operation {
	op, ok := c.requests[c.FormValue("requestId")]
	if !ok {
		return nil
	}
	return proto.CloneOf(op.record)
}

func (c *call) run(op *operation, t task) {
	select {
	case <-time.After(c.config.OperationTime):
	case <-c.ctx.Done():
	}
	if c.fault.OperationHold != nil {
		select {
		case <-c.fault.OperationHold:
		case <-c.ctx.Done():
		}
	}
	err := c.ctx.Err()
	if err == nil && c.fault.Operation != nil {
		err = c.fault.Operation
	}
	if err == nil && t.work != nil && c.config.Hardware != nil {
		err = t.work(c.ctx)
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if err = t.end(err); err != nil {
		failure, ok := errors.AsType[*OperationError](err)
		if !ok {
			failure = &OperationError{Code: "INTERNAL_ERROR", Message: err.Error(), HTTPStatus: http.StatusInternalServerError}
		}
		op.record.Error = &computepb.Error{Errors: []*computepb.Errors{{Code: &failure.Code, Message: &failure.Message}}}
		op.record.HttpErrorStatusCode = new(int32(failure.HTTPStatus))
		op.record.HttpErrorMessage = new(strings.ToUpper(http.StatusText(failure.HTTPStatus)))
	}
	op.record.Status = computepb.Operation_DONE.Enum()
	op.record.Progress, op.record.EndTime = new(int32(100)), c.timestamp()
	close(op.done)
}

func (s *Server) serveOperations() {
	for kind, scope := range map[string]string{
		"globalOperations": "/compute/v1/projects/{project}/global",
		"zoneOperations":   "/compute/v1/projects/{project}/zones/{zone}",
	} {
		permission := "compute." + kind + ".get"
		s.handle(kind+".get", "GET "+scope+"/operations/{operation}", func(c *call) (proto.Message, error) {
			return c.getOperation(permission, s.config.OperationTime == 0 && s.config.Hardware == nil)
		})
		s.handle(kind+".wait", "POST "+scope+"/operations/{operation}/wait", func(c *call) (proto.Message, error) {
			return c.getOperation(permission, true)
		})
	}
}

// maxWait is how long Google answers the method wait at the latest.
const maxWait = 2 * time.Minute

// getOperation answers an operation, when wait is set once it is done.
func (c *call) getOperation(permission string, wait bool) (proto.Message, error) {
	p := strings.TrimSuffix(strings.TrimPrefix(c.Request.URL.Path, "/compute/v1/"), "/wait")
	if err := c.need(permission, p); err != nil {
		return nil, err
	}
	op, ok := c.operations[p]
	if !ok {
		return nil, notFound(p)
	}
	if wait {
		c.mu.Unlock()
		select {
		case <-op.done:
		case <-c.Context().Done():
		case <-time.After(maxWait):
		}
		c.mu.Lock()
	}
	return proto.CloneOf(op.record), nil
}
