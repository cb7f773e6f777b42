package containerd

import (
	"context"
	"fmt"
	"slices"

	"github.com/containerd/containerd/v2/core/images"
	"github.com/containerd/platforms"
	"github.com/distribution/reference"
	"github.com/opencontainers/go-digest"
	"github.com/opencontainers/image-spec/identity"

	"github.com/selkies-project/packer-plugin-selkies/injector/cachedisk"
	"github.com/selkies-project/packer-plugin-selkies/injector/report"
)

// Plan says of each reference, as a pod would name it, whether a container of it
// starts without a pull once inject has run.
func (r *Runtime) Plan(ctx context.Context, disks []*cachedisk.Disk, refs []string) ([]report.Reference, error) {
	ctx = r.context(ctx)
	disks = cachedisk.NewestFirst(disks)
	s, err := r.survey(ctx)
	if err != nil {
		return nil, err
	}
	jobs, err := r.jobs(s, disks, report.InjectOptions{})
	if err != nil {
		return nil, err
	}
	answers := []report.Reference{}
	for _, ref := range refs {
		answers = append(answers, r.plan(ctx, s, disks, jobs, ref))
	}
	return answers, nil
}

func (r *Runtime) plan(ctx context.Context, s *survey, disks []*cachedisk.Disk, jobs []*job, ref string) report.Reference {
	answer := report.Reference{Reference: ref, Cover: report.Miss}
	named, err := reference.ParseNormalizedNamed(ref)
	if err != nil {
		answer.Reason = fmt.Sprintf("not a reference: %v", err)
		return answer
	}
	name := lookupName(named)
	for _, j := range jobs {
		if !slices.Contains(j.image.Names, name) || !j.serves(s, name) {
			continue
		}
		answer.Cover, answer.Layers, answer.Cached = report.Hit, len(j.chain), len(j.chain)
		answer.Reason = "registered from cache " + report.Short(j.disk.ID)
		if !j.done() {
			answer.Reason = "inject registers it from cache " + report.Short(j.disk.ID)
		}
		return answer
	}
	if record, ok := s.images[name]; ok {
		return r.planRecord(ctx, s, jobs, answer, record)
	}
	answer = report.Nowhere(name, cachedisk.InRepository(disks, named.Name()))
	answer.Reference = ref
	return answer
}

// serves says whether the name leads, or will lead, to the job's image.
func (j *job) serves(s *survey, name string) bool {
	if slices.Contains(j.write, name) {
		return true
	}
	record, ok := s.images[name]
	return ok && !j.skipped() && record.Target.Digest == j.image.Target().Digest
}

// planRecord answers for an image that the node has and no disk.
func (r *Runtime) planRecord(ctx context.Context, s *survey, jobs []*job, answer report.Reference, record images.Image) report.Reference {
	chain, err := r.chain(ctx, record)
	if err != nil {
		answer.Reason = fmt.Sprintf("the node has a record of %s without its content (%v)", report.Short(record.Target.Digest), err)
		return answer
	}
	answer.Layers = len(chain)
	for _, id := range chain {
		if s.committed(id) || slices.ContainsFunc(jobs, func(j *job) bool { return slices.Contains(j.chain, id) }) {
			answer.Cached++
		}
	}
	switch {
	case answer.Cached == answer.Layers:
		answer.Cover = report.Hit
		answer.Reason = fmt.Sprintf("the node has it, as %s, not from the cache", report.Short(record.Target.Digest))
	case answer.Cached > 0:
		answer.Cover = report.Partial
		answer.Reason = fmt.Sprintf("the node's %s lacks %d layers", report.Short(record.Target.Digest), answer.Layers-answer.Cached)
	default:
		answer.Reason = fmt.Sprintf("the node's %s has no layer unpacked", report.Short(record.Target.Digest))
	}
	return answer
}

// lookupName is the name of the image record that the CRI looks for: the digest
// wins over the tag, and no tag is latest.
func lookupName(named reference.Named) string {
	if d, ok := named.(reference.Digested); ok {
		return named.Name() + "@" + d.Digest().String()
	}
	return reference.TagNameOnly(named).String()
}

// chain reads the image's chain IDs from the content store.
func (r *Runtime) chain(ctx context.Context, img images.Image) ([]digest.Digest, error) {
	diffIDs, err := img.RootFS(ctx, r.content, platforms.Default())
	if err != nil {
		return nil, fmt.Errorf("reading image %s: %w", img.Name, err)
	}
	return identity.ChainIDs(diffIDs), nil
}
