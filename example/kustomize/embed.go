// Package kustomize embeds these manifests for the post-processor, which rolls out
// the same objects that kubectl apply -k does.
package kustomize

import "embed"

// Files are the manifests, with their kustomizations.
//
//go:embed base pvc/zonal-disk
var Files embed.FS
