package readahead

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// turn is how long is read before a look at what others read.
	turn = 50 * time.Millisecond
	// few is how much others may read in a turn or between two looks, in bytes: a start
	// that the trace predicts still looks up names.
	few = 32 << 10
	// look is the time between two looks while others read.
	look = 20 * time.Millisecond
	// calm is how long others must have read little, and how long it is no matter what they
	// read once that was what the trace has.
	calm = 200 * time.Millisecond
	// patience is how long it waits for others without a moment of calm, once: what reads
	// longer than that is no start, and may never end.
	patience = time.Minute
)

// yield has the reading wait for others that read from the same device: for a start that
// the trace does not predict, or for that of another image.
type yield struct {
	// counts are the bytes that all have read from the device, and those that this process
	// has caused to be read.
	counts func() (device, own int64, err error)
	// before is the difference at the last look.
	before int64
	// trusted is until when others may read what they like, and outworn that they may for good.
	trusted time.Time
	outworn bool
}

// newYield is for the device of the file system at dir; nil if the kernel does not count
// what is read from it, as where several are below one file system.
func newYield(dir string) *yield {
	var st unix.Stat_t
	if unix.Stat(dir, &st) != nil {
		return nil
	}
	stat := fmt.Sprintf("/sys/dev/block/%d:%d/stat", unix.Major(st.Dev), unix.Minor(st.Dev))
	y := &yield{counts: func() (device, own int64, err error) {
		if own, err = readByThis(); err == nil {
			device, err = readFrom(stat)
		}
		return device, own, err
	}}
	device, own, err := y.counts()
	if err != nil {
		return nil
	}
	y.before = device - own
	return y
}

// others gives the bytes that others have read since the last call. None of this
// process's requests may be under way.
func (y *yield) others() int64 {
	device, own, err := y.counts()
	if err != nil { // the device is gone
		return 0
	}
	n := device - own - y.before
	y.before += n
	return n
}

// wait returns at once if others have read little. Otherwise it waits until they have
// been quiet for a moment, or until what they read is what is left of the trace, but not
// for ever.
func (y *yield) wait(ctx context.Context, left []part) error {
	if y.outworn || y.others() <= few || time.Now().Before(y.trusted) {
		return nil
	}
	began := time.Now()
	next := newPrediction(left)
	next.comesTrue() // since now
	tick := time.NewTicker(look)
	defer tick.Stop()
	for quiet := time.Duration(0); quiet < calm; quiet += look {
		select {
		case <-tick.C:
		case <-ctx.Done():
			return ctx.Err()
		}
		if y.others() <= few {
			continue
		}
		if time.Since(began) >= patience {
			y.outworn = true
			return nil
		}
		if next.comesTrue() {
			y.trusted = time.Now().Add(calm)
			return nil
		}
		quiet = -look
	}
	return nil
}

// readFrom reads a device's counters: requests, merged, sectors of 512 bytes, whatever
// the device's are (Documentation/block/stat.rst).
func readFrom(stat string) (int64, error) {
	data, err := os.ReadFile(stat)
	if err != nil {
		return 0, err
	}
	fields := strings.Fields(string(data))
	if len(fields) < 3 {
		return 0, fmt.Errorf("%s is %q", stat, data)
	}
	sectors, err := strconv.ParseInt(fields[2], 10, 64)
	return 512 * sectors, err
}

// readByThis counts what this process's requests have brought from disks, also into the
// page cache and of directories (Documentation/filesystems/proc.rst, read_bytes).
func readByThis() (int64, error) {
	data, err := os.ReadFile("/proc/self/io")
	if err != nil {
		return 0, err
	}
	for line := range strings.Lines(string(data)) {
		if n, ok := strings.CutPrefix(line, "read_bytes: "); ok {
			return strconv.ParseInt(strings.TrimSpace(n), 10, 64)
		}
	}
	return 0, errors.New("/proc/self/io has no read_bytes")
}
