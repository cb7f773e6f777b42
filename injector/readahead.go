package main

import (
	"context"

	"github.com/spf13/pflag"

	"github.com/selkies-project/packer-plugin-selkies/injector/cachedisk"
	"github.com/selkies-project/packer-plugin-selkies/injector/readahead"
)

// readAheadFlags are those of the commands that read ahead.
type readAheadFlags struct {
	on          bool
	bytes, rate byteCount
}

func (a *readAheadFlags) register(fs *pflag.FlagSet, on bool) {
	fs.BoolVar(&a.on, "read-ahead", on, "read what the starts of images read, by the disk's access traces, into the page cache")
	fs.Var(&a.bytes, "read-ahead-bytes", "most that is read ahead of one disk, in `bytes`, as in 500MB; 0 is a quarter of the available memory")
	fs.Var(&a.rate, "read-ahead-rate", "most that is read ahead, in `bytes` a second, as in 50MB; 0 is as fast as the disk allows")
}

// read reads ahead, if that is wanted. What cannot be read is said, and no error: a start
// takes longer, that is all.
func (a *readAheadFlags) read(ctx context.Context, f *flags, disks []*cachedisk.Disk) error {
	if !a.on {
		return nil
	}
	for _, d := range disks {
		err := readahead.Disk(ctx, d, readahead.Options{Bytes: int64(a.bytes), Rate: int64(a.rate)}, readahead.Log(f.log))
		if err != nil {
			return err
		}
	}
	return nil
}
