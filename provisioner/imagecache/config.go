//go:generate packer-sdc struct-markdown
//go:generate packer-sdc mapstructure-to-hcl2 -type Config,Catalog,Disk,RegistryAuth,Trace

package imagecache

import (
	"cmp"
	"errors"
	"fmt"
	"os"
	"path"
	"regexp"
	"strings"

	"github.com/containerd/platforms"
	"github.com/hashicorp/packer-plugin-sdk/common"
	packersdk "github.com/hashicorp/packer-plugin-sdk/packer"
	"github.com/hashicorp/packer-plugin-sdk/template/config"
	"github.com/hashicorp/packer-plugin-sdk/template/interpolate"
	ocispec "github.com/opencontainers/image-spec/specs-go/v1"
)

// Config is the configuration of the provisioner.
type Config struct {
	common.PackerConfig `mapstructure:",squash"`

	// Image references to put on the disk, such as `debian:12`,
	// `us-docker.pkg.dev/project/repo/app:v1` or `name:tag@sha256:...`.
	// At least one is required, here, in `image_list_file` or through `catalog`.
	Images []string `mapstructure:"images"`
	// A file on the Packer host with one image reference per line. Blank lines are
	// ignored, and so is everything after a `#` at the start of a line or after a space.
	// By default no file is read.
	ImageListFile string `mapstructure:"image_list_file"`
	// Adds the images that a registry lists; may be repeated. By default no registry is
	// listed. See [The `catalog` block](#the-catalog-block).
	Catalog []Catalog `mapstructure:"catalog"`
	// Only report the images, their sizes, how much of them is on the disk and
	// whether the rest fits. Nothing is pulled, and the disk, blank or not, is not
	// changed. Packer then continues as after a build; see [A dry run](#a-dry-run).
	// Defaults to `false`.
	DryRun bool `mapstructure:"dry_run"`
	// The platform to take from multi-platform images, as
	// `os/architecture[/variant]`. Defaults to `linux/amd64`.
	Platform string `mapstructure:"platform"`
	// Address of the Docker daemon on the build VM, such as
	// `unix:///run/user/1000/docker.sock`. By default the one that the `docker`
	// command there uses. Cannot be used with `disk`, which runs a daemon of its own.
	DockerHost string `mapstructure:"docker_host"`
	// The disk to fill. By default the images go into the store of the build VM's own
	// Docker daemon, and the layer manifest to the disk that holds it. See
	// [The `disk` block](#the-disk-block).
	Disk *Disk `mapstructure:"disk"`
	// How many images are pulled at once, and with `keep_blobs` how many layers are
	// copied at once, 1 to 6. Each needs one session of the SSH connection, and sshd allows
	// ten by default.
	// Defaults to 4.
	Concurrency int `mapstructure:"concurrency"`
	// Remove images that are no longer listed. This happens after the new ones have been
	// pulled and recorded, so that shared layers are not pulled again, and earlier only
	// if the disk has no space for both. With `disk`, everything else in its store is
	// removed too. In the store of the VM's own daemon, only images that an earlier run of
	// this provisioner recorded are removed, and never one that a container uses. Defaults
	// to `true`.
	Prune config.Trilean `mapstructure:"prune"`
	// Read every layer back through the Docker API after the pulls and check that it
	// hashes to its diff ID. This transfers all layers, uncompressed, to the Packer
	// host, and needs space on the disk for a second copy of the largest image. Nothing is
	// recorded or removed before the check. Without it, the build still reads the layer
	// manifest back at the end and checks that every layer's directory exists. Defaults to
	// `false`.
	Verify bool `mapstructure:"verify"`
	// Where to write a copy of the layer manifest on the Packer host. By default none is
	// written.
	ManifestOutput string `mapstructure:"manifest_output"`
	// Where to write a report on the Packer host, such as `cache.html`: one HTML page that
	// shows images, layers and what they share, what has changed since the disk's last
	// build, how long each image took, and how much space is left. By default none is
	// written.
	// See [The report](#the-report).
	Report string `mapstructure:"report"`
	// Credentials for a registry; may be repeated. By default they come from the Packer
	// host's Docker configuration and credential helpers, and for Google's registries from
	// the application default credentials. Credentials reach
	// the build VM only in a request to its Docker daemon, which keeps them in
	// memory during a pull. See [Registry credentials](#registry-credentials).
	RegistryAuth []RegistryAuth `mapstructure:"registry_auth"`
	// How a command is run as root on the build VM: a template in which
	// `{{ .Command }}` is one simple command, quoted for a POSIX shell. It must pass
	// standard input on to the command and must not ask for a password. Defaults to
	// `{{ .Command }}` for root and to `sudo -n {{ .Command }}` for everyone else.
	ExecuteCommand string `mapstructure:"execute_command"`
	// How many times to try the pull of an image, or with `keep_blobs` the copy of a layer.
	// The pause between attempts grows from 1 to 30
	// seconds. An attempt fails when the registry sends nothing for 5 minutes.
	// Defaults to 5.
	MaxPullAttempts int `mapstructure:"max_pull_attempts"`
	// Also keep the compressed layers as the registry serves them, in
	// `selkies-image-cache/blobs` on the disk. A node whose Docker uses the
	// containerd image store, the default since Docker 29, needs them for
	// `docker save` and `docker push`; a cluster node does not. The disk grows by the
	// compressed size of the images, and the blobs are transferred through the Packer host.
	// Before an image can be used, a node with containerd reads its blobs once to check
	// their digests. Defaults to `false`.
	KeepBlobs bool `mapstructure:"keep_blobs"`
	// Registries, as `host[:port]`, that may use plain HTTP or untrusted
	// certificates. By default only loopback addresses may, which need not be listed.
	// Without `disk`, set `insecure-registries` of the VM's own daemon as well.
	InsecureRegistries []string `mapstructure:"insecure_registries"`

	// Starts an image once and records what the start reads, so that nodes can read it
	// ahead; may be repeated. By default nothing is recorded. See [The `trace` block](#the-trace-block).
	Trace []Trace `mapstructure:"trace"`
	// The `selkies-image-injector` for the build VM's platform, a file on the Packer host.
	// Required for `trace`: it is uploaded for each trace and removed afterwards.
	Injector string `mapstructure:"injector"`

	references []reference
	catalogs   []*catalog
	platform   ocispec.Platform
	ctx        interpolate.Context
}

