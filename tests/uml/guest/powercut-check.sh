# After a power cut: the disk's own journal is replayed, the same state directory is served again, and every file
# reported as flushed in any round is there, byte for byte.
#
# In: FS; FLUSHED, the reports of all rounds so far; ROUND; lib.sh's variables.
dev=/dev/nbd0
mkdir -p /mnt/disk /mnt/fs
mount -t ext4 /dev/ubda /mnt/disk
STATE=/mnt/disk/state
start_server
attach $dev
# Mounting replays the filesystem's journal, as after any power cut; fsck judges what that leaves.
mount -t "$FS" $dev /mnt/fs
/usr/bin/python3 "$(dirname "$UML_LIB")/powercut.py" check /mnt/fs "$FLUSHED"
[ -z "${MANIFEST:-}" ] || tree check --allow-extra "$MANIFEST" /mnt/fs
umount /mnt/fs
fsck_clean $dev "$FS"
detach $dev
stop_server
umount /mnt/disk
e2fsck -fn /dev/ubda >/mnt/tmp/disk 2>&1 || { cat /mnt/tmp/disk; fail "the disk under the state directory is not clean"; }
say "round $ROUND: all that was flushed is there"
