//go:build e2e

package pipeline_test

import (
	"context"
	"fmt"
	"net"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"cloud.google.com/go/compute/apiv1/computepb"
	"github.com/container-storage-interface/spec/lib/go/csi"
	"google.golang.org/grpc"
	storagev1 "k8s.io/api/storage/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	registerapi "k8s.io/kubelet/pkg/apis/pluginregistration/v1"

	"github.com/selkies-project/packer-plugin-selkies/e2e/cluster"
	"github.com/selkies-project/packer-plugin-selkies/e2e/gcp"
)

// driver is Google's driver for persistent disks. What stands in for it here attaches
// disks through Compute Engine's API and mounts them where kubelet wants them.
const driver = "pd.csi.storage.gke.io"

// nodeDriver is the half of the driver that runs on a node.
type nodeDriver struct {
	csi.UnimplementedIdentityServer
	csi.UnimplementedNodeServer
	registerapi.UnimplementedRegistrationServer
	node *cluster.Node
	zone string
}

// serveDisks makes a node an instance that disks can be attached to and mounted on.
func (c *cloud) serveDisks(t *testing.T, n *cluster.Node, zone string) {
	t.Helper()
	c.AddInstance(project, zone, n.Name)
	c.hardware.Adopt("projects/"+project+"/zones/"+zone+"/instances/"+n.Name, n.Machine)

	d := &nodeDriver{node: n, zone: zone}
	server := grpc.NewServer()
	csi.RegisterIdentityServer(server, d)
	csi.RegisterNodeServer(server, d)
	registerapi.RegisterRegistrationServer(server, d)
	t.Cleanup(server.Stop)
	// kubelet finds the driver by the second socket.
	for _, socket := range []string{d.socket(), "/var/lib/kubelet/plugins_registry/" + driver + "-reg.sock"} {
		file := n.Path(socket)
		if err := os.MkdirAll(filepath.Dir(file), 0o755); err != nil {
			t.Fatal(err)
		}
		l, err := net.Listen("unix", file)
		if err != nil {
			t.Fatal(err)
		}
		go func() { _ = server.Serve(l) }()
	}
}

func (d *nodeDriver) socket() string { return "/var/lib/kubelet/plugins/" + driver + "/csi.sock" }

func (d *nodeDriver) GetInfo(context.Context, *registerapi.InfoRequest) (*registerapi.PluginInfo, error) {
	return &registerapi.PluginInfo{Type: registerapi.CSIPlugin, Name: driver, Endpoint: d.socket(), SupportedVersions: []string{"1.0.0"}}, nil
}

func (d *nodeDriver) NotifyRegistrationStatus(context.Context, *registerapi.RegistrationStatus) (*registerapi.RegistrationStatusResponse, error) {
	return &registerapi.RegistrationStatusResponse{}, nil
}

func (d *nodeDriver) GetPluginInfo(context.Context, *csi.GetPluginInfoRequest) (*csi.GetPluginInfoResponse, error) {
	return &csi.GetPluginInfoResponse{Name: driver, VendorVersion: "1"}, nil
}

func (d *nodeDriver) Probe(context.Context, *csi.ProbeRequest) (*csi.ProbeResponse, error) {
	return &csi.ProbeResponse{}, nil
}

func (d *nodeDriver) NodeGetInfo(context.Context, *csi.NodeGetInfoRequest) (*csi.NodeGetInfoResponse, error) {
	return &csi.NodeGetInfoResponse{
		NodeId:             "projects/" + project + "/zones/" + d.zone + "/instances/" + d.node.Name,
		AccessibleTopology: &csi.Topology{Segments: map[string]string{"topology.gke.io/zone": d.zone}},
	}, nil
}

func (d *nodeDriver) NodeGetCapabilities(context.Context, *csi.NodeGetCapabilitiesRequest) (*csi.NodeGetCapabilitiesResponse, error) {
	return &csi.NodeGetCapabilitiesResponse{}, nil
}

func (d *nodeDriver) NodePublishVolume(ctx context.Context, r *csi.NodePublishVolumeRequest) (*csi.NodePublishVolumeResponse, error) {
	mount := r.VolumeCapability.GetMount()
	options := mount.MountFlags
	if r.Readonly {
		options = append(options, "ro")
	}
	_, err := d.node.Run(ctx, "sh", "-ec", `mkdir -p "$3"; mountpoint -q "$3" || mount -t "$1" -o "$2" "$4" "$3"`, "publish",
		mount.FsType, strings.Join(options, ","), r.TargetPath, "/dev/disk/by-id/google-"+path.Base(r.VolumeId))
	return &csi.NodePublishVolumeResponse{}, err
}

