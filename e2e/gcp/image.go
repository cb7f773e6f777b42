package gcp

import (
	"context"
	"path"
	"slices"
	"strings"

	"cloud.google.com/go/compute/apiv1/computepb"
	"google.golang.org/protobuf/proto"
)

func (s *Server) serveImages() {
	const images = "/compute/v1/projects/{project}/global/images"
	s.handle("images.list", "GET "+images, (*call).listImages)
	s.handle("images.insert", "POST "+images, (*call).insertImage)
	s.handle("images.get", "GET "+images+"/{image}", (*call).getImage)
	s.handle("images.getFromFamily", "GET "+images+"/family/{family}", (*call).getImageFromFamily)
	s.handle("images.delete", "DELETE "+images+"/{image}", (*call).deleteImage)
	s.handle("images.setLabels", "POST "+images+"/{image}/setLabels", (*call).setImageLabels)
	s.handle("images.deprecate", "POST "+images+"/{image}/deprecate", (*call).deprecateImage)
}

// AddImage adds an image that is there from the beginning, such as a public one.
// Hardware has no contents for it: only a boot disk can be made from it.
func (s *Server) AddImage(project string, image *computepb.Image) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.addImage("projects/"+project+"/global/images/"+image.GetName(), proto.CloneOf(image))
	image = s.images["projects/"+project+"/global/images/"+image.GetName()]
	image.Status = new("READY")
	if image.DiskSizeGb == nil {
		image.DiskSizeGb = new(int64(10))
	}
}

func (s *Server) addImage(name string, image *computepb.Image) {
	image.Kind, image.Id, image.SelfLink = new("compute#image"), s.newID(), selfLink(name)
	image.CreationTimestamp, image.Status = s.timestamp(), new("PENDING")
	image.LabelFingerprint, image.SourceType = fingerprint(image.Labels), new("RAW")
	s.images[name] = image
}

func (c *call) imagePath() string { return c.project() + "/global/images/" + c.PathValue("image") }

func (c *call) getImage() (proto.Message, error) {
	name := c.imagePath()
	if err := c.need("compute.images.get", name); err != nil {
		return nil, err
	}
	return c.images.get(name)
}

func (c *call) getImageFromFamily() (proto.Message, error) {
	family := c.project() + "/global/images/family/" + c.PathValue("family")
	if err := c.need("compute.images.getFromFamily", family); err != nil {
		return nil, err
	}
	return c.findImage(family)
}

// findImage is the image of a path, which may be that of a family: then the newest
// one that is not deprecated.
func (c *call) findImage(name string) (*computepb.Image, error) {
	project, family, ok := strings.Cut(name, "/global/images/family/")
	if !ok {
		return c.images.get(name)
	}
	var newest *computepb.Image
	for p, i := range c.images {
		state := i.GetDeprecated().GetState()
		if inProject(p, project) && i.GetFamily() == family && i.GetStatus() == "READY" && (state == "" || state == "ACTIVE") &&
			(newest == nil || age(i) < age(newest)) {
			newest = i
		}
	}
	if newest == nil {
		return nil, notFound(name)
	}
	return newest, nil
}

func (c *call) listImages() (proto.Message, error) {
	if err := c.need("compute.images.list", c.project()); err != nil {
		return nil, err
	}
	list := &computepb.ImageList{Kind: new("compute#imageList")}
	paths, token, err := c.images.page(c, c.project()+"/global/images")
	for _, p := range paths {
		list.Items = append(list.Items, c.images[p])
	}
	if token != "" {
		list.NextPageToken = &token
	}
	return list, err
}

