# Files of volumes that a kernel has mounted: what it holds in memory is seen, and the mount goes on.
#
# In: HORCRUX_CLI, HORCRUX_NBD, REPO with the images `image` (ext4) and `other` (XFS).
export HORCRUX_STATE_DIR=$STATE
cli() { "$HORCRUX_CLI" "$@"; }

mkdir -p /mnt/fs
"$HORCRUX_NBD" serve >>"$UML_OUT/server.log" 2>&1 &
server_pid=$!
wait_until "the daemon's answer" cli status
cli volume create v1 --access "$REPO" --name image
cli volume create x1 --access "$REPO" --name other

cli mount v1 /mnt/fs
[ -z "$(cli diff v1 --name-status)" ] || fail "mounting it changed files: $(cli diff v1 --name-status)"
[ "$(cli ls -R v1 | wc -l)" = "$(find /mnt/fs -mindepth 1 -printf x | wc -c)" ] || fail "not all of it is listed"
cli export v1 | tar --numeric-owner --compare -C /mnt/fs || fail "the archive is not what is mounted"
say "listed and exported, it is what is mounted"

mkdir /mnt/fs/new
echo "one line" >/mnt/fs/new/file
for i in $(seq 200); do echo "file $i" >"/mnt/fs/new/small.$i"; done
[ "$(cli cat v1 new/file)" = "one line" ] || fail "what was written is not seen"
[ "$(cli ls v1 new | wc -l)" = 201 ] || fail "names are missing"
[ "$(cli diff v1 --name-status | grep -c '^A')" = 202 ] || fail "$(cli diff v1 --name-status | head)"
mv /mnt/fs/new/file /mnt/fs/renamed
echo "two lines" >>/mnt/fs/renamed
rm -r /mnt/fs/new
[ "$(cli diff v1 --name-status)" = "A	renamed" ] || fail "$(cli diff v1 --name-status | head)"
cli diff v1 | grep -q '^+two lines$' || fail "$(cli diff v1)"
[ -z "$(cli diff v1 main main --name-status)" ] || fail "a version differs from itself"
echo "and it goes on" >/mnt/fs/after
cli umount v1
say "what the mounted filesystem held was seen"

[ "$(cli attach v1)" != "" ]
[ "$(cli cat v1 after)" = "and it goes on" ] || fail "attached and not mounted, it can't be read"
cli detach v1
[ "$(cli cat v1 after)" = "and it goes on" ] || fail "detached, it can't be read"

refused "its files are read through a mount" cli ls x1
say "files of volumes are read"
