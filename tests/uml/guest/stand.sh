# A device stands still for a commit wherever it is mounted, or the commit is refused; and its filesystem goes on, whoever is killed.
#
# In: HORCRUX_CLI, HORCRUX_NBD, REPO with the image `image`.
export HORCRUX_STATE_DIR=$STATE HORCRUX_AUTHOR=tests
cli() { "$HORCRUX_CLI" "$@"; }
daemon() {
    "$HORCRUX_NBD" serve >>"$UML_OUT/server.log" 2>&1 &
    server_pid=$!
    wait_until "the daemon's answer" cli status
}
# `not_committed TEXT`: a commit is refused, and says so.
not_committed() {
    if cli commit --allow-empty -m x v >"$UML_OUT/told" 2>&1; then fail "it was committed, and not: $1"; fi
    grep -q "$1" "$UML_OUT/told" || { cat "$UML_OUT/told"; fail "it does not say: $1"; }
}
mkdir -p /mnt/fs /mnt/other /mnt/at
daemon
cli volume create v --access "$REPO" --name image
cli mount v /mnt/fs

# The first of its mounts can't be seen any more; what was written and not written back is in the commit all the same.
mount --bind /mnt/fs /mnt/other
mount -t tmpfs none /mnt/fs
echo covered >/mnt/other/covered
cli commit -m covered --wait v
umount /mnt/fs
cli clone v at
cli mount at /mnt/at
[ "$(cat /mnt/at/covered)" = covered ] || fail "what was not written back is not in the commit"
cli umount at
cli volume rm --force at
# All of them are covered.
mount -t tmpfs none /mnt/fs
mount -t tmpfs none /mnt/other
not_committed "something else is mounted over it"
umount /mnt/fs
umount /mnt/other
umount /mnt/other
say "what lies over a mount hides nothing from a commit"

fsfreeze --freeze /mnt/fs
not_committed "was frozen by somebody else"
fsfreeze --unfreeze /mnt/fs
cli commit --allow-empty -m thawed --wait v
say "what others froze is not taken for still"

# Mounted where the daemon does not see it.
cli umount v
device=$(cli attach v)
unshare --mount --propagation private sh -c "
    mount $device /mnt/at && echo elsewhere >/mnt/at/elsewhere && : >/mnt/there
    while [ ! -e /mnt/go ]; do sleep 0.1; done
    umount /mnt/at" &
elsewhere=$!
wait_until "a mount elsewhere" test -e /mnt/there
not_committed "is held by another program"
: >/mnt/go
wait $elsewhere
cli commit -m elsewhere --wait v
cli detach v
say "what is mounted elsewhere is not taken for still"

# A daemon is killed, with the process that froze; the next one finds the mark.
cli mount v /mnt/fs
[ "$(cat /mnt/fs/elsewhere)" = elsewhere ] || fail "what was written elsewhere is gone"
id=$(sed -n 's/^ *"id": "\([0-9a-f]*\)",$/\1/p' "$STATE/volumes/v/volume.json" | head -n 1)
[ ${#id} = 32 ] || fail "the volume's id is '$id'"
fsfreeze --freeze /mnt/fs
kill -KILL $server_pid
wait $server_pid || true
: >"$STATE/run/frozen-$id"
daemon
timeout 60 sh -c 'echo on >/mnt/fs/on' || fail "the filesystem is frozen still"
gone() { [ ! -e "$STATE/run/frozen-$id" ]; }
wait_until "the mark to go" gone
cli commit -m on --wait v
say "what a killed daemon froze goes on"
cli umount v
no_errors "after all that"
kill -TERM $server_pid
wait $server_pid || fail "the daemon did not end well"
say "it stands still or it is refused"
