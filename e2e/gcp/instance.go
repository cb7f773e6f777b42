package gcp

import (
	"context"
	"fmt"
	"path"
	"slices"
	"strings"
	"time"

	"cloud.google.com/go/compute/apiv1/computepb"
	"google.golang.org/protobuf/proto"
)

func (s *Server) serveInstances() {
	const instances = "/compute/v1/projects/{project}/zones/{zone}/instances"
	s.handle("instances.aggregatedList", "GET /compute/v1/projects/{project}/aggregated/instances", (*call).aggregatedListInstances)
	s.handle("instances.list", "GET "+instances, (*call).listInstances)
	s.handle("instances.insert", "POST "+instances, (*call).insertInstance)
	s.handle("instances.get", "GET "+instances+"/{instance}", (*call).getInstance)
	s.handle("instances.delete", "DELETE "+instances+"/{instance}", (*call).deleteInstance)
	s.handle("instances.attachDisk", "POST "+instances+"/{instance}/attachDisk", (*call).attachDisk)
	s.handle("instances.detachDisk", "POST "+instances+"/{instance}/detachDisk", (*call).detachDisk)
	s.handle("instances.setMetadata", "POST "+instances+"/{instance}/setMetadata", (*call).setMetadata)
	s.handle("instances.getSerialPortOutput", "GET "+instances+"/{instance}/serialPort", (*call).getSerialPortOutput)
}

// AddInstance adds an instance that is there from the beginning, such as a node.
// Hardware must know it by its path before disks are attached to it.
func (s *Server) AddInstance(project, zone, name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	p := "projects/" + project + "/zones/" + zone + "/instances/" + name
	s.instances[p] = &computepb.Instance{
		Kind: new("compute#instance"), Id: s.newID(), Name: &name, SelfLink: selfLink(p),
		Zone: selfLink("projects/" + project + "/zones/" + zone), CreationTimestamp: s.timestamp(), Status: new("RUNNING"),
		Metadata: &computepb.Metadata{Fingerprint: fingerprint(nil)}, LabelFingerprint: fingerprint(nil),
	}
}

func (c *call) instancePath() string {
	return c.project() + "/zones/" + c.PathValue("zone") + "/instances/" + c.PathValue("instance")
}

func (c *call) getInstance() (proto.Message, error) {
	name := c.instancePath()
	if err := c.need("compute.instances.get", name); err != nil {
		return nil, err
	}
	return c.instances.get(name)
}

func (c *call) listInstances() (proto.Message, error) {
	zone, err := c.zone()
	if err := firstError(err, c.need("compute.instances.list", c.project())); err != nil {
		return nil, err
	}
	list := &computepb.InstanceList{Kind: new("compute#instanceList")}
	paths, token, err := c.instances.page(c, zone+"/instances")
	for _, p := range paths {
		list.Items = append(list.Items, c.instances[p])
	}
	if token != "" {
		list.NextPageToken = &token
	}
	return list, err
}

func (c *call) aggregatedListInstances() (proto.Message, error) {
	if err := c.need("compute.instances.list", c.project()); err != nil {
		return nil, err
	}
	list := &computepb.InstanceAggregatedList{Kind: new("compute#instanceAggregatedList"), Items: map[string]*computepb.InstancesScopedList{}}
	for _, zone := range c.config.Zones {
		list.Items["zones/"+zone] = &computepb.InstancesScopedList{Warning: noResults("zones/" + zone)}
	}
	paths, token, err := c.instances.page(c, c.project())
	for _, p := range paths {
		scope := list.Items["zones/"+zoneOf(p)]
		scope.Warning, scope.Instances = nil, append(scope.Instances, c.instances[p])
	}
	if token != "" {
		list.NextPageToken = &token
	}
	return list, err
}

