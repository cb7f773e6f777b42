#!/bin/sh
# Makes a cache disk's images known to a stopped dockerd in the way that is usual
# without the injector: a bind mount for each layer, metadata copied. The node has
# nothing but them then.
#   bind.sh STORE ROOT LAYER...   the disk's store, Docker's data root, store directories
set -eu
store=$1 root=$2
shift 2
mkdir -p "$root/overlay2/l"
for layer; do
	dir=$root/overlay2/$layer
	mkdir -p "$dir/diff"
	for f in link lower committed; do
		[ ! -e "$store/overlay2/$layer/$f" ] || cp -p "$store/overlay2/$layer/$f" "$dir/"
	done
	read -r link <"$dir/link" || :
	ln -s "../$layer/diff" "$root/overlay2/l/$link"
	mount --bind "$store/overlay2/$layer/diff" "$dir/diff"
done
rm -rf "$root/image"
cp -a "$store/image" "$root/"
sync -f "$root"
