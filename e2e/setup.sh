#!/bin/sh
# Installs what the tests and the demo need on a fresh Debian 12, and says in one
# line why it cannot. Does nothing, quickly, where everything is there.
#
#   e2e/setup.sh           installs
#   e2e/setup.sh --check   says whether it could
set -eu

top=$(cd "$(dirname "$0")/.." && pwd)
say() { echo "e2e/setup.sh: $*" >&2; exit 1; }

[ "$(uname -s)" = Linux ] || say "this needs Linux, on a Debian 12 machine"
[ "$(uname -m)" = x86_64 ] || say "this needs an x86-64 machine, not $(uname -m): the images are for linux/amd64"
# shellcheck disable=SC1091
system=$(. /etc/os-release && echo "$ID-${VERSION_ID:-} $PRETTY_NAME") 2>/dev/null || system="? a system without /etc/os-release"
[ "${system%% *}" = debian-12 ] || say "this needs Debian 12, not ${system#* }"
[ "$(id -u)" = 0 ] || say "this boots machines and attaches disks: run it as root"
[ -e /dev/loop-control ] || say "this needs a kernel with loop devices; a container has none"
[ "${1:-}" != --check ] || exit 0

# Each machine's systemd, containerd, dockerd and kubelet take some of what root has in
# all, by default 128. Where none is left, units of a machine fail as it boots.
instances=/proc/sys/fs/inotify/max_user_instances
[ "$(cat $instances)" -ge 1024 ] || echo 1024 >$instances || say "fs.inotify.max_user_instances could not be raised to 1024"

# libseccomp, a C compiler and pkg-config are for runc, the compiler for the race detector
# as well, libnbd and nbdkit for disks that lose their power or are slow, strace for what the
# injector opens, chromium for the report, gnupg for releases; the rest is run directly.
packages="systemd-container debootstrap util-linux iproute2 openssh-client ca-certificates strace
	gcc libc6-dev pkg-config libseccomp-dev libnbd-bin nbdkit chromium gnupg"
missing=
for p in $packages; do
	[ "$(dpkg-query -W -f '${db:Status-Status}' "$p" 2>/dev/null)" = installed ] || missing="$missing $p"
done
command -v go >/dev/null || missing="$missing golang-go"
if [ -n "$missing" ]; then
	echo "installing$missing" >&2
	apt-get update -qq || say "apt-get update failed: check this machine's Debian mirror"
	# shellcheck disable=SC2086
	DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $missing >/dev/null ||
		say "apt-get could not install$missing"
fi

# Since 1.21 the go command fetches by itself the version that go.mod names. Debian's
# is older, but it can download that version as the module that it is, which checks it
# against the checksum database. Modules do not keep the mode of programs.
cd /
case $(go env GOVERSION) in
go1.1[0-9]* | go1.20*)
	goroot=/usr/local/go
	[ ! -e $goroot ] || say "$(command -v go) is too old and $goroot exists: put $goroot/bin first in PATH"
	version=$(sed -n 's/^go //p' "$top/go.mod")
	echo "installing Go $version in $goroot" >&2
	dir=$(go mod download -json "golang.org/toolchain@v0.0.1-go$version.linux-$(go env GOARCH)" |
		sed -n 's/^\t"Dir": "\(.*\)",*$/\1/p')
	[ -n "$dir" ] || say "Go $version could not be downloaded: check GOPROXY"
	cp -r "$dir" $goroot.tmp
	chmod -R u+w $goroot.tmp
	chmod 755 $goroot.tmp/bin/* "$goroot.tmp/pkg/tool/linux_$(go env GOARCH)"/*
	mv $goroot.tmp $goroot
	ln -sf $goroot/bin/go $goroot/bin/gofmt /usr/local/bin/
	;;
esac