// Catalog finds images by listing a registry.
type Catalog struct {
	// Where to look: `host[:port]/path` for the repositories below that path, or
	// `host[:port]` for all of the registry's. An Artifact Registry repository is
	// `REGION-docker.pkg.dev/PROJECT/REPOSITORY`.
	Repository string `mapstructure:"repository" required:"true"`
	// Regular expressions ([RE2](https://github.com/google/re2/wiki/Syntax)) for the
	// repositories to take. They match whole names below `repository`, such as `apps/.*`;
	// `repository` itself is `.`. By default all are taken.
	Include []string `mapstructure:"include"`
	// The same for repositories to leave out, even if `include` matches them. By default
	// none.
	Exclude []string `mapstructure:"exclude"`
	// Regular expressions for the tags to take; they match whole tags. By default the image
	// that was uploaded last in each repository, with all of its tags. Only Google's
	// registries report upload times; elsewhere the default is the tag `latest`.
	Tags []string `mapstructure:"tags"`
	// The most references that the block may find. If there are more, the build fails before
	// anything is pulled. Defaults to 100.
	Limit int `mapstructure:"limit"`
}

// Disk is the disk to fill. A dedicated Docker daemon runs on it during the build;
// afterwards the disk is flushed, trimmed and unmounted.
type Disk struct {
	// The block device on the build VM, such as
	// `/dev/disk/by-id/google-image-cache`. Either this or `label` is required.
	Device string `mapstructure:"device"`
	// The label of the ext4 file system on a disk that is already formatted, such as
	// `selkies-cache`, which a build gives to new file systems. Either this or `device` is
	// required.
	Label string `mapstructure:"label"`
	// Where the disk is mounted on the build VM during the build. Defaults to
	// `/mnt/selkies-image-cache`.
	MountPoint string `mapstructure:"mount_point"`
	// When to make a new ext4 file system: `if-blank`, `never` or `always`, which
	// erases whatever the disk holds. `if-blank` refuses a disk with a partition
	// table, another file system or files that are not an image cache. Defaults to
	// `if-blank`.
	Format string `mapstructure:"format"`
	// Docker's data root, relative to the root of the disk. Defaults to `docker`.
	DockerRoot string `mapstructure:"docker_root"`
}

// Trace starts a container of an image on the build VM.
type Trace struct {
	// One of the images of this build, as written in the list or, for an image from a
	// catalog, with its tag.
	Image string `mapstructure:"image" required:"true"`
	// What the container runs instead of the image's `CMD`. It should do what a start on a
	// node does, until a user can work. By default the image's own command.
	Command []string `mapstructure:"command"`
	// For how many seconds to record the start, 1 to 600, unless the container ends
	// earlier. The container is then stopped. Defaults to 30.
	Seconds int `mapstructure:"seconds"`

	// name is one that the image has in the layer manifest.
	name string
}