func (d *nodeDriver) NodeUnpublishVolume(ctx context.Context, r *csi.NodeUnpublishVolumeRequest) (*csi.NodeUnpublishVolumeResponse, error) {
	_, err := d.node.Run(ctx, "sh", "-ec", `! mountpoint -q "$1" || umount "$1"; rm -d -f "$1"`, "unpublish", r.TargetPath)
	return &csi.NodeUnpublishVolumeResponse{}, err
}

// attachVolumes is the half of the driver that runs beside the API server: it attaches
// and detaches disks as the controller manager wants them.
func (c *cloud) attachVolumes(t *testing.T) {
	t.Helper()
	objects := world.Client.StorageV1()
	if _, err := objects.CSIDrivers().Create(t.Context(), &storagev1.CSIDriver{
		ObjectMeta: metav1.ObjectMeta{Name: driver},
		Spec:       storagev1.CSIDriverSpec{AttachRequired: new(true), PodInfoOnMount: new(false)},
	}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := objects.CSIDrivers().Delete(context.Background(), driver, metav1.DeleteOptions{}); err != nil {
			t.Error(err)
		}
	})
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	t.Cleanup(func() { cancel(); <-done })
	a := &attacher{cloud: c, google: c.Clients(t), handles: map[string]string{}}
	go func() {
		defer close(done)
		tick := time.NewTicker(200 * time.Millisecond)
		defer tick.Stop()
		for ctx.Err() == nil {
			if err := a.look(ctx); err != nil && ctx.Err() == nil {
				t.Logf("attaching volumes, to be tried again: %v", err)
			}
			select {
			case <-tick.C:
			case <-ctx.Done():
			}
		}
	}()
}

type attacher struct {
	*cloud
	google  *gcp.Clients
	handles map[string]string // of volumes' disks, by attachment: a volume may go first
}

// finalizer keeps an attachment until the disk is detached.
const finalizer = "external-attacher/pd-csi-storage-gke-io"

func (a *attacher) look(ctx context.Context) error {
	attachments := world.Client.StorageV1().VolumeAttachments()
	list, err := attachments.List(ctx, metav1.ListOptions{})
	if err != nil {
		return err
	}
	for _, v := range list.Items {
		if v.Spec.Attacher != driver {
			continue
		}
		switch has := slices.Contains(v.Finalizers, finalizer); {
		case v.DeletionTimestamp == nil && !has:
			pv, err := world.Client.CoreV1().PersistentVolumes().Get(ctx, *v.Spec.Source.PersistentVolumeName, metav1.GetOptions{})
			if err != nil {
				return err
			}
			a.handles[v.Name] = pv.Spec.CSI.VolumeHandle
			v.Finalizers = append(v.Finalizers, finalizer)
			if _, err := attachments.Update(ctx, &v, metav1.UpdateOptions{}); err != nil {
				return err
			}
		case v.DeletionTimestamp == nil && !v.Status.Attached:
			if err := a.attach(ctx, a.handles[v.Name], v.Spec.NodeName); err != nil {
				return err
			}
			v.Status.Attached = true
			if _, err := attachments.UpdateStatus(ctx, &v, metav1.UpdateOptions{}); err != nil {
				return err
			}
		case v.DeletionTimestamp != nil && has:
			if err := a.detach(ctx, a.handles[v.Name], v.Spec.NodeName); err != nil {
				return err
			}
			v.Finalizers = slices.DeleteFunc(v.Finalizers, func(f string) bool { return f == finalizer })
			if _, err := attachments.Update(ctx, &v, metav1.UpdateOptions{}); err != nil {
				return err
			}
		}
	}
	return nil
}

// zoneAndDisk are those of "projects/P/zones/Z/disks/D".
func zoneAndDisk(handle string) (zone, disk string) {
	parts := strings.Split(handle, "/")
	return parts[3], parts[5]
}

func (a *attacher) attach(ctx context.Context, handle, node string) error {
	zone, disk := zoneAndDisk(handle)
	op, err := a.google.Instances.AttachDisk(ctx, &computepb.AttachDiskInstanceRequest{Project: project, Zone: zone, Instance: node,
		AttachedDiskResource: &computepb.AttachedDisk{Source: &handle, DeviceName: &disk, Mode: new("READ_ONLY")}})
	if err == nil {
		err = op.Wait(ctx)
	}
	if err != nil {
		return fmt.Errorf("attaching %s to %s: %w", disk, node, err)
	}
	return nil
}

func (a *attacher) detach(ctx context.Context, handle, node string) error {
	zone, disk := zoneAndDisk(handle)
	if !slices.Contains(a.Resources(), "projects/"+project+"/zones/"+zone+"/instances/"+node) {
		return nil // gone, with its attachments
	}
	op, err := a.google.Instances.DetachDisk(ctx, &computepb.DetachDiskInstanceRequest{Project: project, Zone: zone, Instance: node, DeviceName: disk})
	if err == nil {
		err = op.Wait(ctx)
	}
	if err != nil {
		return fmt.Errorf("detaching %s from %s: %w", disk, node, err)
	}
	return nil
}
