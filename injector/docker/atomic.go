package docker

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// The temporary file of a replacement has the same name each time: what a killed run
// left is overwritten by the next one that has the same file to write.
func temporary(name string) string {
	return filepath.Join(filepath.Dir(name), "."+stateName)
}

// clearTemporary removes what killed runs have left in the directories that outlive ours.
func (s store) clearTemporary() error {
	for _, dir := range []string{
		s.stateDir(), s.image(),
		s.image("distribution", "v2metadata-by-diffid", "sha256"), s.image("distribution", "diffid-by-digest", "sha256"),
	} {
		if err := removeIfThere(temporary(filepath.Join(dir, "any"))); err != nil {
			return fmt.Errorf("removing what an interrupted run wrote: %w", err)
		}
	}
	return nil
}

// writeFile replaces a file whole, making its directory as dockerd does. It is not
// durable before the next sync of the file system.
func writeFile(name string, content []byte, mode fs.FileMode) error {
	return replaceFile(name, content, mode, false)
}

// writeDurable replaces a file whole. After a power loss there is the old or the new.
func writeDurable(name string, content []byte, mode fs.FileMode) error {
	return replaceFile(name, content, mode, true)
}

func replaceFile(name string, content []byte, mode fs.FileMode, durable bool) error {
	if err := mkdirOf(name); err != nil {
		return err
	}
	tmp := temporary(name)
	f, err := os.OpenFile(tmp, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, mode)
	if err != nil {
		return err
	}
	_, err = f.Write(content)
	if err == nil && durable {
		err = f.Sync()
	}
	if err = errors.Join(err, f.Close()); err == nil {
		err = os.Rename(tmp, name)
	}
	if err != nil {
		return errors.Join(err, os.Remove(tmp))
	}
	return nil
}

// replaceLink replaces a symbolic link, or puts one in a file's place.
func replaceLink(target, name string) error {
	tmp := temporary(name)
	if err := removeIfThere(tmp); err != nil {
		return err
	}
	if err := os.Symlink(target, tmp); err != nil {
		return err
	}
	return os.Rename(tmp, name)
}

// mkdirOf makes the directory of a file as dockerd does.
func mkdirOf(name string) error { return os.MkdirAll(filepath.Dir(name), 0o755) }

func removeIfThere(name string) error {
	if err := os.Remove(name); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
