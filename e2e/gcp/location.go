package gcp

import (
	"path"
	"slices"
	"strconv"
	"strings"

	"cloud.google.com/go/compute/apiv1/computepb"
	"google.golang.org/protobuf/proto"
)

func (s *Server) serveLocations() {
	const project = "/compute/v1/projects/{project}"
	s.handle("projects.get", "GET "+project, (*call).getProject)
	s.handle("zones.list", "GET "+project+"/zones", (*call).listZones)
	s.handle("zones.get", "GET "+project+"/zones/{zone}", (*call).getZone)
	s.handle("regions.list", "GET "+project+"/regions", (*call).listRegions)
	s.handle("regions.get", "GET "+project+"/regions/{region}", (*call).getRegion)
	s.handle("machineTypes.get", "GET "+project+"/zones/{zone}/machineTypes/{type}", (*call).getMachineType)
}

func (c *call) getProject() (proto.Message, error) {
	if err := c.need("compute.projects.get", c.project()); err != nil {
		return nil, err
	}
	return &computepb.Project{
		Kind: new("compute#project"), Name: new(c.PathValue("project")), SelfLink: selfLink(c.project()),
		CommonInstanceMetadata: &computepb.Metadata{Kind: new("compute#metadata"), Fingerprint: fingerprint(nil)},
	}, nil
}

// region is the region of a zone.
func region(zone string) string { return zone[:strings.LastIndex(zone, "-")] }

// zoneOf is the zone in the path of a resource.
func zoneOf(p string) string { return strings.Split(p, "/")[3] }

func (c *call) zoneRecord(name string) *computepb.Zone {
	return &computepb.Zone{
		Kind: new("compute#zone"), Name: &name, SelfLink: selfLink(c.project() + "/zones/" + name),
		Region: selfLink(c.project() + "/regions/" + region(name)), Status: new("UP"),
	}
}

func (c *call) getZone() (proto.Message, error) {
	p := c.project() + "/zones/" + c.PathValue("zone")
	if err := c.need("compute.zones.get", p); err != nil {
		return nil, err
	}
	if !slices.Contains(c.config.Zones, path.Base(p)) {
		return nil, notFound(p)
	}
	return c.zoneRecord(path.Base(p)), nil
}

func (c *call) listZones() (proto.Message, error) {
	if err := c.need("compute.zones.list", c.project()); err != nil {
		return nil, err
	}
	list := &computepb.ZoneList{Kind: new("compute#zoneList")}
	records := table[*computepb.Zone]{}
	for _, z := range c.config.Zones {
		records[c.project()+"/zones/"+z] = c.zoneRecord(z)
	}
	paths, token, err := records.page(c, c.project()+"/zones")
	for _, p := range paths {
		list.Items = append(list.Items, records[p])
	}
	if token != "" {
		list.NextPageToken = &token
	}
	return list, err
}

func (c *call) regions() table[*computepb.Region] {
	records := table[*computepb.Region]{}
	for _, z := range c.config.Zones {
		p := c.project() + "/regions/" + region(z)
		if records[p] == nil {
			records[p] = &computepb.Region{Kind: new("compute#region"), Name: new(region(z)), SelfLink: selfLink(p), Status: new("UP")}
			for _, q := range c.quotas {
				if q.project == c.project() && q.region == region(z) {
					records[p].Quotas = append(records[p].Quotas, &computepb.Quota{
						Metric: new(q.metric), Limit: new(float64(q.limit)), Usage: new(float64(c.usage(q))),
					})
				}
			}
		}
		records[p].Zones = append(records[p].Zones, *selfLink(c.project() + "/zones/" + z))
	}
	return records
}

func (c *call) getRegion() (proto.Message, error) {
	p := c.project() + "/regions/" + c.PathValue("region")
	if err := c.need("compute.regions.get", p); err != nil {
		return nil, err
	}
	return c.regions().get(p)
}

func (c *call) listRegions() (proto.Message, error) {
	if err := c.need("compute.regions.list", c.project()); err != nil {
		return nil, err
	}
	list := &computepb.RegionList{Kind: new("compute#regionList")}
	records := c.regions()
	paths, token, err := records.page(c, c.project()+"/regions")
	for _, p := range paths {
		list.Items = append(list.Items, records[p])
	}
	if token != "" {
		list.NextPageToken = &token
	}
	return list, err
}

// getMachineType knows every name that has the form of a predefined machine type.
func (c *call) getMachineType() (proto.Message, error) {
	zone, err := c.zone()
	if err != nil {
		return nil, err
	}
	p := zone + "/machineTypes/" + c.PathValue("type")
	if err := c.need("compute.machineTypes.get", p); err != nil {
		return nil, err
	}
	parts := strings.Split(path.Base(p), "-")
	cpus, err := strconv.Atoi(parts[len(parts)-1])
	if len(parts) != 3 || err != nil {
		return nil, notFound(p)
	}
	return &computepb.MachineType{
		Kind: new("compute#machineType"), Name: new(path.Base(p)), SelfLink: selfLink(p),
		Zone: new(path.Base(zone)), GuestCpus: new(int32(cpus)), MemoryMb: new(int32(cpus * 4096)),
	}, nil
}