// RegistryAuth holds the credentials for one registry.
type RegistryAuth struct {
	// The registry as written in the references, `host[:port]`; Docker Hub is
	// `docker.io`.
	Server string `mapstructure:"server" required:"true"`
	// The user name. For Google's Artifact Registry `oauth2accesstoken` with an
	// access token as the password, or `_json_key`.
	Username string `mapstructure:"username" required:"true"`
	// The password or token. Sensitive: filtered out of the log and all messages.
	Password string `mapstructure:"password" required:"true"`
}

const (
	formatIfBlank = "if-blank"
	formatNever   = "never"
	formatAlways  = "always"

	defaultMountPoint = "/mnt/selkies-image-cache"

	// Every pull holds a connection, which over SSH is a session; sshd's MaxSessions
	// is 10, and other requests and commands need some too.
	maxConcurrency = 6
)

var mountPointRE = regexp.MustCompile(`^/[A-Za-z0-9._/-]+$`)

func (c *Config) prepare(raws ...any) error {
	err := config.Decode(c, &config.DecodeOpts{
		PluginType:         "selkies-image-cache",
		Interpolate:        true,
		InterpolateContext: &c.ctx,
		InterpolateFilter:  &interpolate.RenderFilter{Exclude: []string{"execute_command"}},
	}, raws...)
	if err != nil {
		return err
	}
	for _, a := range c.RegistryAuth {
		packersdk.LogSecretFilter.Set(a.Password)
	}
	var errs *packersdk.MultiError
	check := func(err error) {
		if err != nil {
			errs = packersdk.MultiErrorAppend(errs, err)
		}
	}
	c.setDefaults()
	check(c.prepareCatalogs())
	check(c.prepareReferences())
	check(c.preparePlatform())
	check(c.prepareDisk())
	check(c.prepareRegistries())
	check(c.prepareTraces())
	if c.Concurrency < 1 || c.Concurrency > maxConcurrency {
		check(fmt.Errorf("concurrency is %d; choose 1 to %d", c.Concurrency, maxConcurrency))
	}
	if c.MaxPullAttempts < 1 {
		check(fmt.Errorf("max_pull_attempts is %d; choose 1 or more", c.MaxPullAttempts))
	}
	if c.ExecuteCommand != "" {
		if !strings.Contains(c.ExecuteCommand, ".Command") {
			check(fmt.Errorf("execute_command %q lacks {{ .Command }}", c.ExecuteCommand))
		} else if err := interpolate.Validate(c.ExecuteCommand, &c.ctx); err != nil {
			check(fmt.Errorf("execute_command: %w", err))
		}
	}
	if errs != nil {
		return errs
	}
	return nil
}

func (c *Config) setDefaults() {
	c.Platform = cmp.Or(c.Platform, "linux/amd64")
	c.Concurrency = cmp.Or(c.Concurrency, 4)
	c.MaxPullAttempts = cmp.Or(c.MaxPullAttempts, 5)
	if c.Prune == config.TriUnset {
		c.Prune = config.TriTrue
	}
	for i := range c.Trace {
		c.Trace[i].Seconds = cmp.Or(c.Trace[i].Seconds, 30)
	}
	if c.Disk != nil {
		c.Disk.MountPoint = cmp.Or(c.Disk.MountPoint, defaultMountPoint)
		c.Disk.Format = cmp.Or(c.Disk.Format, formatIfBlank)
		c.Disk.DockerRoot = cmp.Or(c.Disk.DockerRoot, "docker")
	}
}

func (c *Config) prepareReferences() error {
	refs, errs := parseList(c.Images)
	if c.ImageListFile != "" {
		more, err := parseListFile(c.ImageListFile)
		refs, errs = append(refs, more...), append(errs, err...)
	}
	errs = append(errs, duplicates(refs)...)
	if len(refs) == 0 && len(c.Catalog) == 0 && len(errs) == 0 {
		errs = append(errs, errors.New("images and image_list_file name no image; list at least one, or set catalog"))
	}
	c.references = refs
	if len(errs) > 0 {
		return packersdk.MultiErrorAppend(nil, errs...)
	}
	return nil
}

func (c *Config) prepareCatalogs() error {
	var errs *packersdk.MultiError
	for i, block := range c.Catalog {
		found, err := newCatalog(fmt.Sprintf("catalog[%d]", i), block, c.InsecureRegistries)
		if err != nil {
			errs = packersdk.MultiErrorAppend(errs, err)
			continue
		}
		c.catalogs = append(c.catalogs, found)
	}
	if errs != nil {
		return errs
	}
	return nil
}

