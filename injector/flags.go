package main

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spf13/pflag"

	"github.com/selkies-project/packer-plugin-selkies/injector/cachedisk"
	"github.com/selkies-project/packer-plugin-selkies/injector/docker"
)

// flags are those that all commands share.
type flags struct {
	caches              []string
	runtime             string
	link                string
	containerdAddress   string
	containerdNamespace string
	dockerRoot          string
	dockerHost          string
	dockerRestart       bool
	hostRoot            string
	output              string
	logLevel            string

	log *slog.Logger
}

const (
	runtimeAuto       = "auto"
	runtimeContainerd = "containerd"
	runtimeDocker     = "docker"

	outputText = "text"
	outputJSON = "json"
)

func (f *flags) register(fs *pflag.FlagSet) {
	fs.StringArrayVar(&f.caches, "cache", nil,
		"`directory` of a cache disk; repeatable (default "+cachedisk.DefaultDir+" and all of "+cachedisk.DefaultParents[0]+")")
	fs.StringVar(&f.runtime, "runtime", runtimeAuto,
		"auto, containerd or docker; auto takes containerd if its CRI plugin answers, else a Docker that answers")
	fs.StringVar(&f.link, "link", docker.LinkSymlink,
		"how a layer is reached: symlink; or, for Docker only, bind, one bind mount a layer: where that is gone a container silently finds an empty layer, so run inject after each boot before Docker starts")
	fs.StringVar(&f.containerdAddress, "containerd-address", "/run/containerd/containerd.sock", "containerd's `socket`")
	fs.StringVar(&f.containerdNamespace, "containerd-namespace", "k8s.io",
		"containerd `namespace`; moby is Docker 29's containerd image store")
	fs.StringVar(&f.dockerRoot, "docker-root", "",
		"Docker's data root `directory` (default the running daemon's, or /var/lib/docker)")
	fs.StringVar(&f.dockerHost, "docker-host", "unix:///var/run/docker.sock", "`address` of the Docker daemon")
	fs.BoolVar(&f.dockerRestart, "docker-restart-running", false,
		"restart Docker also when that ends running containers (no live-restore)")
	fs.StringVar(&f.hostRoot, "host-root", "/", "`directory` where the host's root file system is mounted")
	fs.StringVarP(&f.output, "output", "o", outputText, "text or json")
	fs.StringVar(&f.logLevel, "log-level", "warn", "debug, info, warn or error; run, gate and verify have info unless told; the log goes to stderr")
}

// environment sets the flags that are not on the command line from variables named
// after them: SELKIES_HOST_ROOT for --host-root. So a command that is run in the
// agent's container sees what the agent sees.
func environment(fs *pflag.FlagSet) error {
	var errs []error
	fs.VisitAll(func(flag *pflag.Flag) {
		name := "SELKIES_" + strings.ToUpper(strings.ReplaceAll(flag.Name, "-", "_"))
		value, ok := os.LookupEnv(name)
		if !ok || flag.Changed || flag.Name == "help" {
			return
		}
		values := []string{value}
		if flag.Value.Type() == "stringArray" {
			values = filepath.SplitList(value)
		}
		for _, v := range values {
			if err := fs.Set(flag.Name, v); err != nil {
				errs = append(errs, usageError{fmt.Errorf("%s is %q: %w", name, value, err)})
			}
		}
	})
	return errors.Join(errs...)
}

func (f *flags) validate() error {
	for _, c := range []struct {
		flag, value string
		allowed     []string
	}{
		{"runtime", f.runtime, []string{runtimeAuto, runtimeContainerd, runtimeDocker}},
		{"link", f.link, []string{docker.LinkSymlink, docker.LinkBind}},
		{"output", f.output, []string{outputText, outputJSON}},
	} {
		if !slices.Contains(c.allowed, c.value) {
			return usageError{fmt.Errorf("--%s is %q; give one of %s", c.flag, c.value, strings.Join(c.allowed, ", "))}
		}
	}
	if f.link == docker.LinkBind && f.runtime == runtimeContainerd {
		return usageError{fmt.Errorf("--link=bind is for Docker only; containerd's clean-up would leak or empty bind mounts")}
	}
	var level slog.Level
	if err := level.UnmarshalText([]byte(f.logLevel)); err != nil {
		return usageError{fmt.Errorf("--log-level is %q; give one of debug, info, warn, error", f.logLevel)}
	}
	f.log = newLogger(level)
	return nil
}