func (c *call) insertImage() (proto.Message, error) {
	if op := c.repeated(); op != nil {
		return op, nil
	}
	image := new(computepb.Image)
	if err := c.decode(image); err != nil {
		return nil, err
	}
	name := c.project() + "/global/images/" + image.GetName()
	source := c.parseLink(image.GetSourceDisk())
	if err := firstError(
		checkName("resource.name", image.GetName()), checkLabels(image.Labels),
		c.need("compute.images.create", name), c.need("compute.disks.useReadOnly", source),
	); err != nil {
		return nil, err
	}
	if _, ok := c.images[name]; ok {
		return nil, alreadyExists(name)
	}
	if image.SourceDisk == nil {
		return nil, invalid("resource.sourceDisk", "", "package gcp makes images from disks only.")
	}
	disk, err := c.disks.get(source)
	if err != nil {
		return nil, err
	}
	if disk.GetStatus() != "READY" {
		return nil, notReady(source)
	}
	if len(disk.Users) > 0 && c.FormValue("forceCreate") != "true" {
		return nil, inUse(source, c.parseLink(disk.Users[0]))
	}
	image.SourceDisk, image.DiskSizeGb = disk.SelfLink, disk.SizeGb
	image.SourceDiskId = new(idText(disk.GetId()))
	c.addImage(name, image)
	return c.start(task{
		kind: "insert", target: name, id: image.GetId(),
		work: func(ctx context.Context) error { return c.config.Hardware.CreateImage(ctx, name, source) },
		end: func(err error) error {
			if err != nil {
				delete(c.images, name)
				return err
			}
			image.Status = new("READY")
			return nil
		},
	}), nil
}

func (c *call) deleteImage() (proto.Message, error) {
	if op := c.repeated(); op != nil {
		return op, nil
	}
	name := c.imagePath()
	image, err := c.images.get(name)
	if err := firstError(c.need("compute.images.delete", name), err); err != nil {
		return nil, err
	}
	if image.GetStatus() != "READY" {
		return nil, notReady(name)
	}
	image.Status = new("DELETING")
	return c.start(task{
		kind: "delete", target: name, id: image.GetId(),
		work: func(ctx context.Context) error { return c.config.Hardware.DeleteImage(ctx, name) },
		end: func(err error) error {
			if err != nil {
				image.Status = new("READY")
				return err
			}
			delete(c.images, name)
			return nil
		},
	}), nil
}

func (c *call) setImageLabels() (proto.Message, error) {
	name, request := c.imagePath(), new(computepb.GlobalSetLabelsRequest)
	image, err := c.images.get(name)
	if err := firstError(c.need("compute.images.setLabels", name), err, c.decode(request), checkLabels(request.Labels)); err != nil {
		return nil, err
	}
	if err := checkFingerprint("Labels", request.GetLabelFingerprint(), image.LabelFingerprint); err != nil {
		return nil, err
	}
	return c.start(task{kind: "setLabels", target: name, id: image.GetId(), end: func(err error) error {
		if err == nil {
			image.Labels, image.LabelFingerprint = request.Labels, fingerprint(request.Labels)
		}
		return err
	}}), nil
}

func (c *call) deprecateImage() (proto.Message, error) {
	name, status := c.imagePath(), new(computepb.DeprecationStatus)
	image, err := c.images.get(name)
	if err := firstError(c.need("compute.images.deprecate", name), err, c.decode(status)); err != nil {
		return nil, err
	}
	states := []string{"", "ACTIVE", "DEPRECATED", "OBSOLETE", "DELETED"}
	if !slices.Contains(states, status.GetState()) {
		return nil, invalid("resource.state", status.GetState(), "Must be one of "+strings.Join(states[1:], ", ")+".")
	}
	return c.start(task{kind: "deprecate", target: name, id: image.GetId(), end: func(err error) error {
		if err == nil {
			image.Deprecated = status
		}
		return err
	}}), nil
}

// imageOf is the image that a new disk is made from.
func (c *call) imageOf(link string) (name string, image *computepb.Image, err error) {
	image, err = c.findImage(c.parseLink(link))
	if err != nil {
		return "", nil, err
	}
	name = path.Join(c.parseLink(image.GetSelfLink()))
	if err := c.need("compute.images.useReadOnly", name); err != nil {
		return "", nil, err
	}
	if image.GetStatus() != "READY" {
		return "", nil, notReady(name)
	}
	if state := image.GetDeprecated().GetState(); state == "OBSOLETE" || state == "DELETED" {
		return "", nil, invalid("resource.sourceImage", name, "The image is "+strings.ToLower(state)+".")
	}
	return name, image, nil
}
