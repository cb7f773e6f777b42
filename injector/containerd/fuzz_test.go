package containerd

import (
	"testing"

	"github.com/containerd/containerd/v2/pkg/labels"
	"github.com/distribution/reference"
)

// FuzzNames makes labels and the names of records from what images are called.
func FuzzNames(f *testing.F) {
	f.Add("docker.io/library/debian:12", "localhost:5000/a/b@sha256:0000000000000000000000000000000000000000000000000000000000000000")
	f.Add("[::1]:5000/x:1", "a")
	f.Add("a:\x1b", "a/b\nc:1")
	f.Fuzz(func(t *testing.T, a, b string) {
		origin, err := distributionSource([]string{a, b, a})
		if err != nil {
			return
		}
		for key, value := range origin {
			if err := labels.Validate(key, value); err != nil {
				t.Fatal(err)
			}
		}
		named, err := reference.ParseNormalizedNamed(a)
		if err != nil {
			t.Fatalf("%q has a source but is no name: %v", a, err)
		}
		again, err := reference.ParseNormalizedNamed(lookupName(named))
		if err != nil || lookupName(again) != lookupName(named) {
			t.Fatalf("%q is looked up as %q, and that as %v (%v)", a, lookupName(named), again, err)
		}
	})
}