func (c *Config) preparePlatform() error {
	// A bare architecture would be completed with the Packer host's own values.
	if n := strings.Count(c.Platform, "/"); n < 1 || n > 2 {
		return fmt.Errorf("platform %q is not os/architecture[/variant], such as linux/amd64", c.Platform)
	}
	p, err := platforms.Parse(c.Platform)
	if err != nil {
		return fmt.Errorf("platform %q: %w", c.Platform, err)
	}
	if p.OS != "linux" {
		return fmt.Errorf("platform %q: only linux images can be cached", c.Platform)
	}
	c.platform = p
	return nil
}

func (c *Config) prepareDisk() error {
	if c.Disk == nil {
		return nil
	}
	var errs *packersdk.MultiError
	fail := func(format string, a ...any) {
		errs = packersdk.MultiErrorAppend(errs, fmt.Errorf(format, a...))
	}
	d := c.Disk
	switch {
	case d.Device == "" && d.Label == "":
		fail("disk: set device or label")
	case d.Device != "" && d.Label != "":
		fail("disk: device and label are both set; choose one")
	case d.Device != "" && !path.IsAbs(d.Device):
		fail("disk.device %q is not an absolute path", d.Device)
	case strings.HasPrefix(d.Label, "-"):
		fail("disk.label %q begins with a dash", d.Label)
	case d.Label != "" && d.Format == formatAlways:
		fail(`disk.format "always" erases the label that disk.label finds the disk by; set disk.device`)
	}
	// The path becomes part of a systemd unit, hence no blanks or quotes.
	if !mountPointRE.MatchString(d.MountPoint) || path.Clean(d.MountPoint) != d.MountPoint {
		fail("disk.mount_point %q is not a clean absolute path of letters, digits and ._- below /", d.MountPoint)
	}
	switch d.Format {
	case formatIfBlank, formatNever, formatAlways:
	default:
		fail("disk.format is %q; choose %q, %q or %q", d.Format, formatIfBlank, formatNever, formatAlways)
	}
	if r := d.DockerRoot; path.IsAbs(r) || path.Clean(r) != r || r == "." || r == ".." || strings.HasPrefix(r, "../") {
		fail("disk.docker_root %q is not a clean path relative to the disk's root", r)
	}
	if c.DockerHost != "" {
		fail("docker_host and disk are both set; disk runs a Docker daemon of its own, so drop docker_host")
	}
	if errs != nil {
		return errs
	}
	return nil
}

func (c *Config) prepareRegistries() error {
	var errs *packersdk.MultiError
	seen := map[string]bool{}
	for i, a := range c.RegistryAuth {
		switch server := registryHost(a.Server); {
		case a.Server == "" || a.Username == "" || a.Password == "":
			errs = packersdk.MultiErrorAppend(errs, fmt.Errorf("registry_auth[%d]: set server, username and password", i))
		case strings.Contains(server, "/"):
			errs = packersdk.MultiErrorAppend(errs, fmt.Errorf("registry_auth[%d]: server %q is not host[:port]", i, a.Server))
		case seen[server]:
			errs = packersdk.MultiErrorAppend(errs, fmt.Errorf("registry_auth[%d]: server %q is there twice", i, a.Server))
		default:
			seen[server] = true
		}
	}
	for i, r := range c.InsecureRegistries {
		if r == "" || strings.Contains(r, "/") {
			errs = packersdk.MultiErrorAppend(errs, fmt.Errorf("insecure_registries[%d]: %q is not host[:port]", i, r))
		}
	}
	if errs != nil {
		return errs
	}
	return nil
}

func (c *Config) prepareTraces() error {
	if len(c.Trace) == 0 {
		return nil
	}
	var errs *packersdk.MultiError
	fail := func(format string, a ...any) {
		errs = packersdk.MultiErrorAppend(errs, fmt.Errorf(format, a...))
	}
	if c.Injector == "" {
		fail("trace needs injector: the selkies-image-injector for %s, a file on the Packer host", c.Platform)
	} else if fi, err := os.Stat(c.Injector); err != nil {
		fail("injector: %w", err)
	} else if !fi.Mode().IsRegular() {
		fail("injector %q is not a regular file", c.Injector)
	}
	seen := map[string]bool{}
	for i, t := range c.Trace {
		ref, err := parseReference(fmt.Sprintf("trace[%d].image", i), t.Image)
		switch {
		case err != nil:
			fail("%w", err)
			continue
		case t.Seconds < 1 || t.Seconds > 600:
			fail("trace[%d].seconds is %d; choose 1 to 600", i, t.Seconds)
		case seen[ref.key()]:
			fail("trace[%d].image: %q has a trace block before", i, t.Image)
		}
		seen[ref.key()] = true
		c.Trace[i].name = ref.key()
	}
	if errs != nil {
		return errs
	}
	return nil
}
