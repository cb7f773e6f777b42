package main

import (
	"context"
	"fmt"
	"time"

	"github.com/selkies-project/packer-plugin-selkies/e2e/host"
)

// profile is a kind of network disk: how long it takes to answer a request, however many
// there are at once, and how many bytes a second it gives.
type profile struct {
	delay time.Duration
	rate  int64
}

// attachSlow attaches a disk image with a profile, read-only or, with what is written to
// it kept elsewhere, for writing.
func attachSlow(ctx context.Context, image string, p profile, readOnly bool) (*host.NBD, error) {
	source := []string{"--command", "nbdkit", "-s", "--threads=64", "--filter=delay", "--filter=rate"}
	if readOnly {
		source = append(source, "-r")
	} else {
		source = append(source, "--filter=cow")
	}
	// nbdkit's rate is in bits, and what it gives at once after a pause is two seconds' worth
	// by default.
	source = append(source, "file", image, fmt.Sprintf("rdelay=%dms", p.delay.Milliseconds()), fmt.Sprintf("rate=%d", 8*p.rate), "burstiness=0.02")
	return host.AttachNBD(ctx, readOnly, true, source...)
}
