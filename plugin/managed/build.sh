#!/bin/bash
# Lays out Docker's managed plugin: its config.json and a root filesystem of the two programs, the libraries they need, a shell and the authorities of TLS.
#
#   plugin/managed/build.sh PROGRAMS DIR     then: docker plugin create NAME DIR
set -euo pipefail
here=$(cd "$(dirname "$0")" && pwd)
[ $# = 2 ] || { echo "usage: $0 PROGRAMS DIR" >&2; exit 2; }
programs=$1 dir=$2
root=$dir/rootfs
[ ! -e "$dir" ] || [ -d "$dir/rootfs" ] || { echo "$dir is there, and no plugin of an earlier build" >&2; exit 1; }
rm -rf "$dir"
mkdir -p "$root"/{bin,dev,etc/ssl/certs,mounts,proc,root,run/docker/plugins,srv,sys,tmp,usr/bin,var/lib/horcrux}
cp "$here/config.json" "$dir/"
cp "$here/start" "$root/start"
busybox=$(PATH=$PATH:/usr/sbin:/sbin type -P busybox) || { echo "busybox is missing: apt-get install busybox-static" >&2; exit 1; }
cp "$busybox" "$root/bin/busybox"
libraries() {
    # Each line that names a file is a library, or the loader itself; a program without any has a line that names none.
    local needed
    needed=$(ldd "$1" 2>/dev/null) || return 0
    case $needed in *"not found"*) echo "$1 lacks a library: $needed" >&2; exit 1 ;; esac
    { grep -o '/[^ ]*' <<<"$needed" || true; } | while read -r library; do
        mkdir -p "$root$(dirname "$library")"
        cp -L "$library" "$root$library"
    done
}
libraries "$busybox"
for name in sh sleep; do ln -s busybox "$root/bin/$name"; done
for name in horcrux-nbd horcrux-dv; do
    strip -o "$root/usr/bin/$name" "$programs/$name"
    libraries "$programs/$name"
done
[ ! -e /etc/ssl/certs/ca-certificates.crt ] || cp -L /etc/ssl/certs/ca-certificates.crt "$root/etc/ssl/certs/"
echo "root:x:0:0:root:/root:/bin/sh" >"$root/etc/passwd"
du -sh "$dir" | cut -f1
