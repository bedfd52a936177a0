#!/bin/bash
# Runs a command with a GlusterFS volume mounted: two bricks with a copy each, in a network namespace of their own.
#
#   unshare --net --mount --pid --fork --kill-child --mount-proc tests/mounts/gluster.sh DIR COMMAND...
#
# In:   DIR, an empty directory on a filesystem that keeps extended attributes. COMMAND gets HORCRUX_MOUNT, where the volume is, and HORCRUX_BRICK, the pid of a
#       brick that may be killed.
# Exit: the command's. With it all processes end and the mount goes: they are in the caller's namespaces.
set -euo pipefail
dir=$1
shift
address=10.77.0.1
ip link set lo up
ip addr add $address/32 dev lo
mkdir -p "$dir"/{work,run,one,two,mount}
cat >"$dir/glusterd.vol" <<EOF
volume management
    type mgmt/glusterd
    option working-directory $dir/work
    option run-directory $dir/run
    option transport-type socket
    option transport.socket.bind-address $address
    option transport.socket.listen-port 24007
end-volume
EOF
glusterd -N -f "$dir/glusterd.vol" -l "$dir/glusterd.log" -p "$dir/glusterd.pid" &
gluster() { command gluster --mode=script --log-file="$dir/cli.log" "$@"; }
for _ in $(seq 100); do
    gluster pool list >/dev/null 2>&1 && break
    sleep 0.2
done
# `force`: both on one host is for tests.
gluster volume create v replica 2 $address:"$dir/one" $address:"$dir/two" force
gluster volume start v
mount -t glusterfs -o log-file="$dir/mount.log" $address:/v "$dir/mount"
HORCRUX_MOUNT=$dir/mount HORCRUX_BRICK=$(pgrep -f "brick-name $dir/one ") "$@"
