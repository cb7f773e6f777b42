package imagecache

import (
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
	// labelName has the name of the cache. What lacks it is never touched.
	labelName = "selkies-image-cache"
	// labelImage has the image that a disk was made from.
	labelImage = "selkies-image-cache-image"
	// labelRolledOut has the Unix time at which an image was first rolled out. Images
	// without it are what a failed build left, and no way back.
	labelRolledOut = "selkies-image-cache-rolled-out"
)

// stampRE finds the time that images are named after, by Packer's timestamp().
var stampRE = regexp.MustCompile(`-([0-9]{10})$`)

// generation is an image of the cache and all that is made from it. Its names follow
// from the image, so that a second run finds what the first one made.
type generation struct {
	image   *computepb.Image
	project string // the image's
	created time.Time
	stamp   string // in the names of its disks
}

func newGeneration(image *computepb.Image, project string) (*generation, error) {
	created, err := time.Parse(time.RFC3339, image.GetCreationTimestamp())
	if err != nil {
		return nil, fmt.Errorf("image %s: %w", image.GetName(), err)
	}
	g := &generation{image: image, project: project, created: created, stamp: strconv.FormatInt(created.Unix(), 10)}
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

// kept are the names of the images to keep: the current one and the newest others,
// n in all, that have been rolled out.
func kept(family []*generation, current *generation, n int) map[string]bool {
	keep := map[string]bool{current.name(): true}
	family = slices.Clone(family)
	slices.SortFunc(family, func(a, b *generation) int { return b.created.Compare(a.created) })
	for _, g := range family {
		if len(keep) == n {
			break
		}
		if g.image.GetLabels()[labelRolledOut] != "" {
			keep[g.name()] = true
		}
	}
	return keep
}

// lastElement is the name at the end of an address.
func lastElement(address string) string { return address[strings.LastIndex(address, "/")+1:] }
