# Words for the guest scripts that run Docker or the like: the daemon, the driver and dockerd started and ended, and what they leave looked for. Sourced after lib.sh.
#
# In: HORCRUX_CLI, HORCRUX_NBD, HORCRUX_DV; with RECORD, Docker's calls to the driver are written there (`transcript.py`), REPO's place left open.
export HORCRUX_STATE_DIR=$STATE DOCKER_HOST=unix:///run/docker.sock
# docker run takes some ten seconds here.
WAIT_S=120
cli() { "$HORCRUX_CLI" "$@"; }
# Debian's, whatever else the host calls by this name.
docker() { /usr/bin/docker "$@"; }

start_daemon() {
    "$HORCRUX_NBD" serve >>"$UML_OUT/server.log" 2>&1 &
    server_pid=$!
    wait_until "the daemon's answer" cli status
}
# driver CALL BODY: as Docker would, on the driver's own socket.
driver() {
    curl -sS --max-time 60 --unix-socket /run/docker/plugins/horcrux-nbd.sock "http://localhost/VolumeDriver.$1" --data-binary "$2"
}
start_driver() {
    if [ -n "${RECORD:-}" ]; then
        "$HORCRUX_DV" --socket /run/dv.sock >>"$UML_OUT/driver.log" 2>&1 &
        driver_pid=$!
        wait_until "the driver" test -S /run/dv.sock
        mkdir -p /run/docker/plugins
        [ -S /run/docker/plugins/horcrux-nbd.sock ] ||
            /usr/bin/python3 "${UML_LIB%/*}/transcript.py" record /run/docker/plugins/horcrux-nbd.sock /run/dv.sock "$RECORD" "REPO=$REPO" "STATE=$STATE" &
        wait_until "the driver's answer" driver Capabilities '{}'
        return
    fi
    "$HORCRUX_DV" >>"$UML_OUT/driver.log" 2>&1 &
    driver_pid=$!
    wait_until "the driver's answer" driver Capabilities '{}'
}
start_dockerd() {
    dockerd --data-root /mnt/dk --exec-root /run/dkx -H "$DOCKER_HOST" --pidfile /run/dockerd.pid -s vfs --bridge none --iptables=false \
        >>"$UML_OUT/dockerd.log" 2>&1 &
    dockerd_pid=$!
    wait_until "dockerd's answer" docker version
}
# Killed, it unmounts nothing, and its containers go with it.
kill_dockerd() {
    end_it "$dockerd_pid" KILL
    pkill -KILL -f "containerd.*dkx" || true
    rm -f /run/dockerd.pid
    sleep 1
}
# end_it PID SIGNAL: and waits for its end.
end_it() {
    kill "-$2" "$1"
    wait "$1" 2>/dev/null || true
}
mounted() { grep -c "$STATE/mounts" /proc/self/mountinfo || true; }
nothing_mounted() { [ "$(mounted)" = 0 ]; }
trap 'tail -n 30 "$UML_OUT"/d*.log' EXIT

# An image of one program; with -v /usr:/usr:ro it has all of the host's.
mkdir -p /mnt/root/bin /mnt/root/etc /mnt/root/usr
mkdir -m 1777 /mnt/root/tmp
cp "$(type -P busybox)" /mnt/root/bin/
for name in sh cat echo sleep sync ls test mv rm; do ln -s busybox "/mnt/root/bin/$name"; done
ln -s usr/lib /mnt/root/lib
ln -s usr/lib64 /mnt/root/lib64
cp /etc/passwd /etc/group /etc/ld.so.cache /mnt/root/etc/
import_tools() { tar -C /mnt/root -c . | docker import - tools >/dev/null; }
run() { docker run --rm --network none "$@"; }
start_all() {
    start_daemon
    start_driver
    start_dockerd
    import_tools
    say "docker $(docker version --format '{{.Server.Version}}') is up"
}
