#!/bin/bash
# Cuts the power of a machine that writes to a volume, again and again, and checks after each boot that nothing
# flushed is lost.
#
#   tests/uml/powercut.sh [-r ROUNDS] [-o OUT] [-m MIB] -e KEY=VALUE...      (-e as for run.sh; FS is needed)
#
# The machine is User Mode Linux, its disk a file: the state directory is on ext4 on /dev/ubda, and SIGKILL at a random
# moment takes kernel, page cache and server at once. Each round boots to write, is cut, boots to check; the
# next goes on with the same disk. CUT_SEED repeats the moments of an earlier run.
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
rounds=3 out= mib=2048 pass=()
while getopts r:o:m:e: opt; do
    case $opt in
    r) rounds=$OPTARG ;;
    o) out=$OPTARG ;;
    m) mib=$OPTARG ;;
    e) pass+=(-e "$OPTARG") ;;
    *) sed -n '2,9p' "$0" >&2; exit 2 ;;
    esac
done
fresh=
[ -n "$out" ] || { out=$(mktemp -d); fresh=$out; }
trap '[ -z "$fresh" ] || rm -rf "$fresh"' EXIT
mkdir -p "$out"
rm -f "$out/flushed" "$out/started"
truncate -s 0 "$out/disk"
truncate -s "${mib}M" "$out/disk"
RANDOM=${CUT_SEED:=$RANDOM}
echo "powercut.sh: CUT_SEED=$CUT_SEED"

for round in $(seq "$rounds"); do
    # Between a moment and four seconds of writing: early cuts meet young files, later ones writeback at work.
    cut=$((RANDOM % 4)).$((RANDOM % 10))
    status=0
    CUT_AFTER=$cut "$here/run.sh" -t 180 -o "$out" -k writing -e "ROUND=$round" "${pass[@]}" \
        "$here/guest/powercut-write.sh" "$out/disk" || status=$?
    [ "$status" = 137 ] || { echo "powercut.sh: round $round ended with $status, not by a power cut" >&2; exit 1; }
    "$here/run.sh" -t 180 -o "$out" -e "ROUND=$round" "${pass[@]}" -e "FLUSHED=$out/flushed" \
        "$here/guest/powercut-check.sh" "$out/disk"
    grep -h '^powercut:' "$out/console"
done
echo "powercut.sh: $rounds power cuts, $(wc -l <"$out/flushed") flushes, nothing lost"
