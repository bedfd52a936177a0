# The driver as Docker's managed plugin: dockerd runs it, and the daemon, in a container of its own.
#
# In: PLUGIN, as plugin/managed/build.sh leaves it; REPOSITORIES, a directory with the repository `repo`.
REPO=/srv/repo
. "${UML_LIB%/*}/docker-lib.sh"
start_dockerd
import_tools
mkdir -p "$STATE"
docker plugin create horcrux "$PLUGIN" >/dev/null
docker plugin set horcrux state.source="$STATE" repositories.source="$REPOSITORIES"
docker plugin enable horcrux >/dev/null || { tail -30 "$UML_OUT/dockerd.log"; fail "the plugin can't be enabled"; }
say "the plugin is enabled"
docker volume create -d horcrux -o name=image -o access="$REPO" m1 >/dev/null
run -v m1:/data tools sh -c 'ls /data; echo written >/data/by-plugin' | grep -qx data || fail "a container does not see what is in the image"
wait_until "the device to be let go" nothing_connected
[ "$(run -v m1:/data tools cat /data/by-plugin)" = written ] || fail "a write is lost"

# The daemon in it is killed under a container, and the container does not notice.
docker run -d --name c1 --network none -v m1:/data tools sh -c 'while :; do echo >>/data/lines && sync || echo >/failed; sleep 1; done' >/dev/null
# What Docker tells of is the place within the plugin.
at=$(awk '$5 ~ /propagated-mount.m1$/ {at = $5} END {print at}' /proc/self/mountinfo)
wait_until "the container to write" test -s "$at/lines"
refused "in use" docker plugin disable horcrux
pkill -KILL -x horcrux-nbd
lines=$(wc -l <"$at/lines")
more() { [ "$(wc -l <"$at/lines")" -gt "$lines" ]; }
wait_until "the container to write on after a kill" more
docker exec c1 test ! -e /failed || fail "a write failed"
no_errors "after a kill"
docker rm -f c1 >/dev/null
docker volume rm m1 >/dev/null
wait_until "the device to be let go" nothing_connected
docker plugin disable horcrux >/dev/null
docker plugin rm horcrux >/dev/null
! pgrep -x 'horcrux-.*' || fail "processes are left"
end_it "$dockerd_pid" TERM
trap - EXIT
say "the managed plugin came and went"
