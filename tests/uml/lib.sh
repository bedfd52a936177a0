# Words for the guest scripts: start a server, attach it, compare, detach. Sourced by init.sh as root in the
# guest with `set -euo pipefail`; every function that waits has a bound, and says what it waited for.
#
# In, from the environment (run.sh -e):
#   SERVER      `horcrux` (the product) or `nbdkit` (the stand-in that proves the rig itself)
#   HORCRUX_NBD, REPO, NAME   the binary, the repository and the image's name; SERVE_ARGS more arguments
#   IMAGE       the stand-in's raw image; it is copied into the state directory at the first start
#   STATE       the state directory (default /mnt/state: tmpfs); TRANSPORT `unix` or `tcp`
#   CONNECTIONS, BLOCK   nbd-client's -C and -b

SERVER=${SERVER:-horcrux}
NAME=${NAME:-image}
STATE=${STATE:-/mnt/state}
TRANSPORT=${TRANSPORT:-unix}
CONNECTIONS=${CONNECTIONS:-1}
BLOCK=${BLOCK:-4096}
SOCK=/run/nbd.sock
PORT=10809
# What the guest does is slow, not the host's: a bound is generous, but there is one.
WAIT_S=60
server_pid=

say() { echo "[$(cut -d' ' -f1 /proc/uptime)] $*"; }
fail() {
    say "FAIL: $*"
    [ ! -s "$UML_OUT/server.log" ] || { say "server log:"; tail -50 "$UML_OUT/server.log"; }
    dmesg | tail -20
    exit 1
}
trap 'say "line $LINENO of $UML_SCRIPT: a command failed: $BASH_COMMAND"' ERR
set -E

# wait_until DESCRIPTION COMMAND...: polls until COMMAND succeeds.
wait_until() {
    local what=$1 end=$((SECONDS + WAIT_S))
    shift
    until "$@" >/dev/null 2>&1; do
        [ $SECONDS -lt $end ] || fail "waited $WAIT_S s for $what"
        sleep 0.1
    done
}

server_uri() {
    case $TRANSPORT in
    unix) echo "nbd+unix:///$NAME?socket=$SOCK" ;;
    tcp) echo "nbd://127.0.0.1:$PORT/$NAME" ;;
    esac
}
server_answers() {
    # A dead server never answers: stop waiting for it.
    kill -0 "$server_pid" 2>/dev/null || fail "the server ended before it answered"
    nbdinfo --size "$(server_uri)"
}

start_server() {
    local where=()
    mkdir -p "$STATE"
    rm -f "$SOCK"
    case $SERVER in
    horcrux)
        case $TRANSPORT in
        unix) where=(--unix "$SOCK") ;;
        tcp) where=(--listen "127.0.0.1:$PORT") ;;
        esac
        # shellcheck disable=SC2086
        "$HORCRUX_NBD" serve --access "$REPO" --name "$NAME" "${where[@]}" --state-dir "$STATE" \
            ${SERVE_ARGS:-} >>"$UML_OUT/server.log" 2>&1 &
        ;;
    nbdkit)
        case $TRANSPORT in
        unix) where=(-U "$SOCK") ;;
        tcp) where=(-i 127.0.0.1 -p "$PORT") ;;
        esac
        if [ ! -e "$STATE/image" ]; then
            cp --sparse=always "$IMAGE" "$STATE/image.new"
            sync "$STATE/image.new"
            mv "$STATE/image.new" "$STATE/image"
            sync "$STATE"
        fi
        # shellcheck disable=SC2086
        nbdkit -f "${where[@]}" -e "$NAME" ${STAND_IN_FILTER:+--filter=$STAND_IN_FILTER} file "$STATE/image" \
            ${STAND_IN_ARGS:-} >>"$UML_OUT/server.log" 2>&1 &
        ;;
    *) fail "SERVER=$SERVER: horcrux or nbdkit" ;;
    esac
    server_pid=$!
    wait_until "the server's first answer" server_answers
    say "serving $NAME ($SERVER, pid $server_pid)"
}

# Ends the server as its service manager would, and insists that it exits by itself, with success.
stop_server() {
    local status=0 end=$((SECONDS + WAIT_S))
    kill -TERM "$server_pid"
    while kill -0 "$server_pid" 2>/dev/null; do
        [ $SECONDS -lt $end ] || fail "the server did not end within $WAIT_S s of SIGTERM"
        sleep 0.1
    done
    wait "$server_pid" || status=$?
    server_pid=
    [ "$status" = 0 ] || fail "the server ended with $status after SIGTERM"
    say "server stopped"
}

# refused WORDS COMMAND...: it fails, and says this.
refused() {
    local words=$1 said
    shift
    if said=$("$@" 2>&1); then fail "not refused: $* ($said)"; fi
    case $said in *"$words"*) ;; *) fail "'$*' said '$said', not '$words'" ;; esac
}

# How many devices have a server.
connected() { { ls -d /sys/block/nbd*/pid 2>/dev/null || true; } | wc -l; }
nothing_connected() { [ "$(connected)" = 0 ]; }
# no_errors WHEN: what the kernel says of a device or a filesystem that failed.
no_errors() {
    if dmesg | grep -E "I/O error|Buffer I/O|EXT4-fs error|XFS.*(error|shutdown)|Remounting"; then fail "$1: the kernel saw errors"; fi
}

attached() { [ "$(cat "/sys/block/${1#/dev/}/size")" != 0 ] && nbd-client -c "$1"; }
not_attached() { ! nbd-client -c "$1"; }

# attach DEVICE [ARG...]: through nbd-client, whose default is netlink.
attach() {
    local dev=$1
    shift
    case $TRANSPORT in
    unix) nbd-client -unix "$SOCK" "$dev" -N "$NAME" -b "$BLOCK" -C "$CONNECTIONS" -t 60 "$@" ;;
    tcp) nbd-client 127.0.0.1 "$PORT" "$dev" -N "$NAME" -b "$BLOCK" -C "$CONNECTIONS" -t 60 "$@" ;;
    esac
    wait_until "$dev to have a size" attached "$dev"
    say "attached $dev: $(blockdev --getsize64 "$dev") bytes, $CONNECTIONS connections," \
        "blocks of $(blockdev --getss "$dev")"
}
detach() {
    blockdev --flushbufs "$1"
    nbd-client -d "$1"
    wait_until "$1 to be gone" not_attached "$1"
    say "detached $1"
}

# A read-only check that must find nothing to mend. xfs_repair -n also refuses a dirty log.
fsck_clean() {
    local dev=$1 fs=$2
    case $fs in
    ext4) e2fsck -fn "$dev" >/mnt/tmp/fsck 2>&1 || { cat /mnt/tmp/fsck; fail "e2fsck of $dev is not clean"; } ;;
    xfs) xfs_repair -n "$dev" >/mnt/tmp/fsck 2>&1 || { cat /mnt/tmp/fsck; fail "xfs_repair -n of $dev is not clean"; } ;;
    esac
    say "fsck of $dev ($fs): clean"
}

# Debian's python3, not one that a PATH happens to put first.
tree() { /usr/bin/python3 "$(dirname "$UML_LIB")/../tree.py" "$@"; }
