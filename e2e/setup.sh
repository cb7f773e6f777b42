#!/bin/sh
# Installs what the tests and the demo need on a fresh Debian 12, and says in one
# line why it cannot. Does nothing, quickly, where everything is there.
set -eu

say() { echo "e2e/setup.sh: $*" >&2; exit 1; }

[ "$(uname -s)" = Linux ] || say "this needs Linux, on a Debian 12 machine"
[ "$(id -u)" = 0 ] || say "this boots machines and attaches disks: run it as root"
[ -e /dev/loop-control ] || say "this needs a kernel with loop devices; a container has none"
command -v apt-get >/dev/null || say "this needs Debian 12: no apt-get here"
command -v go >/dev/null || say "no go in PATH: install the version that go.mod names, or any newer one"

# libseccomp, a C compiler and pkg-config are for runc, the rest is run directly.
packages="systemd-container debootstrap e2fsprogs util-linux openssh-client tar
	ca-certificates gcc libc6-dev pkg-config libseccomp-dev"
missing=
for p in $packages; do
	[ "$(dpkg-query -W -f '${db:Status-Status}' "$p" 2>/dev/null)" = installed ] || missing="$missing $p"
done
[ -n "$missing" ] || exit 0
echo "installing$missing" >&2
apt-get update -qq || say "apt-get update failed: check this machine's Debian mirror"
# shellcheck disable=SC2086
DEBIAN_FRONTEND=noninteractive apt-get install -qq -y --no-install-recommends $missing >/dev/null ||
	say "apt-get could not install$missing"
