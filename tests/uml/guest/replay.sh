# dockerd's calls, as they were written down, made again without dockerd.
#
# In: HORCRUX_CLI, HORCRUX_NBD, HORCRUX_DV, REPO with the images `image` (ext4) and `other` (XFS), TRANSCRIPT.
export HORCRUX_STATE_DIR=$STATE
"$HORCRUX_NBD" serve >>"$UML_OUT/server.log" 2>&1 &
server_pid=$!
wait_until "the daemon's answer" "$HORCRUX_CLI" status
"$HORCRUX_DV" --socket /run/dv.sock >>"$UML_OUT/driver.log" 2>&1 &
driver_pid=$!
wait_until "the driver" test -S /run/dv.sock
/usr/bin/python3 "${UML_LIB%/*}/transcript.py" replay /run/dv.sock "$TRANSCRIPT" "REPO=$REPO" "STATE=$STATE" ||
    { tail -n 30 "$UML_OUT/driver.log"; fail "the driver answers otherwise than it did"; }
! grep -q "$STATE/mounts" /proc/self/mountinfo || fail "mounts are left"
[ -z "$(ls -d /sys/block/nbd*/pid 2>/dev/null)" ] || fail "devices are left"
[ -z "$(ls -A "$STATE/mounts")" ] || fail "mountpoints are left"
[ -z "$(ls -A "$STATE/volumes" | grep -v '^\.')" ] || fail "volumes are left"
kill "$driver_pid"
wait "$driver_pid"
stop_server
say "every call was answered as before"
