package main

import (
	"context"
	"encoding/json"
	"fmt"
	"path/filepath"
	"runtime"
	"strconv"
	"time"

	"github.com/selkies-project/packer-plugin-selkies/injector/report"
)

// verification is how long verify takes for a disk that is in the page cache, next to
// hashing and to reading the same files, as many at once as there are processors.
type verification struct {
	s    *session
	disk *attached

	verified, hashed, read, bytes series
}

func newVerification(s *session) benchmark { return &verification{s: s} }

func (v *verification) prepare(context.Context) error {
	n, err := v.s.containerd()
	if err != nil {
		return err
	}
	d, err := v.s.desktopDisk()
	if err != nil {
		return err
	}
	v.disk, err = v.s.attach(n, d)
	return err
}

func (v *verification) round(ctx context.Context) error {
	// Other benchmarks have dropped it from the page cache.
	if _, err := v.files(ctx, "cat"); err != nil {
		return err
	}
	for _, p := range []struct {
		program string
		*series
	}{{"cat", &v.read}, {"sha256sum", &v.hashed}} {
		took, err := v.files(ctx, p.program)
		if err != nil {
			return err
		}
		p.took(took)
	}
	out, took, err := v.disk.node.timed(ctx, "selkies-image-injector", "verify", "--log-level=warn", "--output=json", "--cache", v.disk.dir)
	if err != nil {
		return err
	}
	var r []report.Verify
	if err := json.Unmarshal([]byte(out), &r); err != nil {
		return fmt.Errorf("decoding verify's report: %w", err)
	}
	v.verified.took(took)
	v.bytes.add(float64(r[0].Bytes))
	return nil
}

// files has a program read every file of the disk's layers.
func (v *verification) files(ctx context.Context, program string) (time.Duration, error) {
	store := filepath.Join(v.disk.dir, v.disk.manifest.Store.Root, "overlay2")
	_, took, err := v.disk.node.timed(ctx, "sh", "-ec", "find "+store+" -path '*/diff/*' -type f -print0 | xargs -0 -n 64 -P "+
		strconv.Itoa(runtime.NumCPU())+" "+program+" >/dev/null")
	return took, err
}

func (v *verification) figures() []figure {
	return []figure{
		{name: "bytes verified", unit: bytes, runs: v.bytes},
		{name: "verify", unit: seconds, runs: v.verified, ratios: []ratio{
			{"sha256sum of the same files", 0, v.verified.over(v.hashed)},
			{"reading the same files", 0, v.verified.over(v.read)},
		}},
	}
}
