#!/bin/bash
# Proves the rig without the product: every guest script runs against nbdkit serving a plain image that was
# filled through a loop mount. When this passes and a test of the product fails, the product is at fault.
#
#   tests/uml/selfcheck.sh [mount-ext4|mount-xfs|postgres|powercut|liar]...      (default: all; as root)
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
PATH=$PATH:/usr/sbin:/sbin
tree=$here/../tree.py
work=$(mktemp -d)
mounted=
cleanup() {
    [ -z "$mounted" ] || umount "$mounted"
    rm -rf "$work"
}
trap cleanup EXIT
stand_in=(-e SERVER=nbdkit -e NAME=rig -e "IMAGE=$work/image")

source_tree() {
    [ -e "$work/manifest" ] || {
        "$tree" make "$work/src" --mb "${MB:-40}"
        "$tree" list "$work/src" >"$work/manifest"
    }
}
# Through a loop mount: mke2fs -d would keep whole seconds only, and no attributes of the top directory.
image() {
    local fs=$1 size=$2 from=$3
    rm -f "$work/image"
    truncate -s "$size" "$work/image"
    case $fs in
    ext4) mke2fs -q -t ext4 "$work/image" ;;
    xfs) mkfs.xfs -q "$work/image" ;;
    esac
    mkdir -p "$work/mnt"
    mount -o loop "$work/image" "$work/mnt"
    mounted=$work/mnt
    cp -a --sparse=always "$from/." "$work/mnt"
    umount "$work/mnt"
    mounted=
}

mount_ext4() {
    source_tree
    image ext4 1G "$work/src"
    "$here/run.sh" -o "$work/out" "${stand_in[@]}" -e FS=ext4 -e "MANIFEST=$work/manifest" \
        -e CONNECTIONS=4 "$here/guest/mount.sh"
}
mount_xfs() {
    source_tree
    image xfs 1G "$work/src"
    "$here/run.sh" -o "$work/out" "${stand_in[@]}" -e FS=xfs -e "MANIFEST=$work/manifest" \
        -e TRANSPORT=tcp -e BLOCK=512 "$here/guest/mount.sh"
}
postgres() {
    "$here/postgres-cluster.sh" "$work/pg" "${SCALE:-5}"
    image ext4 2G "$work/pg"
    "$here/run.sh" -t 300 -o "$work/out" "${stand_in[@]}" -e FS=ext4 -e PGBIN="$(ls -d /usr/lib/postgresql/*/bin | tail -1)" \
        -e PGUID="$(stat -c %u "$work/pg/PG_VERSION")" "$here/guest/postgres.sh"
}
powercut() {
    mkdir -p "$work/empty"
    image ext4 512M "$work/empty"
    "$here/powercut.sh" -r "${ROUNDS:-3}" -o "$work/cut" "${stand_in[@]}" -e FS=ext4
}

# A server that answers FLUSH and keeps everything in memory: the check must notice, or it checks nothing.
liar() {
    mkdir -p "$work/empty"
    image ext4 512M "$work/empty"
    if "$here/powercut.sh" -r 1 -o "$work/cut" "${stand_in[@]}" -e FS=ext4 -e STAND_IN_FILTER=cache \
        -e STAND_IN_ARGS=cache=unsafe >"$work/liar" 2>&1; then
        echo "selfcheck: lost writes went unnoticed" >&2
        return 1
    fi
    grep -q 'powercut: WRONG' "$work/liar" || { cat "$work/liar" >&2; return 1; }
}

cases=("$@")
[ $# -gt 0 ] || cases=(mount-ext4 mount-xfs postgres powercut liar)
for one in "${cases[@]}"; do
    start=$SECONDS
    "${one//-/_}"
    [ -z "${VERBOSE:-}" ] || cat "$work/out/console" 2>/dev/null || true
    echo "selfcheck: $one passed in $((SECONDS - start)) s"
done
