//go:build e2e

// Package provisioner_test runs the real Packer with the plugin against machines
// with a real sshd, systemd and Docker.
package provisioner_test

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"strings"
	"testing"

	v1 "github.com/google/go-containerregistry/pkg/v1"

	"github.com/selkies-project/packer-plugin-selkies/e2e/buildvm"
	"github.com/selkies-project/packer-plugin-selkies/e2e/host"
	"github.com/selkies-project/packer-plugin-selkies/e2e/images"
	"github.com/selkies-project/packer-plugin-selkies/e2e/machine"
)

// world is what all tests share.
var world struct {
	packer            *buildvm.Packer
	busybox, injector string
	// debian has the build VMs with Docker 20.10 that no test uses.
	debian chan *vm
}

// vms is how many tests have a VM at once. Those that look at the network, which all VMs
// share with the host, run alone.
const vms = 2

// vm is a machine that Packer can log in to.
type vm struct{ *buildvm.VM }

func TestMain(m *testing.M) {
	host.Main(func(ctx context.Context, dir string) (status int, err error) {
		if err := setUp(ctx, dir); err != nil {
			return 1, err
		}
		defer func() {
			for range vms {
				err = errors.Join(err, (<-world.debian).Close())
			}
		}()
		return m.Run(), nil
	})
}

func setUp(ctx context.Context, dir string) error {
	var err error
	if world.packer, err = buildvm.InstallPacker(ctx, dir); err != nil {
		return err
	}
	world.injector = filepath.Join(dir, "selkies-image-injector")
	if err := host.Build(ctx, "./injector", world.injector); err != nil {
		return err
	}
	if world.busybox, err = machine.Busybox(ctx); err != nil {
		return err
	}
	world.debian = make(chan *vm, vms)
	for range vms {
		v, err := bootVM(ctx, machine.Debian)
		if err != nil {
			return err
		}
		world.debian <- v
	}
	return nil
}

// debian waits for a build VM with Docker 20.10, which is the test's until its end.
func debian(t *testing.T) *vm {
	t.Helper()
	v := <-world.debian
	t.Cleanup(func() { world.debian <- v })
	return v
}

func bootVM(ctx context.Context, release machine.Release) (*vm, error) {
	v, err := buildvm.Boot(ctx, world.packer, release)
	return &vm{v}, err
}

func newDisk(t *testing.T, v *vm, megabytes int64) *buildvm.Disk {
	t.Helper()
	return buildvm.NewDisk(t, v.VM, megabytes)
}

// errorLine is the error in Packer's summary of a build. It takes one line.
func errorLine(t *testing.T, out string) string {
	t.Helper()
	_, rest, ok := strings.Cut(out, "\n--> null.vm: ")
	line, rest, _ := strings.Cut(rest, "\n")
	if next, _, _ := strings.Cut(rest, "\n"); !ok || next != "" {
		t.Errorf("the build did not end with one line of error:\n%s", out)
	}
	return line
}

// layer is a tar stream of files with the sizes given, whose contents do not
// compress and follow from name and size.
func layer(t *testing.T, sizes map[string]int) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for name, size := range sizes {
		seed := [32]byte{}
		copy(seed[:], fmt.Sprint(name, size))
		data := make([]byte, size)
		if _, err := rand.NewChaCha8(seed).Read(data); err != nil {
			t.Fatal(err)
		}
		if err := w.WriteHeader(&tar.Header{Name: name, Mode: 0o644, Size: int64(size)}); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Write(data); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func newImage(t *testing.T, layers ...[]byte) v1.Image {
	t.Helper()
	image, err := images.New(images.OCI, layers...)
	if err != nil {
		t.Fatal(err)
	}
	return image
}
