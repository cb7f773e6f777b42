#!/bin/sh
# Fetches the library that lays out the report's picture anew from the npm registry, and
# checks it against the sums in the tree.
#
#   tools/d3-hierarchy.sh            the version that is there
#   tools/d3-hierarchy.sh VERSION    another one, of which the sums are written: read what changed
set -eu

dir=$(cd "$(dirname "$0")/.." && pwd)/htmlreport/d3-hierarchy
version=${1:-$(sed -n '1s/.* v\([0-9.]*\) .*/\1/p' "$dir/d3-hierarchy.min.js")}
tmp=$(mktemp -d "${TMPDIR:-/tmp}/selkies-d3.XXXXXX")
trap 'rm -rf "$tmp"' EXIT INT TERM
cd "$tmp"
# npm checks what it fetches against the registry's own sum.
npm pack --silent "d3-hierarchy@$version" >/dev/null
tar -xzf "d3-hierarchy-$version.tgz" --strip-components=1 package/LICENSE package/dist/d3-hierarchy.min.js
mv dist/d3-hierarchy.min.js .
if [ $# -gt 0 ]; then
	sha256sum LICENSE d3-hierarchy.min.js >"$dir/SHA256SUMS"
fi
sha256sum --quiet --check "$dir/SHA256SUMS"
install -m 644 LICENSE d3-hierarchy.min.js "$dir"
