#!/bin/sh
# Builds the real programs that the tests, the demo and make generate run, each from the module
# pinned in the folder of that name, and prints the folder that holds the binaries.
#
#   tools/build.sh NAME      NAME is a folder beside this file
#
# Binaries are kept outside the tree, keyed by the pinned modules and the Go
# version, so that a second call costs nothing. SELKIES_BUILD_CACHE moves that folder.
set -eu

name=${1:?usage: tools/build.sh NAME}
dir=$(cd "$(dirname "$0")" && pwd)/$name
[ -f "$dir/go.mod" ] || { echo "tools/build.sh: no tool set named $name" >&2; exit 2; }

cache=${SELKIES_BUILD_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/packer-plugin-selkies}
key=$(cd "$dir" && { cat go.mod go.sum; go env GOVERSION GOARCH; } | sha256sum | cut -c1-16)
out=$cache/tools/$name-$key
if [ ! -d "$out" ]; then
	mkdir -p "$cache/tools"
	tmp=$(mktemp -d "$cache/tools/.build.XXXXXX")
	trap 'rm -rf "$tmp"' EXIT INT TERM
	echo "building $name from its Go module (once; kept in $out)" >&2
	tags='' cgo=0
	# runc's seccomp filter is libseccomp.
	[ "$name" != runc ] || { tags=seccomp cgo=1; }
	(cd "$dir" && CGO_ENABLED=$cgo GOFLAGS=-mod=readonly go build -trimpath -buildvcs=false \
		-tags "$tags" -ldflags='-s -w' -o "$tmp/bin/" tool)
	mv -T "$tmp/bin" "$out" 2>/dev/null || [ -d "$out" ]
fi
echo "$out"
