# The story of the README with a real dockerd: volumes made, used by containers, copied in and out of, under every restart there is, and taken away.
#
# In: HORCRUX_CLI, HORCRUX_NBD, HORCRUX_DV, REPO with the images `image` (ext4) and `other` (XFS), MANIFEST of both; ROUNDS of kills LOOPS of run and remove, COLD of first bytes; REPO has `big` too, of 1 TiB.
. "${UML_LIB%/*}/docker-lib.sh"
start_all

[ "$(docker volume create -d horcrux-nbd -o name=image -o access="$REPO" v1)" = v1 ] || fail "it has another name"
docker volume create -d horcrux-nbd -o --name=other -o --access="$REPO" x1 >/dev/null
docker volume create -d horcrux-nbd -o name=image -o access="$REPO" v1 >/dev/null
refused "unknown option 'acces'" docker volume create -d horcrux-nbd -o name=image -o acces="$REPO" v2
docker volume ls -q -f driver=horcrux-nbd | grep -qx v1 || fail "v1 is not listed"
[ "$(docker volume inspect -f '{{.Status.image}}' v1)" = image@main ] || fail "its status does not say its image"
[ "$(connected)" = 0 ] || fail "a volume nobody uses is a device"
say "volumes are made"

before=$(date +%s%N)
names=$(run -v v1:/data -v x1:/other tools sh -c 'ls /data; ls /other')
[ "$(grep -cx data <<<"$names")" = 2 ] || fail "a container sees only '$names'"
say "a run with two volumes took $((($(date +%s%N) - before) / 1000000)) ms"
wait_until "devices to be let go" nothing_connected
wait_until "mounts to be let go" nothing_mounted
[ -z "$(ls -A "$STATE/mounts")" ] || fail "mountpoints are left"

# The first byte of a cold disk of 1 TiB: what it takes beyond a volume of Docker's own.
first_byte() {
    local began read
    began=$(date +%s%N)
    docker volume create "$@" cold >/dev/null
    read=$(run -v cold:/data tools sh -c 'set -- /data/data/*/*/f*; [ -e "$1" ] || set -- /bin/sh; busybox head -c 1 "$1" | busybox wc -c')
    [ "$read" = 1 ] || fail "'$read' bytes were read"
    echo $((($(date +%s%N) - began) / 1000000))
    docker volume rm cold >/dev/null
}
median() { sort -n | sed -n "$(((COLD + 1) / 2))p"; }
for round in $(seq "$COLD"); do
    first_byte -d local >>/mnt/dockers
    first_byte -d horcrux-nbd -o name=big -o access="$REPO" >>/mnt/ours
done
say "a cold disk of 1 TiB: $(median </mnt/ours) ms to the first byte, a volume of Docker's own $(median </mnt/dockers) ms (medians of $COLD)"
# One round is one of a busy machine.
[ "$COLD" -lt 3 ] || [ $(($(median </mnt/ours) - $(median </mnt/dockers))) -lt 2000 ] || fail "that is 2 s and more beyond Docker's own time"

# Changed by one container, seen by the next; the tree is its source's.
docker run -d --name c1 --network none -v v1:/data tools sh -c 'while :; do sleep 1; done' >/dev/null
at=$(docker volume inspect -f '{{.Mountpoint}}' v1)
[ "$at" = "$STATE/mounts/v1" ] || fail "it is mounted on '$at'"
tree check "$MANIFEST" "$at"
refused "volume is in use" docker volume rm v1
echo "copied in" >/mnt/in
docker cp /mnt/in c1:/data/in
docker cp c1:/data/in /mnt/out
cmp /mnt/in /mnt/out
[ "$(docker exec c1 cat /data/in)" = "copied in" ] || fail "the container does not see what was copied in"
cmp /mnt/in "$at/in" || fail "a copy has unmounted the volume below its container"
say "copied in and out of a running container"