// insertInstance records an instance and the disks that are made along with it,
// makes them, and boots it. What fails leaves nothing behind.
func (c *call) insertInstance() (proto.Message, error) {
	if op := c.repeated(); op != nil {
		return op, nil
	}
	zone, err := c.zone()
	instance := new(computepb.Instance)
	if err := firstError(err, c.decode(instance)); err != nil {
		return nil, err
	}
	name := zone + "/instances/" + instance.GetName()
	if err := c.checkInstance(name, instance); err != nil {
		return nil, err
	}
	var made []func(context.Context) error
	var ends []func(error) error
	for i, a := range instance.Disks {
		work, end, err := c.insertAttached(zone, name, i, a)
		if err != nil {
			for _, end := range ends {
				_ = end(err)
			}
			for _, a := range instance.Disks[:i] {
				c.detach(name, a)
			}
			delete(c.instances, name)
			return nil, err
		}
		if work != nil {
			made, ends = append(made, work), append(ends, end)
		}
	}
	items, disks := metadata(instance.Metadata), attachments(c, instance)
	var address Address
	return c.start(task{
		kind: "insert", target: name, id: instance.GetId(),
		work: func(ctx context.Context) error {
			for _, work := range made {
				if err := work(ctx); err != nil {
					return err
				}
			}
			var err error
			address, err = c.config.Hardware.StartInstance(ctx, name, items, disks)
			return err
		},
		end: func(err error) error {
			for _, end := range ends {
				if failed := end(err); err == nil {
					err = failed
				}
			}
			if err != nil {
				for _, a := range instance.Disks {
					c.detach(name, a)
				}
				delete(c.instances, name)
				return err
			}
			c.setAddress(instance, address)
			instance.Status = new("RUNNING")
			return nil
		},
	}), nil
}

func (c *call) checkInstance(name string, instance *computepb.Instance) error {
	if err := firstError(
		checkName("resource.name", instance.GetName()), checkLabels(instance.Labels), c.need("compute.instances.create", name),
	); err != nil {
		return err
	}
	if _, ok := c.instances[name]; ok {
		return alreadyExists(name)
	}
	if !strings.Contains(instance.GetMachineType(), "/machineTypes/") {
		return invalid("resource.machineType", instance.GetMachineType(), "The URL is malformed.")
	}
	if len(instance.Disks) == 0 || !instance.Disks[0].GetBoot() {
		return invalid("resource.disks", "", "Boot disk must be the first disk attached to the instance.")
	}
	if len(instance.NetworkInterfaces) == 0 {
		return invalid("resource.networkInterfaces", "", "At least one network interface is required.")
	}
	for _, n := range instance.NetworkInterfaces {
		if err := c.needNetwork(n); err != nil {
			return err
		}
	}
	for _, a := range instance.ServiceAccounts {
		if a.GetEmail() != "" {
			if err := c.need("iam.serviceAccounts.actAs", c.project()+"/serviceAccounts/"+a.GetEmail()); err != nil {
				return err
			}
		}
	}
	if instance.Metadata == nil {
		instance.Metadata = new(computepb.Metadata)
	}
	if len(instance.Metadata.Items) > 0 {
		if err := c.need("compute.instances.setMetadata", name); err != nil {
			return err
		}
	}
	if len(instance.Labels) > 0 {
		if err := c.need("compute.instances.setLabels", name); err != nil {
			return err
		}
	}
	instance.Kind, instance.Id, instance.SelfLink = new("compute#instance"), c.newID(), selfLink(name)
	instance.Zone, instance.CreationTimestamp, instance.Status = selfLink(path.Dir(path.Dir(name))), c.timestamp(), new("PROVISIONING")
	instance.Metadata.Fingerprint = fingerprint(metadata(instance.Metadata))
	instance.LabelFingerprint = fingerprint(instance.Labels)
	c.instances[name] = instance
	return nil
}

// needNetwork asks for what a network interface needs.
func (c *call) needNetwork(n *computepb.NetworkInterface) error {
	subnetwork := c.parseLink(n.GetSubnetwork())
	if subnetwork == "" {
		if n.GetNetwork() == "" {
			return invalid("resource.networkInterfaces[0]", "", "At least one of network or subnetwork is required.")
		}
		// In a network that makes its subnetworks itself, the one of the region.
		subnetwork = c.project() + "/regions/" + region(c.PathValue("zone")) + "/subnetworks/" + path.Base(n.GetNetwork())
	}
	if err := c.need("compute.subnetworks.use", subnetwork); err != nil {
		return err
	}
	if len(n.AccessConfigs) > 0 {
		return c.need("compute.subnetworks.useExternalIp", subnetwork)
	}
	return nil
}

