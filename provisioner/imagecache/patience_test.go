package imagecache

import (
	"errors"
	"fmt"
	"testing"
)

func TestMayPass(t *testing.T) {
	for err, want := range map[error]bool{
		errors.New("received unexpected HTTP status: 503 Service Unavailable"): true,
		errors.New("unexpected EOF"): true,
		errors.New("failed to register layer: archive/tar: invalid tar header"):               false,
		errors.New("unauthorized: authentication required"):                                   false,
		errors.New("the registry refused access (403 Forbidden); set registry_auth"):          false,
		errors.New("manifest for app@sha256:1 not found: manifest unknown: manifest unknown"): false,
		fmt.Errorf("writing: %w", errDiskFull):                                                false,
		fmt.Errorf("running dd: %w", errLost):                                                 false,
	} {
		if got := mayPass(err); got != want {
			t.Errorf("%v: %t", err, got)
		}
	}
}
