# The daemon's volumes as kernel devices: attached and detached by the command line, under every kind of end a daemon can have.
#
# In: HORCRUX_CLI, HORCRUX_NBD, REPO with the images `image` (ext4), `other` (XFS) and `third`, MANIFEST of the first two; ROUNDS of kills, LOOPS of attach and detach.
export HORCRUX_STATE_DIR=$STATE
cli() { "$HORCRUX_CLI" "$@"; }

start_daemon() {
    "$HORCRUX_NBD" serve "$@" >>"$UML_OUT/server.log" 2>&1 &
    server_pid=$!
    wait_until "the daemon's answer" cli status
}
kill_daemon() {
    kill -9 "$server_pid"
    wait "$server_pid" 2>/dev/null || true
}
descriptors() { ls "/proc/$server_pid/fd" | wc -l; }

mkdir -p /mnt/fs /mnt/fs2
start_daemon
cli volume create v1 --access "$REPO" --name image
cli volume create v2 --access "$REPO" --name image
cli volume create x1 --access "$REPO" --name other

dev=$(cli attach v1)
[ -b "$dev" ] || fail "'$dev' is no device"
[ "$(cli attach v1)" = "$dev" ] || fail "attached again, it is another device"
[ "$(cat "/sys/block/${dev#/dev/}/queue/logical_block_size")" = 4096 ] || fail "the block size of ext4 is not 4096"
mount "$dev" /mnt/fs
tree check "$MANIFEST" /mnt/fs
say "attached, mounted, and it is its source"
refused "volume v1 is in use: $dev is mounted on /mnt/fs" cli detach v1
refused "volume v1 is in use: it is attached as $dev" cli volume rm v1
refused "$dev is in use" cli attach v2 "$dev"
refused "there is no /dev/sda" cli attach v2 /dev/sda
refused "there is no volume v9" cli attach v9
dev2=$(cli attach v2)
[ "$dev2" != "$dev" ] || fail "two volumes on one device"
devx=$(cli attach x1)
[ "$(cat "/sys/block/${devx#/dev/}/queue/logical_block_size")" = 512 ] || fail "the block size of XFS is not its sector's"
mount "$devx" /mnt/fs2
umount /mnt/fs2
echo "written to the device itself" | dd of="$dev2" bs=4096 seek=2000 conv=notrunc,sync status=none
cli detach v2
cli detach v2
cli detach x1
[ "$(cli attach v2 /dev/nbd7)" = /dev/nbd7 ] || fail "not the device that was asked for"
[ "$(dd if=/dev/nbd7 bs=4096 skip=2000 count=1 status=none | head -1)" = "written to the device itself" ] || fail "a write to the device is lost"
cli detach v2
[ "$(connected)" = 1 ] || fail "$(connected) devices are connected, not 1"
say "devices come and go"

# Mounted in one step: two volumes of one XFS, whose UUID is one; what fails gives its device back.
cli volume create x2 --access "$REPO" --name other --read-only
mkdir -p /mnt/x1 /mnt/x2
cli mount x1 /mnt/x1
cli mount x1 /mnt/x1
cli mount x2 /mnt/x2
tree check "$MANIFEST" /mnt/x1
tree check "$MANIFEST" /mnt/x2
if touch /mnt/x2/new 2>/dev/null; then fail "a read-only volume was written to"; fi
echo kept >/mnt/x1/kept
refused "is mounted on /mnt/x1" cli detach x1
exec 9</mnt/x1/kept
refused "is in use: someone has a file open" cli umount x1
exec 9<&-
refused "volume x1 is not mounted on /mnt/x2" cli umount x1 /mnt/x2
cli umount x1
cli umount x2 /mnt/x2
refused "can't find the directory /mnt/nowhere" cli mount x1 /mnt/nowhere
[ "$(connected)" = 1 ] || fail "$(connected) devices are connected, not 1"
cli mount x1 /mnt/x1
[ "$(cat /mnt/x1/kept)" = kept ] || fail "a write is lost"
cli umount x1
cli umount x1
# And made in the same step, and taken away.
mkdir -p /mnt/new
[ "$(cli mount --access "$REPO" --name other --read-only /mnt/new)" = /mnt/new ] || fail "it is mounted elsewhere"
tree check "$MANIFEST" /mnt/new
cli mount --access "$REPO" --name other@main --read-only other /mnt/new
cli umount --rm other
cli mount --access "$REPO" --name image named /mnt/new
refused "there is a volume named already" cli mount --access "$REPO" --name other named /mnt/x1
refused "no volume is mounted on /mnt/none" cli umount /mnt/none
refused "which? 'umount VOLUME DIR', or 'umount DIR'" cli umount /mnt/new /mnt/new
cli umount --rm /mnt/new/
refused "can't find the directory /mnt/nowhere" cli mount --access "$REPO" --name image /mnt/nowhere
refused "which volume?" cli mount /mnt/new
if cli volume inspect image 2>/dev/null; then fail "a volume is left by a mount that failed"; fi
[ "$(connected)" = 1 ] || fail "$(connected) devices are connected, not 1"
# All at once, as before the host goes down; what is in use is told of, and the others go.
cli mount x1 /mnt/x1
cli mount x2 /mnt/x2
exec 9</mnt/x1/kept
refused "not all were unmounted: " cli umount --all
exec 9<&-
! mountpoint -q /mnt/x2 || fail "x2 is mounted still"
! mountpoint -q /mnt/fs || fail "v1 is mounted still"
cli umount --all
[ "$(connected)" = 0 ] || fail "$(connected) devices are connected"
dev=$(cli attach v1)
mount "$dev" /mnt/fs
say "mounted and unmounted in one step"

# A repository that hangs: the mount is given up, and what comes of it later is undone.
insmod "/usr/lib/uml/modules/$(uname -r)/kernel/fs/fuse/fuse.ko"
mkdir -p /mnt/slow /mnt/late
mke2fs -q -t ext4 -d "$REPO" /mnt/slow.img 256M
fuse2fs -f -o ro /mnt/slow.img /mnt/slow >"$UML_OUT/fuse.log" 2>&1 &
fuse_pid=$!
wait_until "the slow repository" test -e /mnt/slow/format
cli volume create slow --access /mnt/slow --name third
kill -STOP "$fuse_pid"
before=$SECONDS
refused "volume slow could not be mounted within 20 s" cli mount slow /mnt/late
waited=$((SECONDS - before))
[ $waited -ge 19 ] && [ $waited -le 29 ] || fail "it was given up after $waited s"
[ "$(connected)" = 1 ] || fail "$(connected) devices are connected, not 1"
kill -CONT "$fuse_pid"
undone() { grep "unmounted" "$UML_OUT/server.log" | grep -q "/mnt/late"; }
wait_until "the late mount to be undone" undone
only_one() { [ "$(connected)" = 1 ]; }
wait_until "its device to be given back" only_one
! mountpoint -q /mnt/late || fail "it is mounted"
# One that was attached before stays so.
cli volume rm slow
cli volume create slow --access /mnt/slow --name third
cli attach slow
kill -STOP "$fuse_pid"
refused "volume slow could not be mounted within 20 s" cli mount slow /mnt/late
kill -CONT "$fuse_pid"
undone() { [ "$(grep "unmounted" "$UML_OUT/server.log" | grep -c "/mnt/late")" = 2 ]; }
wait_until "the late mount to be undone" undone
sleep 1
[ "$(connected)" = 2 ] || fail "$(connected) devices are connected, not 2"
cli detach slow
# One whose daemon was killed goes on with the next, which mounts no second time.
cli volume rm slow
cli volume create slow --access /mnt/slow --name third
cli attach slow
kill -STOP "$fuse_pid"
cli mount slow /mnt/late 2>/dev/null &
asking=$!
mounting() { pgrep -f '^/proc/self/exe apart ."Mount"'; }
wait_until "the mount to begin" mounting
kill_daemon
wait "$asking" && fail "a mount without a daemon"
mounting >/dev/null || fail "nobody mounts any more"
kill -CONT "$fuse_pid"
start_daemon
cli mount slow /mnt/late
[ "$(grep -c " /mnt/late " /proc/self/mountinfo)" = 1 ] || fail "it is not mounted once"
[ "$(connected)" = 2 ] || fail "$(connected) devices are connected, not 2"
cli umount --rm slow
umount /mnt/slow
say "a mount that came too late was undone"

# Killed, and stopped, under a program that writes: a pause, no error.
fio --name=w --directory=/mnt/fs --rw=randwrite --bs=4k --size=24m --verify=crc32c --verify_backlog=64 --time_based \
    --runtime=$((ROUNDS * 5 + 5)) --fsync=16 --ioengine=psync --output="$UML_OUT/fio" --output-format=json &
fio_pid=$!
for round in $(seq "$ROUNDS"); do
    sleep 2
    if [ $((round % 3)) = 0 ]; then stop_server; else kill_daemon; fi
    sleep 1
    start_daemon
done
wait "$fio_pid" || { cat "$UML_OUT/fio"; fail "fio ended with $?"; }
no_errors "after $ROUNDS ends of the daemon"
umount /mnt/fs
fsck_clean "$dev" ext4
mount "$dev" /mnt/fs
pause=$(/usr/bin/python3 -c 'import json, sys
text = open(sys.argv[1]).read()
job = json.loads(text[text.index("{"):])["jobs"][0]
assert job["error"] == 0 and job["write"]["total_ios"] > 0, job
print(round(max(job[what]["lat_ns"]["max"] for what in ("read", "write", "sync")) / 1e6))' "$UML_OUT/fio")
say "$ROUNDS daemons ended under fio, which saw no error; the longest pause was $pause ms, 1000 of them without a daemon"

# Acknowledged and not flushed: the kernel will not write it again, so a kill takes none of it.
dev2=$(cli attach v2)
dd if=/dev/urandom of=/mnt/tmp/written bs=1M count=8 status=none
for start in 512 600 700; do
    dd if=/mnt/tmp/written of="$dev2" bs=64k seek=$((start * 16)) oflag=direct conv=notrunc status=none
    kill_daemon
    start_daemon
    dd if="$dev2" bs=64k skip=$((start * 16)) count=128 iflag=direct status=none | cmp - /mnt/tmp/written ||
        fail "what was written and not flushed is lost with the daemon"
done
cli detach v2
rm /mnt/tmp/written
say "a daemon that was killed took nothing with it that was not flushed"

# Killed while it unmounts what has much to write: the unmount waits for the next daemon, and nothing is lost.
umount /mnt/fs
cli detach v1
unmounting() { pgrep -f "^/proc/self/exe apart .*Unmount"; }
waiting=
for try in 1 2 3 4 5 6; do
    cli mount v1 /mnt/fs >/dev/null
    dd if=/dev/urandom of=/mnt/fs/late bs=1M count=64 status=none
    late=$(sha256sum </mnt/fs/late)
    cli umount v1 2>/dev/null &
    asking=$!
    while kill -0 "$asking" 2>/dev/null && ! unmounting >/dev/null; do :; done
    kill_daemon
    # It may have been over before.
    if ! wait "$asking" && waiting=$(unmounting); then break; fi
    start_daemon
    cli umount v1 2>/dev/null || true
done
[ -n "$waiting" ] || fail "every unmount was over before the daemon was killed"
! ls -l "/proc/$waiting/fd" | grep -E "socket:|$STATE" || fail "what waits for the device has the daemon's descriptors"
start_daemon
wait_until "the unmount to end" cli umount v1
! unmounting || fail "it is unmounted still"
[ "$(connected)" = 0 ] || fail "$(connected) devices are left"
cli mount v1 /mnt/fs >/dev/null
[ "$(sha256sum </mnt/fs/late)" = "$late" ] || fail "what was written before the unmount is lost"
rm /mnt/fs/late
cli umount v1
dev=$(cli attach v1)
fsck_clean "$dev" ext4
cli detach v1
no_errors "after a daemon that was killed while it unmounted"
say "the daemon was killed while it unmounted; the unmount went on with the next one"

# Gone for longer than the device waits: errors then, and a way back.
stop_server
start_daemon --dead-timeout 3
dev=$(cli attach v1)
kill_daemon
before=$SECONDS
if dd if="$dev" of=/dev/null bs=4096 count=1 iflag=direct status=none 2>/dev/null; then fail "a read without a daemon succeeded"; fi
waited=$((SECONDS - before))
[ $waited -ge 2 ] && [ $waited -le 30 ] || fail "it failed after $waited s, not 3"
start_daemon
cli detach v1
dev=$(cli attach v1)
mount "$dev" /mnt/fs
umount /mnt/fs
say "a daemon that stayed away too long: an error after $waited s, and attached again it is well"

# Somebody else's hand.
nbd-client -d "$dev" >/dev/null
detached() { cli volume inspect v1 | grep -q "attached" && return 1; return 0; }
wait_until "the daemon to see it" detached
dev=$(cli attach v1)
cli detach v1
say "detached by another hand, it can be attached again"

before=$(descriptors)
for _ in $(seq "$LOOPS"); do
    cli attach v1 >/dev/null
    cli detach v1 >/dev/null
done
[ "$(connected)" = 0 ] || fail "$(connected) devices are left"
settled() { [ "$(descriptors)" -le $((before + 4)) ]; }
wait_until "the daemon to close what it used ($(descriptors) descriptors, $before before)" settled
say "$LOOPS times attached and detached, nothing left"

# More volumes than the driver has devices: it makes more.
devices=$(ls -d /sys/block/nbd* | wc -l)
for n in $(seq $((devices + 2))); do
    cli volume create "many$n" --access "$REPO" --name image >/dev/null
    cli attach "many$n" >/dev/null
done
[ "$(connected)" = $((devices + 2)) ] || fail "$(connected) devices are connected, not $((devices + 2))"
for n in $(seq $((devices + 2))); do
    cli detach "many$n" >/dev/null
    cli volume rm "many$n" >/dev/null
done
say "$((devices + 2)) volumes attached, where the driver had $devices devices"

# A filesystem that was damaged: it is said, with the way out, and the device is given back; mended it can be mounted.
mkdir -p /mnt/broken
# damage VOLUME IMAGE BYTE COUNT WORDS MEND...: zeros there.
damage() {
    local volume=$1 image=$2 byte=$3 count=$4 words=$5 dev
    shift 5
    cli volume create "$volume" --access "$REPO" --name "$image" >/dev/null
    dev=$(cli attach "$volume")
    dd if=/dev/zero of="$dev" bs=1 seek="$byte" count="$count" conv=notrunc,fsync status=none
    cli detach "$volume"
    refused "$words filesystem is damaged, or newer than this kernel" cli mount "$volume" /mnt/broken
    refused "hint: mend it: 'horcrux-cli attach VOLUME', '$1" cli mount "$volume" /mnt/broken
    [ "$(connected)" = 0 ] || fail "$(connected) devices are left"
    dev=$(cli attach "$volume")
    "$@" "$dev" >/dev/null 2>&1 || [ $? = 1 ] || fail "$1 could not mend it"
    cli detach "$volume"
    cli mount "$volume" /mnt/broken
    tree check --allow-extra "$MANIFEST" /mnt/broken
    cli umount "$volume"
    cli volume rm "$volume" >/dev/null
}
# The group descriptors of ext4; in XFS's superblock how much is free.
damage broken4 image 4096 4096 ext4 e2fsck -fy
damage brokenx other 144 8 xfs xfs_repair
say "a damaged filesystem is said to be so, and mended"

cli volume rm v1 v2 x1 x2
rmmod nbd
cli volume create v1 --access "$REPO" --name image
refused "the kernel's nbd driver is not loaded" cli attach v1
refused "hint: load it with 'modprobe nbd'" cli attach v1
stop_server
say "everything attached and detached"
