#!/bin/sh
# Runs every fuzz target for a time, one after the other: fuzz.sh TIME [REGEXP]. What
# fails is kept below testdata/fuzz, and is a test from then on.
set -eu

time=$1
wanted=${2:-.}
log=$(mktemp)
trap 'rm -f "$log"' EXIT
trap 'exit 1' INT TERM

packages=$(go list ./...)
targets=0 executions=0 failed=
for pkg in $packages; do
	list=$(go test -list '^Fuzz' "$pkg") || { echo "$list" >&2; exit 1; }
	for target in $(echo "$list" | grep '^Fuzz' | grep -E "$wanted"); do
		echo "$pkg $target" >&2
		go test -run '^$' -fuzz "^$target\$" -fuzztime "$time" -fuzzminimizetime 5s "$pkg" >"$log" 2>&1 || failed="$failed $target"
		cat "$log"
		n=$(sed -n 's/.* execs: \([0-9]*\) .*/\1/p' "$log" | tail -n 1)
		targets=$((targets + 1)) executions=$((executions + ${n:-0}))
	done
done
[ "$targets" -gt 0 ] || { echo "fuzz.sh: no target matches $wanted" >&2; exit 1; }
echo "fuzzed: $targets targets, $executions inputs, failed:${failed:- none}"
[ -z "$failed" ]
