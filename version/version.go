// Package version holds the version that the plugin and the injector report. It
// imports no Packer SDK, which the injector does not carry.
package version

// Set by the release build with -ldflags -X. Packer finds a plugin by the version
// that its binary describes, so a release's tag, file name and Version agree.
var (
	Version           = "0.1.0"
	VersionPrerelease = "dev"
	VersionMetadata   = ""
)

// String is the version as Packer writes it: 0.1.0, 0.1.0-dev, 0.1.0-dev+meta.
func String() string {
	s := Version
	if VersionPrerelease != "" {
		s += "-" + VersionPrerelease
	}
	if VersionMetadata != "" {
		s += "+" + VersionMetadata
	}
	return s
}