// insertAttached attaches a disk to a new instance, which is made if it is not
// there: "If a disk with the same name already exists in the given region, the
// existing disk is attached to the new instance and the new disk is not created"
// (the reference, on initializeParams.diskName).
func (c *call) insertAttached(zone, instance string, index int, a *computepb.AttachedDisk) (work func(context.Context) error, end func(error) error, err error) {
	if a.GetType() == "SCRATCH" {
		return nil, nil, invalid("resource.disks", "SCRATCH", "package gcp has no local SSDs.")
	}
	if (a.GetSource() == "") == (a.InitializeParams == nil) {
		return nil, nil, invalid(fmt.Sprintf("resource.disks[%d]", index), "", "One of source and initializeParams is required.")
	}
	if p := a.InitializeParams; p != nil {
		name := p.GetDiskName()
		if name == "" {
			name = path.Base(instance)
			if index > 0 {
				name = fmt.Sprintf("%s-%d", name, index)
			}
		}
		a.Source = new(zone + "/disks/" + name)
		if _, ok := c.disks[*a.Source]; !ok {
			disk := &computepb.Disk{Name: &name, SourceImage: p.SourceImage, SizeGb: p.DiskSizeGb, Type: p.DiskType, Labels: p.Labels}
			if _, work, end, err = c.newDisk(zone, disk); err != nil {
				return nil, nil, err
			}
		}
		a.InitializeParams = nil
	}
	if err := c.fillAttached(instance, index, a); err != nil {
		if end != nil {
			_ = end(err)
		}
		return nil, nil, err
	}
	return work, end, nil
}

// fillAttached attaches a disk that is there as the index-th of an instance.
func (c *call) fillAttached(instance string, index int, a *computepb.AttachedDisk) error {
	if a.Mode == nil {
		a.Mode = new("READ_WRITE")
	}
	if a.GetDeviceName() == "" {
		a.DeviceName = new(fmt.Sprintf("persistent-disk-%d", index))
	}
	if err := c.attach(instance, a); err != nil {
		return err
	}
	a.Kind, a.Index, a.Type = new("compute#attachedDisk"), new(int32(index)), new("PERSISTENT")
	a.DiskSizeGb = c.disks[c.parseLink(a.GetSource())].SizeGb
	return nil
}

// setAddress fills in the addresses, of the ranges for documentation where no
// hardware has real ones.
func (c *call) setAddress(instance *computepb.Instance, a Address) {
	if a == (Address{}) {
		a = Address{External: "192.0.2.1", Internal: "10.128.0.2"}
	}
	for i, n := range instance.NetworkInterfaces {
		n.Name, n.NetworkIP = new(fmt.Sprintf("nic%d", i)), &a.Internal
		for _, access := range n.AccessConfigs {
			access.NatIP = &a.External
		}
	}
}

func metadata(m *computepb.Metadata) map[string]string {
	items := map[string]string{}
	for _, i := range m.GetItems() {
		items[i.GetKey()] = i.GetValue()
	}
	return items
}

func attachments(c *call, instance *computepb.Instance) []Attachment {
	var all []Attachment
	for _, a := range instance.Disks {
		all = append(all, attachment(c, a))
	}
	return all
}

func attachment(c *call, a *computepb.AttachedDisk) Attachment {
	return Attachment{Disk: c.parseLink(a.GetSource()), DeviceName: a.GetDeviceName(), ReadOnly: a.GetMode() == "READ_ONLY", Boot: a.GetBoot()}
}

// deleteInstance deletes the disks as well that are to go with it.
func (c *call) deleteInstance() (proto.Message, error) {
	if op := c.repeated(); op != nil {
		return op, nil
	}
	name := c.instancePath()
	instance, err := c.instances.get(name)
	if err := firstError(c.need("compute.instances.delete", name), err); err != nil {
		return nil, err
	}
	if instance.GetStatus() != "RUNNING" && instance.GetStatus() != "TERMINATED" {
		return nil, notReady(name)
	}
	return c.end(name, instance), nil
}

// end starts the end of an instance.
func (c *call) end(name string, instance *computepb.Instance) *computepb.Operation {
	before := instance.Status
	instance.Status = new("STOPPING")
	var doomed []string
	for _, a := range instance.Disks {
		if a.GetAutoDelete() {
			doomed = append(doomed, c.parseLink(a.GetSource()))
		}
	}
	return c.start(task{
		kind: "delete", target: name, id: instance.GetId(),
		work: func(ctx context.Context) error {
			err := c.config.Hardware.DeleteInstance(ctx, name)
			for _, disk := range doomed {
				if err == nil {
					err = c.config.Hardware.DeleteDisk(ctx, disk)
				}
			}
			return err
		},
		end: func(err error) error {
			if err != nil {
				instance.Status = before
				return err
			}
			for _, a := range instance.Disks {
				c.detach(name, a)
			}
			for _, disk := range doomed {
				delete(c.disks, disk)
			}
			delete(c.instances, name)
			return nil
		},
	})
}

