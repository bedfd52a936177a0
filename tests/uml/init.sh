#!/bin/bash
# Process 1 of the guest kernel: makes the machine usable, runs $UML_SCRIPT, leaves its status in $UML_OUT.
#
# In:  the kernel passes UML_OUT (a host directory) through; run.sh left `env` in it.
# Out: $UML_OUT/status, written last. The kernel's own exit code says nothing about the script.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8 LC_ALL=C.UTF-8
unset TERM

mount -t proc proc /proc
mount -t sysfs sys /sys
mountpoint -q /dev || mount -t devtmpfs dev /dev
mkdir -p /dev/shm /dev/pts
mount -t tmpfs -o mode=1777 shm /dev/shm
mount -t devpts pts /dev/pts
mount -t tmpfs run /run
# Everything a script keeps outside a disk of its own lives here; hostfs would write to the host's files.
mount -t tmpfs -o size=75% mnt /mnt
mount -t cgroup2 cgroup /sys/fs/cgroup 2>/dev/null
mkdir -p /mnt/tmp /run/lock
chmod 1777 /mnt/tmp
export TMPDIR=/mnt/tmp

ip link set lo up 2>/dev/null || busybox ip link set lo up
. "$UML_OUT/env"
# A machine with a service manager loads its modules itself.
[ -z "${UML_SYSTEMD:-}" ] || . "${0%/*}/systemd.sh"
# By path: hostfs is not where depmod thinks this kernel's modules are.
insmod "/usr/lib/uml/modules/$(uname -r)/kernel/drivers/block/nbd.ko" nbds_max=8 ||
    echo "init.sh: nbd.ko did not load"

cd /mnt || exit 1
export UML_LIB=${0%/*}/lib.sh
bash -c 'set -euo pipefail; . "$UML_LIB"; . "$UML_SCRIPT"' </dev/null
status=$?
echo "init.sh: script ended with $status"
# Renamed into place: the host must never read half a number.
echo "$status" >"$UML_OUT/status.new" && mv "$UML_OUT/status.new" "$UML_OUT/status"
sync -f "$UML_OUT" 2>/dev/null
busybox poweroff -f
