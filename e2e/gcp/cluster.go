package gcp

import (
	"net/http"
	"path"
	"slices"
	"strings"

	"cloud.google.com/go/container/apiv1/containerpb"
	"google.golang.org/protobuf/proto"
)

func (s *Server) serveClusters() {
	const clusters = "/v1/projects/{project}/locations/{location}/clusters"
	s.handle("clusters.list", "GET "+clusters, (*call).listClusters)
	s.handle("clusters.get", "GET "+clusters+"/{cluster}", (*call).getCluster)
}

// AddCluster adds a GKE cluster of a project, in place of one of the same name. Location
// is a region, or a zone; Locations are the zones of its nodes. The endpoint is what
// follows "https://".
func (s *Server) AddCluster(project string, cluster *containerpb.Cluster) {
	s.mu.Lock()
	defer s.mu.Unlock()
	cluster = proto.CloneOf(cluster)
	cluster.SelfLink = "https://container.googleapis.com/v1/projects/" + project + "/locations/" + cluster.Location + "/clusters/" + cluster.Name
	if cluster.Status == containerpb.Cluster_STATUS_UNSPECIFIED {
		cluster.Status = containerpb.Cluster_RUNNING
	}
	s.clusters = slices.DeleteFunc(s.clusters, func(c *containerpb.Cluster) bool { return c.SelfLink == cluster.SelfLink })
	s.clusters = append(s.clusters, cluster)
}

// clusterPath is the path of a cluster, "projects/p/locations/l/clusters/c".
func clusterPath(c *containerpb.Cluster) string {
	_, p, _ := strings.Cut(c.SelfLink, "/v1/")
	return p
}

// needCluster is need with the words of GKE's API.
func (c *call) needCluster(permission, resource string) error {
	if err := c.need(permission, resource); err == nil {
		return nil
	}
	return &Error{Code: http.StatusForbidden, Reason: "forbidden", Status: "PERMISSION_DENIED",
		Message: `Required "` + permission + `" permission(s) for "` + resource + `".`}
}

func (c *call) listClusters() (proto.Message, error) {
	if err := c.needCluster("container.clusters.list", c.project()); err != nil {
		return nil, err
	}
	answer := new(containerpb.ListClustersResponse)
	for _, cluster := range c.clusters {
		ok, err := path.Match(strings.Replace(c.project()+"/locations/"+c.PathValue("location")+"/clusters/*", "/-/", "/*/", 1), clusterPath(cluster))
		if err != nil {
			return nil, err
		}
		if ok {
			answer.Clusters = append(answer.Clusters, cluster)
		}
	}
	return answer, nil
}

func (c *call) getCluster() (proto.Message, error) {
	p := c.project() + "/locations/" + c.PathValue("location") + "/clusters/" + c.PathValue("cluster")
	if err := c.needCluster("container.clusters.get", p); err != nil {
		return nil, err
	}
	for _, cluster := range c.clusters {
		if clusterPath(cluster) == p {
			return cluster, nil
		}
	}
	return nil, &Error{Code: http.StatusNotFound, Reason: "notFound", Status: "NOT_FOUND", Message: "Not found: " + p + "."}
}
