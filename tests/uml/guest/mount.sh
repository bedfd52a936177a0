# A kernel uses the disk: attach, mount, compare with the source, write, unmount, detach, serve again, find the
# writes, and fsck finds nothing to mend.
#
# In: FS (ext4 or xfs), MANIFEST (tree.py list of the source directory, made on the host); lib.sh's variables.
dev=/dev/nbd0
mkdir -p /mnt/fs

start_server
attach $dev
mount -t "$FS" $dev /mnt/fs
say "mounted $FS"
tree check "$MANIFEST" /mnt/fs
say "the tree is its source"

# Writes of every kind: new data, an overwrite within a file, a truncation, a deletion, names and attributes.
mkdir /mnt/fs/written
dd if=/dev/urandom of=/mnt/fs/written/random bs=1M count=16 status=none
cp -a /mnt/fs/written/random /mnt/fs/written/edited
printf 'edited in the middle' | dd of=/mnt/fs/written/edited bs=1 seek=5000001 conv=notrunc status=none
truncate -s 3000000 /mnt/fs/written/random
fallocate -l 4M /mnt/fs/written/allocated
fallocate -p -o 1M -l 1M /mnt/fs/written/edited
ln -s random /mnt/fs/written/link
setfattr -n user.note -v 'kept' /mnt/fs/written/edited
for i in $(seq 300); do echo "file $i" >"/mnt/fs/written/small.$i"; done
rm /mnt/fs/written/small.1??
sync -f /mnt/fs
tree list /mnt/fs >/mnt/tmp/after
fstrim /mnt/fs && say "trimmed" || say "this server takes no trim"
umount /mnt/fs
fsck_clean $dev "$FS"
detach $dev
stop_server

start_server
attach $dev
mount -t "$FS" $dev /mnt/fs
tree check /mnt/tmp/after /mnt/fs
say "the second serving has the writes"
umount /mnt/fs
fsck_clean $dev "$FS"
detach $dev
stop_server
