package gcp

import (
	"context"
	"fmt"
	"path"
	"slices"
	"strconv"
	"strings"

	"cloud.google.com/go/compute/apiv1/computepb"
	"google.golang.org/protobuf/proto"
)

func (s *Server) serveDisks() {
	const disks = "/compute/v1/projects/{project}/zones/{zone}/disks"
	s.handle("disks.aggregatedList", "GET /compute/v1/projects/{project}/aggregated/disks", (*call).aggregatedListDisks)
	s.handle("disks.list", "GET "+disks, (*call).listDisks)
	s.handle("disks.insert", "POST "+disks, (*call).insertDisk)
	s.handle("disks.get", "GET "+disks+"/{disk}", (*call).getDisk)
	s.handle("disks.delete", "DELETE "+disks+"/{disk}", (*call).deleteDisk)
	s.handle("disks.setLabels", "POST "+disks+"/{disk}/setLabels", (*call).setDiskLabels)
}

// FailDisk has a disk be one that could not be made, and stays until someone deletes it.
func (s *Server) FailDisk(path string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.disks[path].Status = new("FAILED")
}

func (c *call) diskPath() string {
	return c.project() + "/zones/" + c.PathValue("zone") + "/disks/" + c.PathValue("disk")
}

func (c *call) getDisk() (proto.Message, error) {
	name := c.diskPath()
	if err := c.need("compute.disks.get", name); err != nil {
		return nil, err
	}
	return c.disks.get(name)
}

func (c *call) listDisks() (proto.Message, error) {
	zone, err := c.zone()
	if err := firstError(err, c.need("compute.disks.list", c.project())); err != nil {
		return nil, err
	}
	list := &computepb.DiskList{Kind: new("compute#diskList")}
	paths, token, err := c.disks.page(c, zone+"/disks")
	for _, p := range paths {
		list.Items = append(list.Items, c.disks[p])
	}
	if token != "" {
		list.NextPageToken = &token
	}
	return list, err
}

func (c *call) aggregatedListDisks() (proto.Message, error) {
	if err := c.need("compute.disks.list", c.project()); err != nil {
		return nil, err
	}
	list := &computepb.DiskAggregatedList{Kind: new("compute#diskAggregatedList"), Items: map[string]*computepb.DisksScopedList{}}
	for _, zone := range c.config.Zones {
		list.Items["zones/"+zone] = &computepb.DisksScopedList{Warning: noResults("zones/" + zone)}
	}
	paths, token, err := c.disks.page(c, c.project())
	for _, p := range paths {
		scope := list.Items["zones/"+zoneOf(p)]
		scope.Warning, scope.Disks = nil, append(scope.Disks, c.disks[p])
	}
	if token != "" {
		list.NextPageToken = &token
	}
	return list, err
}

func (c *call) insertDisk() (proto.Message, error) {
	if op := c.repeated(); op != nil {
		return op, nil
	}
	zone, err := c.zone()
	disk := new(computepb.Disk)
	if err := firstError(err, c.decode(disk)); err != nil {
		return nil, err
	}
	name, work, end, err := c.newDisk(zone, disk)
	if err != nil {
		return nil, err
	}
	return c.start(task{kind: "insert", target: name, id: disk.GetId(), work: work, end: end}), nil
}

// newDisk checks and records a disk that is to be made, which takes work, and ends
// with end. An instance may be made along with its disks.
func (c *call) newDisk(zone string, disk *computepb.Disk) (name string, work func(context.Context) error, end func(error) error, err error) {
	name = zone + "/disks/" + disk.GetName()
	if disk.Type == nil {
		disk.Type = new("zones/" + path.Base(zone) + "/diskTypes/pd-standard")
	}
	diskType := c.parseLink(*disk.Type)
	kind, ok := strings.CutPrefix(diskType, zone+"/diskTypes/")
	if _, known := metrics[kind]; !ok || !known {
		err = invalid("resource.type", disk.GetType(), "package gcp knows pd-standard, pd-balanced and pd-ssd, in the disk's own zone.")
	}
	if err := firstError(
		checkName("resource.name", disk.GetName()), checkLabels(disk.Labels), err, c.need("compute.disks.create", name),
	); err != nil {
		return "", nil, nil, err
	}
	if disk.SourceSnapshot != nil || disk.SourceDisk != nil || disk.Options != nil {
		return "", nil, nil, invalid("resource", disk.GetName(), "package gcp makes blank disks and disks from images only.")
	}
	if len(disk.Labels) > 0 {
		if err := c.need("compute.disks.setLabels", name); err != nil {
			return "", nil, nil, err
		}
	}
	if _, ok := c.disks[name]; ok {
		return "", nil, nil, alreadyExists(name)
	}
	source := ""
	least := int64(10)
	if disk.GetSourceImage() != "" {
		var image *computepb.Image
		if source, image, err = c.imageOf(disk.GetSourceImage()); err != nil {
			return "", nil, nil, err
		}
		least = image.GetDiskSizeGb()
		disk.SourceImage, disk.SourceImageId = image.SelfLink, new(idText(image.GetId()))
	}
	if disk.GetSizeGb() == 0 {
		disk.SizeGb = new(least)
		if source == "" {
			disk.SizeGb = new(int64(500))
		}
	}
	if size := disk.GetSizeGb(); size < least {
		what := "the minimum size"
		if source != "" {
			what = "the image size"
		}
		return "", nil, nil, invalid("resource.sizeGb", strconv.FormatInt(size, 10),
			fmt.Sprintf("Requested disk size cannot be smaller than %s (%d GB)", what, least))
	}
	disk.Kind, disk.Id, disk.SelfLink = new("compute#disk"), c.newID(), selfLink(name)
	disk.CreationTimestamp, disk.Status = c.timestamp(), new("CREATING")
	disk.Zone, disk.Type, disk.LabelFingerprint = selfLink(zone), selfLink(diskType), fingerprint(disk.Labels)
	disk.PhysicalBlockSizeBytes = new(int64(4096))
	c.disks[name] = disk
	work = func(ctx context.Context) error {
		return c.config.Hardware.CreateDisk(ctx, name, source, disk.GetSizeGb()<<30)
	}
	end = func(err error) error {
		if err == nil {
			if exceeded := c.checkQuota(c.project(), path.Base(zone), kind); exceeded != nil {
				err = exceeded
			}
		}
		if err != nil {
			delete(c.disks, name)
			return err
		}
		disk.Status = new("READY")
		return nil
	}
	return name, work, end, nil
}

