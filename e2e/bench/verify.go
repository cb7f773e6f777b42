package main

import (
	"context"
	"encoding/json"
	"fmt"
	"path/filepath"
	"runtime"
	"strconv"

	"github.com/selkies-project/packer-plugin-selkies/injector/report"
)

// proof is how long verify takes for a disk that is in the page cache, next to hashing and
// to reading the same files, as many at once as there are processors.
type proof struct {
	s    *session
	disk *attached

	verified, hashed, read, bytes series
}

func newProof(s *session) benchmark { return &proof{s: s} }

func (p *proof) prepare(ctx context.Context) error {
	n, err := p.s.containerd()
	if err != nil {
		return err
	}
	d, err := p.s.desktopDisk()
	if err != nil {
		return err
	}
	if p.disk, err = p.s.attach(n, d); err != nil {
		return err
	}
	_, err = p.files(ctx, "cat")
	return err
}

func (p *proof) round(ctx context.Context) error {
	for program, s := range map[string]*series{"cat": &p.read, "sha256sum": &p.hashed} {
		took, err := p.files(ctx, program)
		if err != nil {
			return err
		}
		s.add(took)
	}
	out, took, err := p.disk.node.timed(ctx, "selkies-image-injector", "verify", "--log-level=warn", "--output=json", "--cache", p.disk.dir)
	if err != nil {
		return err
	}
	var r []report.Verify
	if err := json.Unmarshal([]byte(out), &r); err != nil {
		return fmt.Errorf("decoding verify's report: %w", err)
	}
	p.verified.took(took)
	p.bytes.add(float64(r[0].Bytes))
	return nil
}

// files has a program read every file of the disk's layers, and gives the seconds.
func (p *proof) files(ctx context.Context, program string) (float64, error) {
	store := filepath.Join(p.disk.dir, p.disk.manifest.Store.Root, "overlay2")
	_, took, err := p.disk.node.timed(ctx, "sh", "-ec", "find "+store+" -path '*/diff/*' -type f -print0 | xargs -0 -n 64 -P "+
		strconv.Itoa(runtime.NumCPU())+" "+program+" >/dev/null")
	return took.Seconds(), err
}

func (p *proof) figures() []figure {
	return []figure{
		{name: "bytes verified", unit: bytes, runs: p.bytes},
		{name: "verify", unit: seconds, runs: p.verified, ratios: []ratio{
			{"sha256sum of the same files", 0, p.verified.over(p.hashed)},
			{"reading the same files", 0, p.verified.over(p.read)},
		}},
	}
}
