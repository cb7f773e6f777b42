package nodestate

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"github.com/selkies-project/packer-plugin-selkies/e2e/machine"
	"github.com/selkies-project/packer-plugin-selkies/e2e/treediff"
)

// DockerDir is Docker's data root, CacheDir where the injector mounts cache disks for
// Docker.
const (
	DockerDir = "/var/lib/docker"
	CacheDir  = "/var/lib/selkies-image-cache"
)

// Docker is the image store of m's Docker with the overlay2 graph driver, and where
// cache disks are mounted for it, as files. Directories that dockerd makes with the
// first layer and keeps, and times, are left out.
func Docker(m *machine.Machine) (treediff.Tree, error) {
	all := treediff.Tree{}
	for _, dir := range []string{DockerDir + "/image", DockerDir + "/overlay2", CacheDir} {
		tree, err := treediff.Dir(m.Path(dir))
		if errors.Is(err, os.ErrNotExist) && dir == CacheDir {
			continue
		}
		if err != nil {
			return nil, fmt.Errorf("reading the state of docker: %w", err)
		}
		for name, e := range tree {
			if filepath.Base(name) == "lastUpdated" {
				continue
			}
			if e.Type == "dir" {
				e.Mode, e.Size = 0, 0
			}
			e.ModTime = time.Time{}
			switch name {
			case "overlay2/layerdb/sha256", "overlay2/layerdb/mounts", "overlay2/layerdb/tmp", "overlay2/distribution":
				continue
			}
			all[filepath.Join(dir, name)] = e
		}
	}
	return all, nil
}
