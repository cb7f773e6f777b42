#!/bin/sh
# Fails unless the tree is ready to be released as TAG: version/version.go has that version, and
# CHANGELOG.md begins with it and its date. A pre-release, such as v1.2.3-rc.1, needs no date yet.
#
#   tools/release-check.sh TAG
set -eu

tag=${1:?usage: tools/release-check.sh TAG}
cd "$(dirname "$0")/.."

version=$(sed -n 's/^\tVersion *= "\(.*\)"$/\1/p' version/version.go)
[ "${tag%%-*}" = "v$version" ] || {
	echo "tag $tag is not of version $version, which version/version.go has" >&2
	exit 1
}
newest=$(grep -m 1 '^## ' CHANGELOG.md)
case $tag in
*-*) dated="## $version \\(.+\\)" ;;
*) dated="## $version \\((January|February|March|April|May|June|July|August|September|October|November|December) [0-9]{1,2}, [0-9]{4}\\)" ;;
esac
echo "$newest" | grep -Exq "$dated" || {
	echo "CHANGELOG.md begins with \"$newest\", not with \"## $version (Month D, YYYY)\"" >&2
	exit 1
}