func (c *call) deleteDisk() (proto.Message, error) {
	if op := c.repeated(); op != nil {
		return op, nil
	}
	name := c.diskPath()
	disk, err := c.disks.get(name)
	if err := firstError(c.need("compute.disks.delete", name), err); err != nil {
		return nil, err
	}
	if disk.GetStatus() != "READY" && disk.GetStatus() != "FAILED" {
		return nil, notReady(name)
	}
	if len(disk.Users) > 0 {
		return nil, inUse(name, c.parseLink(disk.Users[0]))
	}
	disk.Status = new("DELETING")
	return c.start(task{
		kind: "delete", target: name, id: disk.GetId(),
		work: func(ctx context.Context) error { return c.config.Hardware.DeleteDisk(ctx, name) },
		end: func(err error) error {
			if err != nil {
				disk.Status = new("READY")
				return err
			}
			delete(c.disks, name)
			return nil
		},
	}), nil
}

func (c *call) setDiskLabels() (proto.Message, error) {
	name, request := c.diskPath(), new(computepb.ZoneSetLabelsRequest)
	disk, err := c.disks.get(name)
	if err := firstError(c.need("compute.disks.setLabels", name), err, c.decode(request), checkLabels(request.Labels)); err != nil {
		return nil, err
	}
	if err := checkFingerprint("Labels", request.GetLabelFingerprint(), disk.LabelFingerprint); err != nil {
		return nil, err
	}
	return c.start(task{kind: "setLabels", target: name, id: disk.GetId(), end: func(err error) error {
		if err == nil {
			disk.Labels, disk.LabelFingerprint = request.Labels, fingerprint(request.Labels)
		}
		return err
	}}), nil
}

// attach records that an instance uses a disk. A disk has one user who writes or
// any number who read.
func (c *call) attach(instance string, a *computepb.AttachedDisk) error {
	name := c.parseLink(a.GetSource())
	disk, err := c.disks.get(name)
	if err != nil {
		return err
	}
	if zoneOf(name) != zoneOf(instance) {
		return invalid("resource.source", a.GetSource(), "The disk and the instance must be in the same zone.")
	}
	if disk.GetStatus() != "READY" && disk.GetStatus() != "CREATING" {
		return notReady(name)
	}
	permission := "compute.disks.use"
	if a.GetMode() == "READ_ONLY" {
		permission = "compute.disks.useReadOnly"
	}
	if err := c.need(permission, name); err != nil {
		return err
	}
	for _, link := range disk.Users {
		user := c.instances[c.parseLink(link)]
		i := slices.IndexFunc(user.Disks, func(other *computepb.AttachedDisk) bool { return c.parseLink(other.GetSource()) == name })
		if a.GetMode() != "READ_ONLY" || user.Disks[i].GetMode() != "READ_ONLY" {
			return inUse(name, c.parseLink(link))
		}
	}
	a.Source = disk.SelfLink
	disk.Users = append(disk.Users, *selfLink(instance))
	disk.LastAttachTimestamp = c.timestamp()
	return nil
}

// detach records that an instance no longer uses a disk.
func (c *call) detach(instance string, a *computepb.AttachedDisk) {
	disk, ok := c.disks[c.parseLink(a.GetSource())]
	if !ok {
		return
	}
	disk.Users = slices.DeleteFunc(disk.Users, func(u string) bool { return u == *selfLink(instance) })
	disk.LastDetachTimestamp = c.timestamp()
}
