#!/bin/bash
# Runs the guest's script under systemd (systemd.sh), leaves its status as init.sh does, and shuts the machine down.
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root LANG=C.UTF-8 LC_ALL=C.UTF-8
. /etc/guest.env
export TMPDIR=/mnt/tmp
mount -t tmpfs -o size=50% mnt /mnt
mkdir -p /mnt/tmp
cd /mnt || exit 1
bash -c 'set -euo pipefail; . "$UML_LIB"; . "$UML_SCRIPT"' </dev/null
status=$?
cd /
echo "systemd-run.sh: script ended with $status"
echo "$status" >"$UML_OUT/status.new" && mv "$UML_OUT/status.new" "$UML_OUT/status"
systemctl --no-block poweroff
