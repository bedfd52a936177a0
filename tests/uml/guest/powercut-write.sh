# Writes until the power goes. The state directory is on /dev/ubda; every file whose fsync returned is reported
# to the host in $UML_OUT/flushed. run.sh -k writing kills the guest while this runs.
#
# In: FS; ROUND, a number that names this boot's files; lib.sh's variables. DISK_FS is made on the disk in round 1.
# Out: $UML_OUT/flushed: one line `name seed length` per file that must be there after the next boot.
dev=/dev/nbd0
mkdir -p /mnt/disk /mnt/fs
[ "$ROUND" != 1 ] || mkfs.ext4 -qF /dev/ubda
mount -t ext4 /dev/ubda /mnt/disk
STATE=/mnt/disk/state
start_server
attach $dev
mount -t "$FS" $dev /mnt/fs
say "round $ROUND writes"
/usr/bin/python3 "$(dirname "$UML_LIB")/powercut.py" write /mnt/fs "$UML_OUT" "$ROUND" "${CUT_LIMIT_S:-60}"
fail "the power was not cut"
