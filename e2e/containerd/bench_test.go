//go:build e2e

package containerd_test

import (
	"path/filepath"
	"testing"

	"github.com/selkies-project/packer-plugin-selkies/e2e/cachedisk"
	"github.com/selkies-project/packer-plugin-selkies/e2e/images"
	"github.com/selkies-project/packer-plugin-selkies/e2e/machine"
)

// BenchmarkInject registers 60 images of ten layers, 541 layers in all, and finds
// them all there.
func BenchmarkInject(b *testing.B) {
	busybox, err := machine.Busybox(b.Context())
	if err != nil {
		b.Fatal(err)
	}
	chains, err := images.Chains(busybox, 60, 10)
	if err != nil {
		b.Fatal(err)
	}
	refs, err := images.Push(b.Context(), world.reg.Addr, chains)
	if err != nil {
		b.Fatal(err)
	}
	builder := machine.New(b, machine.Config{Name: "builder"})
	disk := filepath.Join(b.TempDir(), "chains")
	if _, err := cachedisk.Build(b.Context(), builder, cachedisk.Config{Image: disk, References: refs}); err != nil {
		b.Fatal(err)
	}
	if err := builder.Close(); err != nil {
		b.Fatal(err)
	}
	n := newNode(b, machine.Upstream)
	n.attach(b, disk, cacheDir)

	b.Run("first", func(b *testing.B) {
		layers := 0
		for b.Loop() {
			layers += n.inject(b, cacheDir).Disks[0].Registered
			b.StopTimer()
			n.settled(b, false)
			n.eject(b)
			n.settled(b, false)
			b.StartTimer()
		}
		b.ReportMetric(float64(b.Elapsed().Milliseconds())/float64(layers), "ms/layer")
	})
	b.Run("again", func(b *testing.B) {
		n.inject(b, cacheDir)
		n.settled(b, false)
		b.ResetTimer()
		for b.Loop() {
			n.inject(b, cacheDir)
		}
	})
}
