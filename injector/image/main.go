// Command image builds the injector's container image without a Docker daemon:
// from scratch, one static binary, an index of several platforms. The same source
// and Go version give the same digest, wherever it is built.
//
//	go run ./injector/image                     into build/injector-image, an OCI layout
//	go run ./injector/image -push REGISTRY/REPOSITORY:TAG
//	go run ./injector/image -version 1.2.3      the image of a release
//
// A push uses the credentials of Docker's configuration. A registry on loopback is
// spoken to in plain HTTP. The reference by digest of what was built goes to stdout.
//
// The image's time is SOURCE_DATE_EPOCH, or else that of the commit.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/google/go-containerregistry/pkg/authn"
	"github.com/google/go-containerregistry/pkg/name"
	v1 "github.com/google/go-containerregistry/pkg/v1"
	"github.com/google/go-containerregistry/pkg/v1/empty"
	"github.com/google/go-containerregistry/pkg/v1/layout"
	"github.com/google/go-containerregistry/pkg/v1/remote"

	"github.com/selkies-project/packer-plugin-selkies/version"
)

const module = "github.com/selkies-project/packer-plugin-selkies"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "building the injector's image:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	flags := flag.NewFlagSet("image", flag.ContinueOnError)
	output := flags.String("output", "build/injector-image", "`directory` of the OCI layout, replaced; empty for none")
	push := flags.String("push", "", "`reference` to push to")
	release := flags.String("version", "", "`version` of a release, which the injector then reports; else the source's")
	platforms := flags.String("platforms", "linux/amd64,linux/arm64", "`list` of platforms, separated by commas")
	if err := flags.Parse(args); err != nil {
		return err
	}
	if flags.NArg() > 0 {
		return fmt.Errorf("unexpected argument %q", flags.Arg(0))
	}
	// Before minutes of building.
	var target name.Reference
	if *push != "" {
		var err error
		if target, err = name.ParseReference(*push, name.WithDefaultTag("")); err != nil {
			return err
		}
	}
	index, err := build(ctx, *release, strings.Split(*platforms, ","))
	if err != nil {
		return err
	}
	digest, err := index.Digest()
	if err != nil {
		return err
	}
	if *output != "" {
		if err := writeLayout(*output, index); err != nil {
			return fmt.Errorf("writing the OCI layout %s: %w", *output, err)
		}
	}
	if target == nil {
		fmt.Println(digest)
		return nil
	}
	err = remote.WriteIndex(target, index, remote.WithContext(ctx), remote.WithAuthFromKeychain(authn.DefaultKeychain))
	if err != nil {
		return fmt.Errorf("pushing to %s: %w", target, err)
	}
	fmt.Println(target.Context().Digest(digest.String()))
	return nil
}

// build compiles the injector for each platform and puts an image around it.
func build(ctx context.Context, release string, platforms []string) (v1.ImageIndex, error) {
	from, err := describeSource(ctx)
	if err != nil {
		return nil, err
	}
	ldflags := "-s -w"
	if release != "" {
		from.version, ldflags = release, releaseFlags(release)
	}
	tmp, err := os.MkdirTemp("", "injector-image-")
	if err != nil {
		return nil, err
	}
	defer os.RemoveAll(tmp)
	var binaries []binary
	for _, p := range platforms {
		platform, err := v1.ParsePlatform(p)
		if err != nil {
			return nil, err
		}
		file := filepath.Join(tmp, strconv.Itoa(len(binaries)))
		if err := compile(ctx, *platform, ldflags, file); err != nil {
			return nil, fmt.Errorf("compiling for %s: %w", p, err)
		}
		contents, err := os.ReadFile(file)
		if err != nil {
			return nil, err
		}
		binaries = append(binaries, binary{platform: *platform, contents: contents})
	}
	return newIndex(binaries, from)
}

// compile builds the injector without anything in it that tells where and from which
// kind of checkout: the image's labels say which commit it is. Without gRPC's pages of
// traces, whose templates have the linker keep every method, it is a quarter smaller.
func compile(ctx context.Context, p v1.Platform, ldflags, file string) error {
	cmd := exec.CommandContext(ctx, "go", "build", "-trimpath", "-buildvcs=false", "-tags=grpcnotrace", "-ldflags="+ldflags, "-o", file,
		module+"/injector")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS="+p.OS, "GOARCH="+p.Architecture)
	cmd.Stderr = os.Stderr
	return cmd.Run()
}

// releaseFlags are the linker's flags of .goreleaser.yml: the program in the image is that
// of the release's archive, byte for byte.
func releaseFlags(release string) string {
	core, prerelease, _ := strings.Cut(release, "-")
	return fmt.Sprintf("-s -w -X %[1]s/version.Version=%[2]s -X %[1]s/version.VersionPrerelease=%[3]s", module, core, prerelease)
}

// describeSource says what is built. Outside of a Git checkout it needs
// SOURCE_DATE_EPOCH, and the revision stays empty.
func describeSource(ctx context.Context) (source, error) {
	from := source{version: version.String()}
	epoch, given := os.LookupEnv("SOURCE_DATE_EPOCH")
	commit, err := git(ctx, "log", "-1", "--format=%H %ct")
	if err == nil {
		var committed string
		from.revision, committed, _ = strings.Cut(commit, " ")
		if !given {
			epoch = committed
		}
		changes, err := git(ctx, "status", "--porcelain", "--untracked-files=no")
		if err != nil {
			return source{}, err
		}
		if changes != "" {
			from.revision += "-dirty"
		}
	} else if !given {
		return source{}, fmt.Errorf("%w; without Git, set SOURCE_DATE_EPOCH", err)
	}
	seconds, err := strconv.ParseInt(epoch, 10, 64)
	if err != nil {
		return source{}, fmt.Errorf("reading SOURCE_DATE_EPOCH: %w", err)
	}
	from.created = time.Unix(seconds, 0).UTC()
	return from, nil
}

func git(ctx context.Context, args ...string) (string, error) {
	out, err := exec.CommandContext(ctx, "git", args...).Output()
	if err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) && len(exit.Stderr) > 0 {
			err = fmt.Errorf("%w: %s", err, strings.TrimSpace(string(exit.Stderr)))
		}
		return "", fmt.Errorf("asking git %s: %w", args[0], err)
	}
	return strings.TrimSpace(string(out)), nil
}

// writeLayout replaces dir, which must be an OCI layout if it is there.
func writeLayout(dir string, index v1.ImageIndex) error {
	if entries, err := os.ReadDir(dir); err == nil && len(entries) > 0 {
		if _, err := layout.FromPath(dir); err != nil {
			return fmt.Errorf("the directory holds something else: %w", err)
		}
	}
	if err := os.RemoveAll(dir); err != nil {
		return err
	}
	path, err := layout.Write(dir, empty.Index)
	if err != nil {
		return err
	}
	return path.AppendIndex(index)
}
