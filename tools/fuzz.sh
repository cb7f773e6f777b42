#!/bin/sh
# Runs every fuzz target for a time, one after the other: fuzz.sh TIME [REGEXP]. What
# fails is kept below testdata/fuzz, and is a test from then on.
set -eu

time=$1
for pkg in $(go list ./...); do
	targets=$(go test -list '^Fuzz' "$pkg" | grep '^Fuzz' || true)
	for target in $targets; do
		echo "$target" | grep -Eq "${2:-.}" || continue
		echo "$pkg $target" >&2
		go test -run '^$' -fuzz "^$target\$" -fuzztime "$time" -fuzzminimizetime 5s "$pkg"
	done
done
