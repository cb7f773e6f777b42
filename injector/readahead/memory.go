package readahead

import (
	"fmt"
	"os"
	"strconv"
	"strings"
)

// memoryLimits are the files that have the limit of this process's container, of cgroup
// v2 and v1.
var memoryLimits = []string{"/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"}

// spare is what the process itself needs, in bytes.
const spare = 64 << 20

// DefaultBytes is a quarter of the memory that the node can spare, but no more than this
// process's container may use: what it reads counts as its memory.
func DefaultBytes() (int64, error) {
	info, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return 0, err
	}
	available, err := availableMemory(string(info))
	if err != nil {
		return 0, err
	}
	bytes := available / 4
	for _, file := range memoryLimits {
		data, err := os.ReadFile(file)
		if err != nil {
			continue
		}
		if limit, err := strconv.ParseInt(strings.TrimSpace(string(data)), 10, 64); err == nil { // not "max"
			bytes = min(bytes, max(0, limit-spare))
		}
	}
	return bytes, nil
}

// availableMemory is MemAvailable of /proc/meminfo.
func availableMemory(info string) (int64, error) {
	for line := range strings.Lines(info) {
		var kib int64
		if _, err := fmt.Sscanf(line, "MemAvailable: %d kB", &kib); err == nil {
			return kib << 10, nil
		}
	}
	return 0, fmt.Errorf("/proc/meminfo has no MemAvailable")
}
