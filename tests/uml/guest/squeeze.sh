# Writeback to a device whose server runs on the same machine, of four times what memory is free.
#
# In: HORCRUX_CLI, HORCRUX_NBD, REPO with the image `image`; FREE_MIB to leave free; /dev/ubda, a disk for the state directory.
export HORCRUX_STATE_DIR=/mnt/disk/state
cli() { "$HORCRUX_CLI" "$@"; }
mkdir -p /mnt/disk /mnt/fs
mke2fs -q -t ext4 /dev/ubda
mount /dev/ubda /mnt/disk

"$HORCRUX_NBD" serve >>"$UML_OUT/server.log" 2>&1 &
server_pid=$!
wait_until "the daemon's answer" cli status
cli mount --access "$REPO" --name image /mnt/fs >/dev/null

# What it says of itself to the kernel: held in memory but for the cache, and every thread an I/O flusher (PF_MEMALLOC_NOIO, PF_LOCAL_THROTTLE).
locked=$(awk '/^VmLck/ { print int($2 / 1024) }' "/proc/$server_pid/status")
[ "$locked" -ge 8 ] || fail "$locked MiB of it are held in memory"
for stat in "/proc/$server_pid"/task/*/stat; do
    flags=$(sed 's/.*) //' "$stat" 2>/dev/null | cut -d' ' -f7) || true
    # One that has ended meanwhile.
    [ -n "$flags" ] || continue
    [ $((flags & 0x180000)) = $((0x180000)) ] || fail "$stat: its flags are $flags"
done
! grep -q "when memory runs out" "$UML_OUT/server.log" || fail "it says that it is not held in memory"
slabs=$(awk '/cache\/slabs/ { seen = 1 } seen && /^Locked/ { print $2; seen = 0 }' "/proc/$server_pid/smaps")
[ -n "$slabs" ] || fail "no slab of the cache is mapped"
for locked_kib in $slabs; do
    [ "$locked_kib" = 0 ] || fail "$locked_kib KiB of the cache are held in memory"
done
say "the daemon holds $locked MiB in memory"

# Everything else in memory goes to a file that can't be written out.
echo 3 >/proc/sys/vm/drop_caches
free_mib() { awk '/^MemAvailable/ { print int($2 / 1024) }' /proc/meminfo; }
[ "$(free_mib)" -gt "$FREE_MIB" ] || fail "only $(free_mib) MiB are free to begin with"
dd if=/dev/zero of=/mnt/fill bs=1M count=$(($(free_mib) - FREE_MIB)) status=none
free=$(free_mib)
[ "$free" -le $((FREE_MIB + 32)) ] || fail "$free MiB are free, not $FREE_MIB"
# Nearly all of it may be dirty.
echo 80 >/proc/sys/vm/dirty_ratio
echo 70 >/proc/sys/vm/dirty_background_ratio
most=0
fio --eta=never --name=w --directory=/mnt/fs --rw=write --bs=1M --size=$((FREE_MIB * 4))M --ioengine=psync --verify=crc32c --do_verify=0 --end_fsync=1 \
    --output="$UML_OUT/fio" &
fio_pid=$!
while kill -0 "$fio_pid" 2>/dev/null; do
    dirty=$(awk '/^(Dirty|Writeback):/ { sum += $2 } END { print int(sum / 1024) }' /proc/meminfo)
    [ "$dirty" -le "$most" ] || most=$dirty
    sleep 0.2
done
wait "$fio_pid" || { status=$?; cat "$UML_OUT/fio"; fail "fio ended with $status"; }
[ "$most" -ge $((FREE_MIB / 4)) ] || fail "only $most MiB were dirty at a time: that squeezes nobody"
say "$((FREE_MIB * 4)) MiB written with $free MiB free, $most MiB of them dirty at a time"
echo 3 >/proc/sys/vm/drop_caches
fio --eta=never --name=w --directory=/mnt/fs --rw=read --bs=1M --size=$((FREE_MIB * 4))M --ioengine=psync --verify=crc32c --output="$UML_OUT/fio" ||
    { cat "$UML_OUT/fio"; fail "what was written is not there"; }
if dmesg | grep -iE "out of memory|oom-kill|blocked for more than|I/O error|EXT4-fs error"; then fail "the kernel was in need"; fi
kill -0 "$server_pid" || fail "the daemon is gone"
cli umount --rm image >/dev/null
[ "$(cli volume ls | wc -l)" = 1 ] || fail "the volume is left"
stop_server
umount /mnt/disk
say "written and read back through a memory a quarter its size"
