#!/bin/bash
# Boots a User Mode Linux kernel on this machine's own files and runs one script in it as root.
#
#   tests/uml/run.sh [-o OUT] [-t SECONDS] [-m MEM] [-e KEY=VALUE]... [-k KILLFILE] SCRIPT [DISK...]
#
# In:   SCRIPT is sourced by tests/uml/init.sh after tests/uml/lib.sh, with every -e in its environment. Each
#       DISK is a raw image and appears inside as /dev/ubda, /dev/ubdb ...
# Out:  OUT (default: a fresh temporary directory, removed at the end) is visible inside as $UML_OUT. It ends
#       up with `console` (all that was printed) and `status` (the script's exit code).
# Exit: the script's own status; 124 if the time ran out; 125 if the kernel died without a status; 137 if the
#       power was cut: with -k, once SCRIPT has created OUT/KILLFILE the whole guest is killed with SIGKILL
#       CUT_AFTER seconds later (default: a random moment within two seconds; printed, so it can be repeated).
#
# The guest shares the host's files through hostfs and nothing else: not its network, not its sockets, not
# its page cache. So servers run inside, and what they write belongs on tmpfs or on a DISK.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
usage() { sed -n '2,/^set -/{/^#/!d;s/^# \{0,1\}//;p}' "${BASH_SOURCE[0]}" >&2; exit 2; }

out= limit=180 mem=2048M kill_file= env_lines=()
while getopts o:t:m:e:k: opt; do
    case $opt in
    o) out=$OPTARG ;;
    t) limit=$OPTARG ;;
    m) mem=$OPTARG ;;
    e) env_lines+=("$OPTARG") ;;
    k) kill_file=$OPTARG ;;
    *) usage ;;
    esac
done
shift $((OPTIND - 1))
[ $# -ge 1 ] || usage
script=$(readlink -f "$1")
shift
[ -f "$script" ] || { echo "run.sh: no script $script" >&2; exit 2; }

for tool in linux.uml busybox insmod cc; do
    command -v "$tool" >/dev/null || [ -x "/sbin/$tool" ] ||
        { echo "run.sh: $tool is missing: apt-get install user-mode-linux busybox-static kmod gcc" >&2; exit 2; }
done

fresh=
if [ -z "$out" ]; then
    out=$(mktemp -d)
    fresh=$out
fi
mkdir -p "$out"
out=$(readlink -f "$out")
rm -f "$out/status" "$out/console"
[ -z "$kill_file" ] || rm -f "$out/$kill_file"

# The guest's memory is a file. On a disk every dirtied page would be written back, so it goes to /dev/shm
# when that has the room (containers often give it 64 MiB).
mem_kib=$(($(numfmt --from=iec "${mem}") / 1024))
if [ "$(df --output=avail -k /dev/shm 2>/dev/null | tail -1)" -gt "$mem_kib" ] 2>/dev/null; then
    mem_dir=/dev/shm
else
    mem_dir=${TMPDIR:-/tmp}
fi

disks=()
letter=0
for disk in "$@"; do
    disks+=("ubd$letter=$(readlink -f "$disk")")
    letter=$((letter + 1))
done

{
    for line in "${env_lines[@]}"; do
        printf 'export %s=%q\n' "${line%%=*}" "${line#*=}"
    done
    printf 'export UML_SCRIPT=%q\n' "$script"
} >"$out/env"

# The management socket's path must fit in 108 bytes, so its directory is a short one of its own.
uml_dir=$(mktemp -d /tmp/uml.XXXXXX)

# hostfs keeps a file of the host open for each one the guest knows.
ulimit -n "$(ulimit -Hn)"

# Where the processor has registers that this kernel does not know of.
cc -O1 -Wall -shared -fPIC -o "$out/xstate.so" "$here/xstate.c" -ldl

# A session of its own: a killed kernel leaves its traced processes behind, and killing the group by the id
# we were given takes them all at once, as a power cut does.
TMPDIR=$mem_dir LD_PRELOAD=$out/xstate.so setsid linux.uml "mem=$mem" rootfstype=hostfs root=/dev/root rw hostfs=/ \
    "init=$here/init.sh" "UML_OUT=$out" "uml_dir=$uml_dir/" con0=fd:0,fd:1 con=null quiet panic=-1 \
    "${disks[@]}" </dev/null >"$out/console" 2>&1 &
pid=$!

end_guest() {
    kill -KILL -- "-$pid" 2>/dev/null || true
    kill -KILL "$pid" 2>/dev/null || true
    wait "$pid" 2>/dev/null || true
    rm -rf "$uml_dir"
}
finish() {
    end_guest
    [ -z "$fresh" ] || rm -rf "$fresh"
}
trap finish EXIT
trap 'exit 143' TERM
trap 'exit 130' INT

deadline=$((SECONDS + limit))
cut=
while kill -0 "$pid" 2>/dev/null; do
    if [ $SECONDS -ge $deadline ]; then
        end_guest
        echo "run.sh: $(basename "$script") ran out of its $limit s; console:" >&2
        cat "$out/console" >&2
        exit 124
    fi
    if [ -n "$kill_file" ] && [ -e "$out/$kill_file" ]; then
        cut=${CUT_AFTER:-$(printf '%d.%03d' $((RANDOM % 2)) $((RANDOM % 1000)))}
        sleep "$cut"
        end_guest
        break
    fi
    sleep 0.05
done
wait "$pid" 2>/dev/null || true

if [ -n "$cut" ]; then
    if [ -e "$out/status" ]; then
        # The script was over before the cut: that is no power cut, and must not pass for one.
        echo "run.sh: $(basename "$script") ended with $(cat "$out/status") before the power was cut; console:" >&2
        cat "$out/console" >&2
        exit 125
    fi
    echo "run.sh: power cut $cut s after $kill_file (CUT_AFTER=$cut repeats it)"
    exit 137
fi
if [ ! -s "$out/status" ]; then
    echo "run.sh: the kernel ended without a status; console:" >&2
    cat "$out/console" >&2
    exit 125
fi
status=$(cat "$out/status")
if [ "$status" != 0 ]; then
    echo "run.sh: $(basename "$script") failed with $status; console:" >&2
    cat "$out/console" >&2
fi
exit "$status"
