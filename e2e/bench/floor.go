package main

import (
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"time"

	"go.etcd.io/bbolt"
)

// databases are containerd's, below its root: the metadata of everything, and the
// overlayfs snapshotter's own.
var databases = []string{
	"io.containerd.metadata.v1.bolt/meta.db",
	"io.containerd.snapshotter.v1.overlayfs/metadata.db",
}

// transactions is how many there have been in each of containerd's databases.
func transactions(root string) ([]int, error) {
	var all []int
	for _, db := range databases {
		n, err := lastTransaction(filepath.Join(root, db))
		if err != nil {
			return nil, fmt.Errorf("counting the transactions of %s: %w", db, err)
		}
		all = append(all, n)
	}
	return all, nil
}

// lastTransaction is the ID of a database's last transaction. They are numbered one by
// one. containerd has the file locked, so this is read from a copy.
func lastTransaction(file string) (id int, err error) {
	data, err := os.ReadFile(file)
	if errors.Is(err, os.ErrNotExist) {
		return 0, nil // the snapshotter makes it with the first snapshot
	}
	if err != nil {
		return 0, err
	}
	f, err := os.CreateTemp("", "bench-*.db")
	if err != nil {
		return 0, err
	}
	defer os.Remove(f.Name())
	_, err = f.Write(data)
	if err := errors.Join(err, f.Close()); err != nil {
		return 0, err
	}
	db, err := bbolt.Open(f.Name(), 0o600, &bbolt.Options{ReadOnly: true})
	if err != nil {
		return 0, err
	}
	defer db.Close()
	err = db.View(func(tx *bbolt.Tx) error {
		id = tx.ID()
		return nil
	})
	return id, err
}

// openFloor opens a database as containerd opens that of its metadata.
func openFloor(file string) (*bbolt.DB, error) {
	return bbolt.Open(file, 0o600, &bbolt.Options{NoFreelistSync: true, NoStatistics: true})
}

// floor times as many transactions, one after the other, each with one small value and
// its fsync, in new databases below dir.
func floor(dir string, counts []int) (took time.Duration, err error) {
	for i, n := range counts {
		file := filepath.Join(dir, fmt.Sprintf("floor-%d.db", i))
		db, err := openFloor(file)
		if err != nil {
			return 0, err
		}
		began := time.Now()
		for v := range n {
			if err := put(db, v); err != nil {
				return 0, errors.Join(err, db.Close())
			}
		}
		took += time.Since(began)
		if err := errors.Join(db.Close(), os.Remove(file)); err != nil {
			return 0, err
		}
	}
	return took, nil
}

func put(db *bbolt.DB, v int) error {
	return db.Update(func(tx *bbolt.Tx) error {
		b, err := tx.CreateBucketIfNotExists([]byte("floor"))
		if err != nil {
			return err
		}
		return b.Put(binary.BigEndian.AppendUint64(nil, uint64(v)), []byte("value"))
	})
}