# Every restart there is, under a container that writes.
docker exec -d c1 sh -c 'n=0; while [ ! -e /data/stop ]; do n=$((n + 1)); echo $n >/data/new && sync && mv /data/new /data/count || echo $n >/failed; done; echo $n >/data/done'
wait_until "the container to write" test -e "$at/count"
# And one in which fio writes, reads back and compares, over and over.
docker run -d --name c3 --network none -v v1:/data -v /usr:/usr:ro tools sh -c '
    n=0
    while [ ! -e /data/stop ]; do
        fio --name=v --directory=/data --filename=fio --size=8M --rw=randwrite --bs=4k --direct=1 --ioengine=psync --verify=crc32c --verify_fatal=1 --fsync=64 \
            --output-format=json --output=/fio.json || { echo $n >/failed; break; }
        n=$((n + 1)); cat /fio.json >>/all.json; echo $n >/data/verified
    done; echo $n >/data/verified-all' >/dev/null
wait_until "fio to verify" test -e "$at/verified"
for round in $(seq "$ROUNDS"); do
    end_it "$server_pid" KILL
    sleep 1
    start_daemon
    counted=$(cat "$at/count") verified=$(cat "$at/verified")
    more() { [ "$(cat "$at/count")" -gt "$counted" ] && [ "$(cat "$at/verified")" -gt "$verified" ]; }
    wait_until "the container to write on, and fio to verify, after kill $round" more
done
end_it "$driver_pid" KILL
start_driver
run -v v1:/data tools test -e /data/count
docker exec c1 test -e /data/in
docker exec c1 sh -c 'echo >/data/stop; while [ ! -e /data/done ] || [ ! -e /data/verified-all ]; do sleep 1; done; rm /data/stop'
docker exec c1 test ! -e /failed || fail "a write failed"
docker cp c3:/all.json /mnt/all.json
if docker cp c3:/failed - >/dev/null 2>&1; then fail "fio found an error"; fi
say "fio verified $(cat "$at/verified-all") times 8 MiB; the longest a write or a flush took:" \
    "$(jq -s 'map(.jobs[0] | .write.clat_ns.max, .sync.lat_ns.max) | max / 1e6 | round' /mnt/all.json) ms"
docker rm -f c3 >/dev/null
no_errors "after $ROUNDS kills of the daemon and one of the driver"
say "the daemon was killed $ROUNDS times under a container, which saw no error"

# dockerd ends, and with it its containers; the next one starts them again. One that is killed does not unmount.
docker update --restart always c1 >/dev/null
docker exec c1 sh -c 'echo two >/data/two; sync'
end_it "$dockerd_pid" TERM
start_dockerd
again() { docker exec c1 cat /data/two; }
wait_until "the container to be started again" again
[ "$(docker exec c1 cat /data/two)" = two ] || fail "a write is lost"
kill_dockerd
start_dockerd
wait_until "the container to be started again" again
say "dockerd was stopped once and killed once"

docker rm -f c1 >/dev/null
docker volume rm v1 >/dev/null
wait_until "mounts to be let go" nothing_mounted
wait_until "devices to be let go" nothing_connected
[ -z "$(ls -A "$STATE/mounts")" ] || fail "mountpoints are left"

