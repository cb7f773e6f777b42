package cachedisk

import (
	"github.com/distribution/reference"

	"github.com/selkies-project/packer-plugin-selkies/injector/report"
)

// InRepository lists the images of the disks that have a name in the repository, each
// once, by that name.
func InRepository(disks []*Disk, repository string) []string {
	var found []string
	for _, d := range disks {
		for _, img := range d.Manifest.Images {
			var names []string
			for _, n := range img.Names {
				if ref, err := reference.ParseNormalizedNamed(n); err == nil && ref.Name() == repository {
					names = append(names, n)
				}
			}
			if len(names) > 0 {
				found = append(found, report.Title(names))
			}
		}
	}
	return found
}
