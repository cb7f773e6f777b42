package host

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"
)

// Profile is a kind of network disk: how long it takes to answer a request, however many
// there are at once, and how many bytes a second it gives.
type Profile struct {
	Delay time.Duration
	Rate  int64
}

// slowAhead is how many KiB the kernel reads ahead from a disk that asks for nothing else,
// as Compute Engine's do not. A loop device takes over what its file's disk asks for.
const slowAhead = "128"

// AttachSlow attaches a disk image with a profile, read-only or, with what is written to
// it kept elsewhere, for writing.
func AttachSlow(ctx context.Context, image string, p Profile, readOnly bool) (*NBD, error) {
	source := []string{"--command", "nbdkit", "-s", "--threads=64", "--filter=delay", "--filter=rate"}
	if readOnly {
		source = append(source, "-r")
	} else {
		source = append(source, "--filter=cow")
	}
	// nbdkit's rate is in bits, and what it gives at once after a pause is two seconds' worth
	// by default.
	source = append(source, "file", image, fmt.Sprintf("rdelay=%dms", p.Delay.Milliseconds()), fmt.Sprintf("rate=%d", 8*p.Rate), "burstiness=0.02")
	d, err := AttachNBD(ctx, readOnly, true, source...)
	if err != nil {
		return nil, err
	}
	if err := os.WriteFile(filepath.Join("/sys/block", filepath.Base(d.Path), "queue/read_ahead_kb"), []byte(slowAhead), 0); err != nil {
		return nil, errors.Join(err, d.Close())
	}
	return d, nil
}