// endOverdue starts the end of the instances whose time is up, if that is how they
// were made: maxRunDuration with the action DELETE.
func (c *call) endOverdue() (started []*operation) {
	for name, i := range c.instances {
		limit := i.GetScheduling().GetMaxRunDuration().GetSeconds()
		if limit == 0 || i.GetScheduling().GetInstanceTerminationAction() != "DELETE" || i.GetStatus() != "RUNNING" {
			continue
		}
		if time.Duration(age(i)+c.now().UnixNano()) < time.Duration(limit)*time.Second {
			continue
		}
		link := c.end(name, i).GetSelfLink()
		started = append(started, c.operations[c.parseLink(link)])
	}
	return started
}

func (c *call) attachDisk() (proto.Message, error) {
	name, a := c.instancePath(), new(computepb.AttachedDisk)
	instance, err := c.instances.get(name)
	if err := firstError(err, c.need("compute.instances.attachDisk", name), c.decode(a)); err != nil {
		return nil, err
	}
	if err := c.fillAttached(name, len(instance.Disks), a); err != nil {
		return nil, err
	}
	instance.Disks = append(instance.Disks, a)
	attached := attachment(c, a)
	return c.start(task{
		kind: "attachDisk", target: name, id: instance.GetId(),
		work: func(ctx context.Context) error { return c.config.Hardware.AttachDisk(ctx, name, attached) },
		end: func(err error) error {
			if err != nil {
				c.removeAttached(name, instance, a)
			}
			return err
		},
	}), nil
}

func (c *call) detachDisk() (proto.Message, error) {
	name, device := c.instancePath(), c.FormValue("deviceName")
	instance, err := c.instances.get(name)
	if err := firstError(err, c.need("compute.instances.detachDisk", name)); err != nil {
		return nil, err
	}
	i := slices.IndexFunc(instance.Disks, func(a *computepb.AttachedDisk) bool { return a.GetDeviceName() == device })
	if i < 0 {
		return nil, invalid("deviceName", device, "No attached disk found with device name '"+device+"'")
	}
	a := instance.Disks[i]
	attached := attachment(c, a)
	return c.start(task{
		kind: "detachDisk", target: name, id: instance.GetId(),
		work: func(ctx context.Context) error { return c.config.Hardware.DetachDisk(ctx, name, attached) },
		end: func(err error) error {
			if err == nil {
				c.removeAttached(name, instance, a)
			}
			return err
		},
	}), nil
}

func (c *call) removeAttached(name string, instance *computepb.Instance, a *computepb.AttachedDisk) {
	c.detach(name, a)
	instance.Disks = slices.DeleteFunc(instance.Disks, func(other *computepb.AttachedDisk) bool { return other == a })
}

func (c *call) setMetadata() (proto.Message, error) {
	name, m := c.instancePath(), new(computepb.Metadata)
	instance, err := c.instances.get(name)
	if err := firstError(err, c.need("compute.instances.setMetadata", name), c.decode(m)); err != nil {
		return nil, err
	}
	if err := checkFingerprint("Metadata", m.GetFingerprint(), instance.Metadata.Fingerprint); err != nil {
		return nil, err
	}
	items := metadata(m)
	return c.start(task{
		kind: "setMetadata", target: name, id: instance.GetId(),
		work: func(ctx context.Context) error { return c.config.Hardware.SetMetadata(ctx, name, items) },
		end: func(err error) error {
			if err == nil {
				m.Fingerprint = fingerprint(items)
				instance.Metadata = m
			}
			return err
		},
	}), nil
}

func (c *call) getSerialPortOutput() (proto.Message, error) {
	name := c.instancePath()
	_, err := c.instances.get(name)
	if err := firstError(err, c.need("compute.instances.getSerialPortOutput", name)); err != nil {
		return nil, err
	}
	output := ""
	if c.config.Hardware != nil {
		output = c.config.Hardware.SerialOutput(name)
	}
	return &computepb.SerialPortOutput{Kind: new("compute#serialPortOutput"), Contents: &output, Next: new(int64(len(output))), Start: new(int64(0))}, nil
}

// firstError is the first of the errors, nil where there is none.
func firstError(errs ...error) error {
	i := slices.IndexFunc(errs, func(err error) bool { return err != nil })
	if i < 0 {
		return nil
	}
	return errs[i]
}