# Calls Docker would not make: what is mounted is not taken away; an unmount by another's hand leaves nothing to write to; and two may come where one was meant.
docker volume create -d horcrux-nbd -o name=image -o access="$REPO" v2 >/dev/null
v2='{"Name": "v2", "ID": "a"}'
[ "$(driver Mount "$v2" | jq -r .Mountpoint)" = "$STATE/mounts/v2" ] || fail "it is mounted elsewhere"
driver Remove "$v2" | grep -q "volume v2 is in use: a container has it mounted" || fail "it was not refused"
[ "$(mounted)" = 2 ] || fail "there are $(mounted) mounts, not a guard and a volume"
umount "$STATE/mounts/v2"
refused "Read-only file system" touch "$STATE/mounts/v2/lost"
driver Mount "$v2" | grep -q '"Err":""' || fail "it was not mounted again"
[ "$(mounted)" = 2 ] || fail "there are $(mounted) mounts, not a guard and a volume"
for _ in 1 2 3; do driver Unmount "$v2" | grep -q '"Err":""' || fail "an unmount was refused"; done
nothing_mounted || fail "it is mounted still"
nothing_connected || fail "it is a device still"
driver Mount "$v2" | grep -q '"Err":""'
end_it "$driver_pid" KILL
start_driver
# The one before may have died before Docker heard of the mount: the kernel says that nobody uses it.
docker volume rm v2 >/dev/null
nothing_mounted || fail "it is mounted still"
nothing_connected || fail "it is a device still"
# The driver's memory is lost: what is mounted stays, and goes when nobody has it.
docker volume create -d horcrux-nbd -o name=image -o access="$REPO" v2 >/dev/null
driver Mount "$v2" | grep -q '"Err":""'
end_it "$driver_pid" KILL
rm "$STATE/driver/volumes.json"
start_driver
docker volume inspect v2 x1 >/dev/null || fail "the driver has forgotten its volumes"
[ "$(mounted)" = 2 ] || fail "there are $(mounted) mounts, not a guard and a volume"
exec 9<"$STATE/mounts/v2/data"
refused "someone has a file open" docker volume rm v2
exec 9<&-
docker volume rm v2 >/dev/null
nothing_mounted || fail "it is mounted still"
say "mounted and unmounted as Docker would not"

# memory_of PID: what a process has in memory, in KiB; use_of PID: that, and how many files open.
memory_of() { awk '/^VmRSS/ {print $2}' "/proc/$1/status"; }
use_of() { echo "$(memory_of "$1") KiB, $(ls "/proc/$1/fd" | wc -l) files"; }
for loop in $(seq "$LOOPS"); do
    [ $((loop % 20)) != 1 ] || say "round $loop: daemon $(use_of "$server_pid"); driver $(use_of "$driver_pid"); $(docker volume ls -q | wc -l) volumes, $(connected) devices"
    docker volume create -d horcrux-nbd -o name=image -o access="$REPO" "loop$loop" >/dev/null
    run -v "loop$loop:/data" tools sh -c 'echo >/data/x'
    docker volume rm "loop$loop" >/dev/null
    # Half of the rounds have filled what is kept for reuse.
    [ $loop != $((LOOPS / 2)) ] || before=$(($(memory_of "$server_pid") + $(memory_of "$driver_pid")))
done
after=$(($(memory_of "$server_pid") + $(memory_of "$driver_pid")))
[ "$LOOPS" -lt 100 ] || [ $after -le $((before + 4096)) ] || fail "daemon and driver grew from $before to $after KiB"
wait_until "devices to be let go" nothing_connected
say "$LOOPS times made, run and removed: daemon $(use_of "$server_pid"); driver $(use_of "$driver_pid")"

# A daemon that is away is said so, and what was to be let go is let go when it is back.
docker run -d --name c2 --network none -v x1:/data tools sleep 1000 >/dev/null
end_it "$server_pid" KILL
refused "no daemon answers at" docker volume create -d horcrux-nbd -o name=image -o access="$REPO" v3
docker volume ls -q | grep -qx x1 || fail "Docker has forgotten a volume"
docker rm -f c2 >/dev/null
start_daemon
wait_until "the volume to be unmounted after all" nothing_mounted
wait_until "the device to be let go after all" nothing_connected

docker volume rm x1 >/dev/null
[ -z "$(docker volume ls -q -f driver=horcrux-nbd)" ] || fail "volumes are left"
[ -z "$(ls -A "$STATE/volumes" | grep -v '^\.')" ] || fail "directories of volumes are left"
[ -z "$(ls -A "$STATE/mounts")" ] || fail "mountpoints are left"
nothing_connected || fail "devices are left"
end_it "$dockerd_pid" TERM
end_it "$driver_pid" TERM
[ ! -e /run/docker/plugins/horcrux-nbd.sock ] || fail "the driver's socket is left"
stop_server
trap - EXIT
say "everything made, used and removed by docker"
