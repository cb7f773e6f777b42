#!/bin/sh
# Builds both binaries in two copies of the tree, at paths of different lengths and each
# with a build cache of its own, and fails if they differ. SHARE_CACHE=1 is quicker: a
# result that depends on the directory has another key there.
set -eu

cd "$(dirname "$0")/.."
tmp=$(mktemp -d)
trap 'chmod -R u+w "$tmp"; rm -rf "$tmp"' EXIT INT TERM
for copy in a a/longer/path; do
	mkdir -p "$tmp/$copy/tree"
	# Also what is not committed yet.
	git ls-files -z --cached --others --exclude-standard | tar -c --null --no-recursion -T - | tar -x -C "$tmp/$copy/tree"
	[ -n "${SHARE_CACHE:-}" ] || export GOCACHE="$tmp/$copy/cache"
	(cd "$tmp/$copy/tree" && make -s build injector && sha256sum build/packer-plugin-selkies build/selkies-image-injector) >"$tmp/$copy.sums"
done
cat "$tmp/a.sums"
diff "$tmp/a.sums" "$tmp/a/longer/path.sums" || { echo "tools/reproducible.sh: the two builds differ" >&2; exit 1; }
