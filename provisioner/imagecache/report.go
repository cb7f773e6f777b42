package imagecache

import (
	"bytes"
	"context"
	"fmt"

	"github.com/opencontainers/go-digest"

	"github.com/selkies-project/packer-plugin-selkies/htmlreport"
	"github.com/selkies-project/packer-plugin-selkies/manifest"
)

// report shows what the disk holds, while it is still there to ask how full it is.
func (b *build) report(ctx context.Context) error {
	if b.config.Report == "" {
		return nil
	}
	m, err := manifest.Decode(b.manifest)
	if err != nil {
		return err
	}
	space, err := diskSpace(ctx, b.vm, b.root)
	if err != nil {
		return err
	}
	r := htmlreport.Report{
		Manifest: m,
		Since:    b.former,
		NoSince:  "This is the first generation: the disk had no layer manifest that could be read.",
		Disk:     &space,
		Pulls:    map[digest.Digest]htmlreport.Pull{},
	}
	for _, w := range b.images {
		// Of an image that several repositories have each has been pulled.
		p := r.Pulls[w.image.Target().Digest]
		r.Pulls[w.image.Target().Digest] = htmlreport.Pull{Took: p.Took + w.pulled.Took, Bytes: p.Bytes + w.pulled.Bytes}
	}
	var page bytes.Buffer
	if err := r.Write(&page); err != nil {
		return fmt.Errorf("writing report: %w", err)
	}
	if err := writeLocal("report", b.config.Report, page.Bytes()); err != nil {
		return err
	}
	b.say("wrote %s, which shows what the disk holds", b.config.Report)
	return nil
}
