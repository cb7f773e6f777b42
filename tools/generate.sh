#!/bin/sh
# Generates the HCL2 specifications, the documentation partials and .web-docs.
#
#   tools/generate.sh          writes them into the tree
#   tools/generate.sh --check  fails if they differ from the tree's
#
# packer-sdc looks upwards for a directory whose name begins with packer-plugin-,
# and never ends where there is none, so it works on a copy with such a name.
set -eu

cd "$(dirname "$0")/.."
PATH=$(tools/build.sh packer-sdc):$PATH
tmp=$(mktemp -d "${TMPDIR:-/tmp}/selkies-generate.XXXXXX")
trap 'rm -rf "$tmp"' EXIT INT TERM
copy=$tmp/packer-plugin-selkies
mkdir "$copy"
find . -path ./build -prune -o -path ./.git -prune -o -type f -print0 | tar -c --null -T - | tar -x -C "$copy"

(
	cd "$copy"
	find . -name '*.hcl2spec.go' -delete
	grep -rl 'Code generated' docs-partials | xargs rm -f
	rm -rf .web-docs/components
	grep -rl '^//go:generate packer-sdc' --include='*.go' . | while read -r file; do
		go generate "$file"
	done
	for kind in provisioner datasource post-processor; do
		[ -d "docs/${kind}s" ] || continue
		packer-sdc renderdocs -src "docs/${kind}s" -partials docs-partials -dst "$tmp/docs/$kind" 2>"$tmp/log" || {
			cat "$tmp/log" >&2
			exit 1
		}
		type=$kind
		[ "$kind" != datasource ] || type=data-source
		for page in "$tmp/docs/$kind"/*.mdx; do
			chmod 644 "$page"
			readme=.web-docs/components/$type/$(basename "$page" .mdx)/README.md
			mkdir -p "$(dirname "$readme")"
			# Without the front matter, which only the old documentation site reads.
			awk 'NR == 1 && /^---$/ { front = 1; next } front && /^---$/ { front = 0; next } !front' "$page" >"$readme"
		done
	done
)

# What is generated, and nothing else: a tree to compare or to copy.
generated() {
	(cd "$1" && find . -path ./build -prune -o -path ./.git -prune -o -type f \
		\( -name '*.hcl2spec.go' -o -path './docs-partials/*' -o -path './.web-docs/components/*' \) -print0 |
		LC_ALL=C sort -z)
}
mkdir "$tmp/new" "$tmp/old"
generated "$copy" | tar -c -C "$copy" --null -T - | tar -x -C "$tmp/new"
generated . | tar -c --null -T - | tar -x -C "$tmp/old"
if [ "${1:-}" = --check ]; then
	diff -ru "$tmp/old" "$tmp/new" || {
		echo "generated files differ from their sources; run make generate and commit" >&2
		exit 1
	}
	exit
fi
generated . | xargs -0r rm -f
tar -c -C "$tmp/new" . | tar -x --no-overwrite-dir
