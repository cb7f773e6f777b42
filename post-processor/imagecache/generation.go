package imagecache

import (
	"cmp"
	"fmt"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"cloud.google.com/go/compute/apiv1/computepb"
)

// Labels of images and disks.
const (
	// labelName has the name of the cache that a disk is for. What lacks it is never
	// touched.
	labelName = "selkies-image-cache"
	// labelImage has the image that a disk was made from.
	labelImage = "selkies-image-cache-image"
	// labelRolledOut, after the name of a cache, has the Unix time at which the cache last
	// rolled an image out. Images without it are what a failed build left, and no way
	// back.
	labelRolledOut = "-rolled-out"
)

// stampRE finds the time that images are named after, by Packer's timestamp().
var stampRE = regexp.MustCompile(`-([0-9]{10})$`)

// generation is an image of the cache and all that is made from it. Its names follow
// from the image, so that a second run finds what the first one made.
type generation struct {
	image   *computepb.Image
	project string // the image's
	created time.Time
	// rolledOut is the Unix time of its last rollout, 0 if there was none.
	rolledOut int64
	foreign   bool   // rolled out by another cache, too
	stamp     string // in the names of its disks
}

// newGeneration is the generation of a cache that an image makes.
func newGeneration(image *computepb.Image, project, cache string) (*generation, error) {
	created, err := time.Parse(time.RFC3339, image.GetCreationTimestamp())
	if err != nil {
		return nil, fmt.Errorf("image %s: %w", image.GetName(), err)
	}
	g := &generation{image: image, project: project, created: created, stamp: strconv.FormatInt(created.Unix(), 10)}
	for label, value := range image.GetLabels() {
		switch {
		case label == cache+labelRolledOut:
			if g.rolledOut, err = strconv.ParseInt(value, 10, 64); err != nil {
				return nil, fmt.Errorf("image %s: label %s: %w; correct it or remove it", image.GetName(), label, err)
			}
		case strings.HasSuffix(label, labelRolledOut):
			g.foreign = true
		}
	}
	if m := stampRE.FindStringSubmatch(image.GetName()); m != nil {
		g.stamp = m[1]
	}
	return g, nil
}

func (g *generation) name() string { return g.image.GetName() }

// address is how disks.insert wants the image named.
func (g *generation) address() string {
	return fmt.Sprintf("projects/%s/global/images/%s", g.project, g.name())
}

// diskName is the name of the generation's disk in a zone, and that of the
// PersistentVolume, its claim and the DaemonSet.
func (g *generation) diskName(cache, zone string) string {
	return fmt.Sprintf("%s-%s-%s", cache, zone, g.stamp)
}

// kept are the names of the images to keep: the current one and those others that
// were rolled out last, n in all. After a rollback that is not the order in which
// they were made.
func kept(family []*generation, current *generation, n int) map[string]bool {
	keep := map[string]bool{current.name(): true}
	family = slices.Clone(family)
	slices.SortFunc(family, func(a, b *generation) int { return cmp.Compare(b.rolledOut, a.rolledOut) })
	for _, g := range family {
		if len(keep) == n || g.rolledOut == 0 {
			break
		}
		keep[g.name()] = true
	}
	return keep
}

// lastElement is the name at the end of an address.
func lastElement(address string) string { return address[strings.LastIndex(address, "/")+1:] }
