#!/bin/bash
# What Horcrux does, in a screenful: a real directory becomes an image, is served, read and written by other people's
# NBD clients, and served again. `make demo` builds first. Needs no root; leaves nothing behind.
set -euo pipefail
cd "$(dirname "$0")/.."
PATH=$PATH:/usr/sbin:/sbin
bin=${HORCRUX_BIN_DIR:-target/release}
mib=${DEMO_MIB:-300}
for tool in nbdinfo nbdcopy qemu-io e2fsck debugfs; do
    command -v "$tool" >/dev/null || { echo "demo: $tool is missing; 'make packages' installs it" >&2; exit 1; }
done

work=$(mktemp -d)
server=
cleanup() {
    [ -z "$server" ] || { kill -KILL "$server" 2>/dev/null && wait "$server" 2>/dev/null; } || true
    # A copied directory may have come without the right to empty it.
    chmod -R u+rwX "$work" 2>/dev/null || true
    rm -rf "$work"
}
trap cleanup EXIT
trap 'exit 130' INT TERM

say() { printf '\n\033[1m%s\033[0m\n' "$*"; }
line() { printf '  %-28s %s\n' "$1" "$2"; }
disk_use() { du -sh "$1" | cut -f1; }
now() { date +%s.%N; }
since() { awk -v a="$1" -v b="$(now)" 'BEGIN { printf "%.2f s", b - a }'; }
bytes() { numfmt --to=iec --suffix=B --format=%.1f "$1"; }

sock=$work/nbd.sock
uri="nbd+unix:///DEMO?socket=$sock"
serve() {
    local start end
    start=$(now)
    "$bin/horcrux-nbd" serve --access "$work/repo" --name DEMO --unix "$sock" --state-dir "$work/state" \
        >>"$work/server.log" 2>&1 &
    server=$!
    end=$((SECONDS + 30))
    until nbdinfo --size "$uri" >/dev/null 2>&1; do
        if ! kill -0 "$server" 2>/dev/null || [ $SECONDS -ge $end ]; then
            echo "demo: the server does not answer; its log:" >&2
            cat "$work/server.log" >&2
            exit 1
        fi
        sleep 0.02
    done
    line "$1" "$(since "$start") from start to a client's first answer"
}
stop() {
    kill -TERM "$server"
    wait "$server" || { echo "demo: the server ended with $?" >&2; cat "$work/server.log" >&2; exit 1; }
    server=
}
# How many bytes of the disk are in this volume's delta; how many of the image are not on this machine yet (a hole
# counts as here: there is nothing to fetch).
dirty() { nbdinfo --map=x-horcrux:dirty "$uri" | awk '$3 != 0 { sum += $2 } END { printf "%d", sum }'; }
absent() { nbdinfo --map=x-horcrux:cached "$uri" | awk '$3 == 0 { sum += $2 } END { printf "%d", sum }'; }

# The source: pieces of this system up to the wanted size, and one of everything that tools forget.
mkdir "$work/src"
taken=0
for piece in /usr/share/* /usr/lib/*; do
    [ -d "$piece" ] && [ ! -L "$piece" ] || continue
    mb=$({ du -sxm "$piece" 2>/dev/null || true; } | cut -f1)
    [ "$mb" -gt 0 ] && [ $((taken + mb)) -le "$mib" ] || continue
    # What this user may not read stays out.
    mkdir -p "$work/src/$(dirname "${piece#/}")"
    cp -a "$piece" "$work/src/${piece#/}" 2>/dev/null || true
    taken=$((taken + mb))
done
find "$work/src" ! -type l ! -readable -prune -exec rm -rf {} + 2>/dev/null || true
tests/tree.py make "$work/src/odd-things" --mb 4 2>/dev/null

say "1. A directory becomes an image"
line "directory" "$(disk_use "$work/src"), $(find "$work/src" | wc -l) entries: sparse files, hard links, xattrs, ACLs, fifos, odd names"
start=$(now)
"$bin/horcrux-cli" image-from-dir --size 20G DEMO "$work/src" "$work/repo" >"$work/made" 2>&1 || { cat "$work/made" >&2; exit 1; }
tail -6 "$work/made" | sed 's/^/  | /'
line "image-from-dir" "$(since "$start"); the repository takes $(disk_use "$work/repo") for a disk of 20 GiB"

sums() { (cd "$work/repo" && find . -type f -exec sha256sum {} + | sort); }
before=$(sums)

say "2. It is served, and only what is read is fetched"
serve "horcrux-nbd serve"
at_start=$(absent)
fetched() { line "$1" "$(bytes $((at_start - $(absent)))) of $(bytes "$at_start") in a disk of $(bytes "$(nbdinfo --size "$uri")")"; }
fetched "fetched before any read"
qemu-io -r -f raw -c 'read 0 4k' "$uri" >"$work/qemu" 2>&1 || { cat "$work/qemu" >&2; exit 1; }
fetched "after qemu-io read 4 KiB"
start=$(now)
nbdcopy "$uri" "$work/copy.img"
line "nbdcopy of the whole disk" "$(since "$start"), $(disk_use "$work/copy.img") of data, the rest holes"
fetched "fetched after it"
e2fsck -fn "$work/copy.img" >"$work/fsck" 2>&1 || { cat "$work/fsck" >&2; exit 1; }
line "e2fsck of the copy" "clean"
same=0
while read -r path; do
    debugfs -R "cat \"/$path\"" "$work/copy.img" 2>/dev/null | cmp -s - "$work/src/$path" ||
        { echo "demo: $path differs from its source" >&2; exit 1; }
    same=$((same + 1))
done < <(cd "$work/src" && find usr -type f -size +0 -size -512k ! -name '*"*' | LC_ALL=C sort | awk 'NR % 97 == 1' | head -40)
line "debugfs reads files" "$same compared with the source: the same"

say "3. Writes stay in the volume's delta"
# The end of the disk is free space in this filesystem.
qemu-io -f raw -c 'write -P 0x48 20000M 3M' -c 'write -P 0x58 20100M 4k' -c flush "$uri" >"$work/qemu" 2>&1 ||
    { cat "$work/qemu" >&2; exit 1; }
line "qemu-io writes and flushes" "3 MiB and 4 KiB"
nbdinfo --map=x-horcrux:dirty "$uri" | awk '$3 != 0' | head -4 | sed 's/^ */  | dirty: offset /'
[ "$(sums)" = "$before" ] || { echo "demo: the repository changed" >&2; exit 1; }
line "the delta holds" "$(bytes "$(dirty)"); the repository is byte for byte as it was"
stop
serve "stopped and served again"
qemu-io -r -f raw -c 'read -P 0x48 20000M 3M' -c 'read -P 0x58 20100M 4k' "$uri" >"$work/qemu" 2>&1
if grep -q 'Pattern verification failed' "$work/qemu"; then cat "$work/qemu" >&2; exit 1; fi
line "qemu-io reads them back" "the same bytes"
line "the delta holds" "$(bytes "$(dirty)"); nothing had to be fetched again"
[ "$(absent)" = 0 ] || { echo "demo: $(absent) bytes are gone from the cache" >&2; exit 1; }
stop
say "Done; everything was in $work, which is gone now."
