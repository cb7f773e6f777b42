package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/containerd/containerd/v2/core/leases"
	"github.com/containerd/containerd/v2/core/metadata"
	"github.com/containerd/containerd/v2/core/snapshots"
	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/containerd/v2/plugins/snapshots/overlay"

	"github.com/selkies-project/packer-plugin-selkies/manifest"
)

// calls times what containerd itself does for the layers of m, by its own code in this
// process, one call after the other: no gRPC, no daemon beside it, no links, no images.
func calls(dir string, m *manifest.Manifest) (took time.Duration, err error) {
	root := filepath.Join(dir, "calls")
	if err := os.Mkdir(root, 0o700); err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(root)) }()
	overlayfs, err := overlay.NewSnapshotter(filepath.Join(root, "snapshots"))
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, overlayfs.Close()) }()
	bolt, err := openFloor(filepath.Join(root, "meta.db"))
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, bolt.Close()) }()
	db := metadata.NewDB(bolt, nil, map[string]snapshots.Snapshotter{"overlayfs": overlayfs})
	ctx := namespaces.WithNamespace(context.Background(), "k8s.io")
	if err := db.Init(ctx); err != nil {
		return 0, err
	}
	lease, err := metadata.NewLeaseManager(db).Create(ctx, leases.WithRandomID())
	if err != nil {
		return 0, err
	}
	ctx = leases.WithLease(ctx, lease.ID)
	sn := db.Snapshotter("overlayfs")
	began := time.Now()
	for _, l := range m.Layers {
		name := l.ChainID.String()
		ref := snapshots.WithLabels(map[string]string{snapshots.LabelSnapshotRef: name})
		if _, err := sn.Prepare(ctx, "bench/"+name, l.Parent.String(), ref); err != nil {
			return 0, fmt.Errorf("preparing %s: %w", name, err)
		}
		if err := sn.Commit(ctx, name, "bench/"+name, ref); err != nil {
			return 0, fmt.Errorf("committing %s: %w", name, err)
		}
	}
	return time.Since(began), nil
}
